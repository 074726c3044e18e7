"""Output for people: tables, progress, scores, plots, the report page, compare and explain."""
