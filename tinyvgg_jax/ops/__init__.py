"""Convolution and pooling, in plain JAX and in forms that are fast on a CPU. See README.md."""
