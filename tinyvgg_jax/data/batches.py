"""Batches as pure functions of (key, epoch, step), and how they come to the device."""

import collections
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from tinyvgg_jax.data.splits import Split

# Batches under way to the device while it works on an earlier one.
_PREFETCH = 2
# Of the device's free memory, what the images may take.
_SHARE_OF_MEMORY = 0.25


class Batch(NamedTuple):
    """Examples for one step.

    Attributes:
        images: `[B, H, W, C]` uint8.
        labels: `[B]` int32.
    """

    images: Array
    labels: Array


def epoch_order(key: Array, epoch: int | Array, num_examples: int) -> Array:
    """The order in which an epoch visits the examples: a permutation, the same on any device.

    Args:
        key: the run's key for the data order.
        epoch: counted from 0.
        num_examples: N.

    Returns:
        `[N]` int, a permutation of 0 to N - 1.
    """
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


def stream(split: Split, order: np.ndarray, batch_size: int, first_step: int) -> Iterator[Batch]:
    """Yields the batches of one epoch from the host; a last incomplete one is left out.

    Args:
        split: the examples.
        order: `[N]`, from `epoch_order`.
        batch_size: B.
        first_step: how many batches to skip, for a run that goes on within an epoch.

    Yields:
        Batches on the device, transferred while earlier ones are in use.
    """
    steps = range(first_step, len(order) // batch_size)
    chosen = (order[step * batch_size : (step + 1) * batch_size] for step in steps)
    batches = (Batch(*jax.device_put((split.images[i], split.labels[i]))) for i in chosen)
    ahead = collections.deque(itertools.islice(batches, _PREFETCH))
    while ahead:
        yield ahead.popleft()
        ahead.extend(itertools.islice(batches, 1))


def padded_batches(split: Split, batch_size: int) -> Iterator[tuple[Batch, int]]:
    """Yields every example once, in order; the last batch is padded with zeros.

    Args:
        split: the examples.
        batch_size: B.

    Yields:
        A batch of B examples, and how many of them, the first ones, are real.
    """
    for start in range(0, len(split), batch_size):
        images = split.images[start : start + batch_size]
        labels = split.labels[start : start + batch_size]
        missing = batch_size - len(labels)
        if missing:
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            labels = np.pad(labels, (0, missing))
        yield Batch(*jax.device_put((images, labels))), batch_size - missing


def on_device(split: Split) -> Batch:
    """All examples of a split on the device: `[N, H, W, C]` uint8 and `[N]` int32."""
    return Batch(*jax.device_put((np.asarray(split.images), np.asarray(split.labels))))


def fits_on_device(split: Split) -> bool:
    """Whether a split's images take little of the memory that the device has free."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return split.images.nbytes <= _SHARE_OF_MEMORY * free
