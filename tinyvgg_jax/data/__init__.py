"""FashionMNIST, or another prepared tfds dataset of images, as uint8 arrays and batches."""

from tinyvgg_jax.data.batches import (
    Batch,
    epoch_order,
    fits_on_device,
    on_device,
    padded_batches,
    stream,
)
from tinyvgg_jax.data.splits import DatasetInfo, Split, load_splits

# The splits of every run; the config specifies each in the field `data.NAME_split`.
SPLITS = ("train", "validation", "test")

__all__ = [
    "SPLITS",
    "Batch",
    "DatasetInfo",
    "Split",
    "epoch_order",
    "fits_on_device",
    "load_splits",
    "on_device",
    "padded_batches",
    "stream",
]
