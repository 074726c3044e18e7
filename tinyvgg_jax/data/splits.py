"""Splits of a dataset as uint8 arrays, decoded once on each machine and then memory-mapped."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyvgg_jax import cache
from tinyvgg_jax.data.dataset import Dataset, DatasetInfo, Range, find_dataset
from tinyvgg_jax.data.folder import DEFAULTS, Options
from tinyvgg_jax.data.progress import progress
from tinyvgg_jax.errors import UserError, first_line
from tinyvgg_jax.paths import open_regular

logger = logging.getLogger(__name__)

# Examples that are read from the dataset's files at a time.
_DECODE_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Split:
    """A split: examples of a dataset.

    Attributes:
        images: `[N, H, W, C]` uint8.
        labels: `[N]` int32.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        sha = hashlib.sha256(repr(self.images.shape).encode())
        for array in (self.images, self.labels):
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()


def load_splits(
    name: str,
    splits: dict[str, str],
    data_dir: str | None = None,
    source_dir: str | None = None,
    options: Options = DEFAULTS,
) -> tuple[dict[str, Split], DatasetInfo]:
    """Loads splits of a dataset; one that is not prepared and that has a source is prepared first.

    Args:
        name: as in `find_dataset`.
        splits: tfds split specifications by name, like `{"validation": "train[55000:]"}`.
        data_dir: as in `find_dataset`.
        source_dir: as in `find_dataset`.
        options: as in `find_dataset`.

    Returns:
        The splits by the same names, and the properties of the dataset.

    Raises:
        UserError: as `find_dataset` and `decode_splits`.
        InterruptedRunError: as `find_dataset`.
    """
    dataset = find_dataset(name, data_dir, source_dir, options)
    return decode_splits(dataset, splits), dataset.info


def decode_splits(dataset: Dataset, splits: dict[str, str]) -> dict[str, Split]:
    """Decodes splits of a dataset, or takes them from the user's cache.

    Args:
        dataset: the dataset.
        splits: tfds split specifications by name, like `{"validation": "train[55000:]"}`.

    Returns:
        The splits by the same names.

    Raises:
        UserError: if a split does not exist or is empty; if the dataset is damaged, or its files
            cannot be read; or if there is too little memory.
    """
    ranges = {key: dataset.ranges(specification) for key, specification in splits.items()}
    wanted = {part.split for parts in ranges.values() for part in parts}
    whole = {split: _whole_split(dataset, split) for split in sorted(wanted)}
    return {
        key: _join([_slice(whole[part.split], part) for part in parts])
        for key, parts in ranges.items()
    }


def _slice(split: Split, part: Range) -> Split:
    return Split(split.images[part.start : part.stop], split.labels[part.start : part.stop])


def _join(splits: list[Split]) -> Split:
    if len(splits) == 1:  # It stays memory-mapped.
        return splits[0]
    return Split(
        np.concatenate([split.images for split in splits]),
        np.concatenate([split.labels for split in splits]),
    )


def _whole_split(dataset: Dataset, split: str) -> Split:
    """Returns one of the dataset's own splits, from the cache if it is there; else it is put there.

    Raises:
        UserError: if the dataset cannot be decoded, or what is decoded is not what it promises.
    """
    name = f"decoded/{dataset.name}-{split}-{_fingerprint(dataset)}"
    kept = cache.find(name)
    result = _decode(dataset, split) if kept is None else _map(kept)
    _check(dataset, split, result)
    if kept is not None:
        return result
    try:
        # The memory-mapped file takes the place of the arrays, whose memory is then free.
        return _map(cache.keep(name, lambda file: _write(file, result)))
    except OSError as error:
        logger.warning("The decoded images are not kept for the next start: %s", error)
        return result


def _fingerprint(dataset: Dataset) -> str:
    """Hashes the path of the dataset, and the names, sizes and times of its files.

    It changes when the dataset is prepared anew, so that the old cache is not used for it.
    """
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(dataset.folder.iterdir())
    ]
    content = json.dumps([os.path.realpath(dataset.folder), stats])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _write(file: BinaryIO, split: Split) -> None:
    """Writes the images and then the labels into one file, each in NumPy's format."""
    np.save(file, split.images)
    np.save(file, split.labels)


def _map(path: Path) -> Split:
    """Reads what `_write` wrote; the images are memory-mapped."""
    images = np.load(path, mmap_mode="r")
    with path.open("rb") as file:
        file.seek(images.offset + images.nbytes)
        return Split(images, np.load(file))


def _check(dataset: Dataset, split: str, decoded: Split) -> None:
    """Checks the number and shape of decoded images, and that each label has a class.

    Raises:
        UserError: if they are not what the dataset's metadata promises.
    """
    shape = (dataset.sizes[split], *dataset.info.image_shape)
    if decoded.images.shape != shape:
        raise dataset.damaged(
            f"its split {split!r} is said to be {list(shape)}, and is {list(decoded.images.shape)}"
        )
    lowest, highest = decoded.labels.min(), decoded.labels.max()
    classes = len(dataset.info.class_names)
    if lowest < 0 or highest >= classes:
        raise dataset.damaged(
            f"labels of its split {split!r} are {lowest} to {highest}, its {classes} classes are "
            f"0 to {classes - 1}"
        )


def _decode(dataset: Dataset, split: str) -> Split:
    """Decodes all examples of one of the dataset's own splits."""
    logger.info("Decoding %s's %s split, once on this machine ...", dataset.name, split)
    try:
        source = _source(dataset, split)
        images = np.empty((len(source), *dataset.info.image_shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        for indices in _batches(len(source), f"decoding {split}"):
            for i, example in zip(indices, source.__getitems__(list(indices)), strict=True):
                images[i], labels[i] = example["image"], example["label"]
    except Exception as error:
        raise _reading_error(dataset, split, error) from error
    return Split(images, labels)


def _reading_error(dataset: Dataset, split: str, error: Exception) -> UserError:
    """Says why a split cannot be decoded; an intact one is not called damaged."""
    if isinstance(error, MemoryError):
        return UserError(
            f"there is too little memory for the split {split!r} of {dataset.name}: "
            f"{first_line(error)}."
        )
    if isinstance(error, UnicodeEncodeError):
        return UserError(
            f"the files in {dataset.folder} cannot be opened, because this path is no UTF-8 text; "
            "pass another folder as --config.data.data_dir."
        )
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return UserError(
            f"the split {split!r} of {dataset.name} cannot be read: {error}. If it is damaged, "
            f"remove {dataset.folder} and run again."
        )
    # The readers of array_record, of its examples and of PNG each raise their own exceptions.
    return dataset.damaged(f"its split {split!r}: {first_line(error)}")


def _source(dataset: Dataset, split: str) -> Any:
    """Opens a split's files, after a check that they hold as many examples as the metadata says."""
    source = dataset.builder.as_data_source(split=split)
    files = [os.fspath(path) for path in dataset.builder.info.splits[split].filepaths]
    for file in files:
        # The readers' own errors do not tell a file that is closed to this user from a damaged one.
        open_regular(file).close()
    # tfds relies on the metadata alone. A list of paths makes its reader count the records.
    stored = len(type(source.data_source)(files))
    if stored != len(source):
        raise ValueError(f"its files hold {stored:,} examples, not {len(source):,}")
    return source


def _batches(size: int, title: str) -> Iterator[range]:
    """Yields the indices of all examples, some at a time, and shows on standard error how many."""
    with progress(size, title) as advance:
        for first in range(0, size, _DECODE_BATCH):
            indices = range(first, min(first + _DECODE_BATCH, size))
            yield indices
            advance(len(indices))
