"""Batches as pure functions of (key, epoch, step), and their way to the device."""

import collections
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from tinyvgg_jax.data.splits import Split
from tinyvgg_jax.devices import SPLIT, own_rows, put

# Batches that are transferred to the device while it works on an earlier one.
_PREFETCH = 2
# Images stay on the device if they take at most this fraction of its free memory, which leaves room
# for the state and the intermediate results of a step.
_MEMORY_FRACTION = 0.25


class Batch(NamedTuple):
    """Examples for one step.

    Attributes:
        images: `[B, H, W, C]` uint8.
        labels: `[B]` int32.
    """

    images: Array
    labels: Array


def epoch_order(key: Array, epoch: int | Array, num_examples: int) -> Array:
    """Draws the order in which an epoch visits the examples; it is the same on any device.

    Args:
        key: the run's key for the data order.
        epoch: counted from 0.
        num_examples: N, the number of examples.

    Returns:
        `[N]` int, a permutation of 0 to N - 1.
    """
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


def stream(
    split: Split,
    order: np.ndarray,
    batch_size: int,
    first_step: int,
    mesh: Mesh | None = None,
) -> Iterator[Batch]:
    """Yields the batches of one epoch from the host, without a last incomplete one.

    Args:
        split: the examples.
        order: `[N]`, from `epoch_order`.
        batch_size: B.
        first_step: the number of batches to skip, for a run that goes on within an epoch.
        mesh: the devices that share each batch, of which a process reads its own rows only; None
            for a single device.

    Yields:
        Batches on the device; each transfer starts two batches before it is needed.
    """
    steps, rows = range(first_step, len(order) // batch_size), own_rows(batch_size, mesh)
    chosen = (order[step * batch_size : (step + 1) * batch_size][rows] for step in steps)
    batches = (Batch(*put((split.images[i], split.labels[i]), mesh, SPLIT)) for i in chosen)
    ahead = collections.deque(itertools.islice(batches, _PREFETCH))
    while ahead:
        yield ahead.popleft()
        ahead.extend(itertools.islice(batches, 1))


def padded_batches(
    split: Split, batch_size: int, mesh: Mesh | None = None
) -> Iterator[tuple[Batch, Array]]:
    """Yields batches that hold every example once, in order; the last is padded with zeros.

    So evaluations are exact, and one compiled program serves all batches.

    Args:
        split: the examples.
        batch_size: B.
        mesh: the devices that share each batch; None for a single one.

    Yields:
        A batch of B examples, and `[B]` bool, false for padding, which comes last.
    """
    rows = own_rows(batch_size, mesh)
    for start in range(0, len(split), batch_size):
        images = split.images[start : start + batch_size]
        labels = split.labels[start : start + batch_size]
        missing = batch_size - len(labels)
        if missing:
            images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
            labels = np.pad(labels, (0, missing))
        is_real = np.arange(batch_size) < batch_size - missing
        own = (images[rows], labels[rows], is_real[rows])
        *batch, is_real = put(own, mesh, SPLIT)
        yield Batch(*batch), is_real


def on_device(split: Split, mesh: Mesh | None = None) -> Batch:
    """Moves all examples of a split to the device, or to each device of a mesh.

    Returns:
        `[N, H, W, C]` uint8 and `[N]` int32.
    """
    return Batch(*put((np.asarray(split.images), np.asarray(split.labels)), mesh))


def fits_on_device(split: Split) -> bool:
    """Tells whether a split's images take at most a quarter of the device's free memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        # A CPU reports no limit; its memory is the machine's, and devices that are parts of one
        # CPU share it.
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return split.images.nbytes <= _MEMORY_FRACTION * free
