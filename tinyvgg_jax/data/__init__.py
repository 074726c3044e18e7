"""FashionMNIST, or another prepared tfds dataset of images, as uint8 arrays and batches."""

from tinyvgg_jax.data.batches import (
    Batch,
    epoch_order,
    fits_on_device,
    on_device,
    padded_batches,
    stream,
)
from tinyvgg_jax.data.dataset import (
    Dataset,
    DatasetInfo,
    default_data_dir,
    find_dataset,
    is_prepared,
    require_same_source,
)
from tinyvgg_jax.data.folder import Options
from tinyvgg_jax.data.splits import Split, decode_splits, load_splits

# The splits of every run; the config specifies each in the field `data.NAME_split`.
SPLITS = ("train", "validation", "test")

__all__ = [
    "SPLITS",
    "Batch",
    "Dataset",
    "DatasetInfo",
    "Options",
    "Split",
    "decode_splits",
    "default_data_dir",
    "epoch_order",
    "find_dataset",
    "fits_on_device",
    "is_prepared",
    "load_splits",
    "on_device",
    "padded_batches",
    "require_same_source",
    "stream",
]
