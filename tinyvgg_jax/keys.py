"""Keys for random numbers, each with the name of what it is for."""

import zlib

import jax
from jax import Array


def named_key(key: Array, name: str) -> Array:
    """The key for one purpose: `key` with a hash of the purpose's name folded in."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
