"""The folder of a run: what it holds, who may write to it, its checkpoints, several seeds."""
