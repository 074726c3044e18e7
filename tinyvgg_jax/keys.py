"""PRNG keys, each derived by the name of its purpose."""

import zlib
from typing import Literal

import jax
from jax import Array

# The named purposes of randomness in a run, and the key that each is derived from. (Rotation and
# flip get halves of the step's key, by `jax.random.split`.) The name is hashed into the key, so
# renaming a purpose changes the random numbers of every run, and a run that was interrupted would
# not go on as it began. For the same reason the key of a step is named "augment", although mixup
# and dropout are derived from it, too.
Purpose = Literal[
    "init",  # from the run's key: the initial parameters
    "order",  # from the run's key: the order of the examples, after the epoch is folded in
    "augment",  # from the run's key: everything random within a step, after the step is folded in
    "mixup",  # from the step's key: partners and weights of mixup
    "dropout",  # from the step's key: the inputs that the dense layers drop
    "shift",  # from the step's key: the offsets of random shifts
    "cutout",  # from the step's key: the centres of blackened squares
    "erasing",  # from the step's key: the images from which a rectangle is erased
    "erased area",  # from the step's key: its area
    "erased ratio",  # from the step's key: its height / width
    "erased corner",  # from the step's key: its place
    "erased noise",  # from the step's key: what it is filled with
    "scale",  # from the step's key, like all that follow: the factors of size
    "aspect",  # the changes of shape
    "shear",  # the angles of shear
    "background",  # the levels of the background
    "gamma",  # the exponents
    "contrast",  # the factors of contrast
    "brightness",  # the changes of brightness
    "blur",  # the widths of the blur
    "noise",  # the noise itself
    "noise level",  # the standard deviations of the noise
    "inversion",  # the images that are inverted
]


def named_key(key: Array, purpose: Purpose) -> Array:
    """Derives the key for one purpose by folding a hash of the purpose's name into `key`."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))
