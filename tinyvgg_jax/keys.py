"""Keys for random numbers, each with the name of its purpose."""

import zlib
from typing import Literal

import jax
from jax import Array

# Every purpose of randomness in a run. The name is hashed into the key, so renaming one changes
# the numbers of every run, and an interrupted run would not go on as it began.
Purpose = Literal[
    "init",  # of a run's key: the parameters at the start
    "order",  # of a run's key: the order of the examples, with the epoch folded in
    "augment",  # of a run's key: everything random within a step, with the step folded in
    "mixup",  # of a step's key: the partners and shares of mixup
    "dropout",  # of a step's key: what the dense layers drop
    "shift",  # of a step's key: the offsets of random shifts
    "cutout",  # of a step's key: the centres of blackened squares
]


def named_key(key: Array, purpose: Purpose) -> Array:
    """Derives the key for one purpose: `key` with a hash of the purpose's name folded in."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))
