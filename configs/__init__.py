"""Recipes: `default.py` is the paper's; the others change only what differs. See README.md."""
