"""The benchmark of speed and memory: `python -m tinyvgg_jax.benchmark [--peer torch]`."""
