"""Batches as pure functions of (key, epoch, step), streamed from the host ahead of their use."""

import collections
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from tinyvgg_jax.data.splits import Split

# Batches under way to the device while it works on an earlier one.
_PREFETCH = 2


class Batch(NamedTuple):
    """Examples for one step.

    Attributes:
        images: `[B, H, W, C]` uint8.
        labels: `[B]` int32.
    """

    images: Array
    labels: Array


def epoch_order(key: Array, epoch: int, num_examples: int) -> np.ndarray:
    """The order in which an epoch visits the examples: a permutation, the same on any device.

    Args:
        key: the run's key for the data order.
        epoch: counted from 0.
        num_examples: N.

    Returns:
        `[N]` int, a permutation of 0 to N - 1.
    """
    return np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), num_examples))


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
