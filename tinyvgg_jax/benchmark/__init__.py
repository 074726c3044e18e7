"""How fast it is: `python -m tinyvgg_jax.benchmark`, beside PyTorch with `--peer torch`."""
