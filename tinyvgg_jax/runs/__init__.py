"""The folder of a run: its files, its lock, its checkpoints, and runs of several seeds."""
