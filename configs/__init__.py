"""Configs of runs; `default.py` is the recipe, every other file changes only what differs."""
