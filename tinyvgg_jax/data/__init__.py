"""FashionMNIST, or another prepared tfds image set, as uint8 arrays and batches of them."""

from tinyvgg_jax.data.batches import (
    Batch,
    epoch_order,
    fits_on_device,
    padded_batches,
    resident,
    stream,
)
from tinyvgg_jax.data.splits import DatasetInfo, Split, load_splits

__all__ = [
    "Batch",
    "DatasetInfo",
    "Split",
    "epoch_order",
    "fits_on_device",
    "load_splits",
    "padded_batches",
    "resident",
    "stream",
]
