"""What people see of a run: tables, progress, scores, plots, pages, comparisons, explanations."""
