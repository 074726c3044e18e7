"""Splits of a tfds dataset as uint8 arrays, decoded once on each machine and then memory-mapped."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.system import cache_dir

logger = logging.getLogger(__name__)

# Examples that are read from the dataset's files at a time.
_DECODE_BATCH = 1000
_PREPARE_HINT = (
    "Prepare it for data sources, as in "
    "`tfds.builder(NAME, data_dir=DIR, file_format='array_record').download_and_prepare()`, "
    "and pass --config.data.data_dir=DIR"
)


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


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Properties of a dataset that a model needs.

    Attributes:
        image_shape: `(H, W, C)` of the images.
        class_names: names of the classes, in the order of their labels.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def load_splits(
    name: str, splits: dict[str, str], data_dir: str | None = None, source_dir: str | None = None
) -> tuple[dict[str, Split], DatasetInfo]:
    """Loads splits of a dataset; prepares FashionMNIST first if it is not prepared yet.

    Args:
        name: name of the tfds dataset: "fashion_mnist", or one prepared as array_record.
        splits: tfds split specifications by name, like `{"validation": "train[55000:]"}`.
        data_dir: tfds's folder of datasets; None for its default, `~/tensorflow_datasets`.
        source_dir: a folder with IDX files to prepare FashionMNIST from; None fetches them.

    Returns:
        The splits by the same names, and the properties of the dataset.

    Raises:
        UserError: if the dataset is unknown or unreadable, or does not consist of images with one
            class each; if a split does not exist or is empty.
    """
    import tensorflow_datasets as tfds

    try:
        # apt-get is started in another current folder, where a relative path would be wrong.
        folder = local_path(data_dir or tfds.core.constants.DATA_DIR).absolute()
    except UserError:
        if data_dir:
            raise
        raise UserError(
            "this user has no home folder to keep datasets in; pass --config.data.data_dir=FOLDER."
        ) from None
    builder = _find_builder(name, folder, local_path(source_dir).absolute() if source_dir else None)
    info = _describe(builder)
    decoded: dict[str, Split] = {}
    loaded = {}
    for key, specification in splits.items():
        parts = _absolute_parts(builder, specification)
        for part in parts:
            if part.splitname not in decoded:
                decoded[part.splitname] = _decoded(builder, part.splitname, info)
        slices = [_slice(decoded[part.splitname], part.from_, part.to) for part in parts]
        loaded[key] = slices[0] if len(slices) == 1 else _concatenate(slices)
        if not len(loaded[key]):
            raise UserError(f"the split {specification!r} of {name} is empty.")
    return loaded, info


def _find_builder(name: str, data_dir: Path, source_dir: Path | None) -> Any:
    """Returns a builder of the prepared dataset, after preparing FashionMNIST if necessary."""
    from tinyvgg_jax.data import prepare

    builder = _read_only_builder(name, data_dir)
    if builder is None:
        if name != prepare.NAME:
            raise UserError(
                f"there is no prepared dataset {name!r} in {data_dir}. {_PREPARE_HINT}."
            )
        prepare.prepare_fashion_mnist(data_dir, source_dir)
        builder = _read_only_builder(name, data_dir)
        if builder is None:
            raise UserError(
                f"{data_dir / name} is in the way: it is not a prepared dataset. Remove it, "
                "or pass another folder as --config.data.data_dir."
            )
    if builder.info.file_format is None or builder.info.file_format.value != "array_record":
        kind = builder.info.file_format and builder.info.file_format.value
        raise UserError(
            f"{builder.data_path} was prepared as {kind}, which only TensorFlow reads. It was left "
            "as it is; pass another folder as --config.data.data_dir"
            + (" and it is prepared there." if name == prepare.NAME else f". {_PREPARE_HINT}.")
        )
    return builder


def _read_only_builder(name: str, data_dir: Path) -> Any:
    """Returns a builder that reads what is prepared in `data_dir`; None if nothing is."""
    from tensorflow_datasets.core import read_only_builder, registered

    try:
        return read_only_builder.builder_from_files(name, data_dir=os.fspath(data_dir))
    except (registered.DatasetNotFoundError, FileNotFoundError):
        return None
    except Exception as error:
        # tfds raises errors of many classes for damaged metadata and for ill-formed names.
        raise UserError(f"the dataset {name!r} in {data_dir} cannot be read: {error}") from error


def _describe(builder: Any) -> DatasetInfo:
    """Reads the properties of a dataset, and checks that it has uint8 images of one size."""
    features = builder.info.features
    try:
        image, label = features["image"], features["label"]
        names = tuple(label.names)
        shape = tuple(image.shape)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{builder.name} is not a set of images with one class each: "
            "it needs the features `image` and `label`."
        ) from error
    if len(shape) != 3 or None in shape or image.np_dtype != np.uint8:
        raise UserError(
            f"the images of {builder.name} are {image.np_dtype} of shape {shape}; "
            "uint8 [H, W, C] of one size are needed."
        )
    return DatasetInfo(image_shape=shape, class_names=names)


def _absolute_parts(builder: Any, specification: str) -> list[Any]:
    """Parses a split specification, like `train[:90%]+test`, to ranges of the dataset's splits."""
    import tensorflow_datasets as tfds

    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    try:
        instruction = tfds.core.ReadInstruction.from_spec(specification)
        return instruction.to_absolute(builder.info.splits)
    except Exception as error:
        known = ", ".join(f"{name} ({size:,})" for name, size in sizes.items())
        raise UserError(
            f"unknown split {specification!r} of {builder.name}: it has {known}, "
            "and slices like train[:90%]."
        ) from error


def _slice(split: Split, start: int | None, stop: int | None) -> Split:
    return Split(split.images[start:stop], split.labels[start:stop])


def _concatenate(splits: list[Split]) -> Split:
    return Split(
        np.concatenate([split.images for split in splits]),
        np.concatenate([split.labels for split in splits]),
    )


def _decoded(builder: Any, split: str, info: DatasetInfo) -> Split:
    """Returns a whole split of the dataset, from the cache if it is there; else it is put there."""
    root = cache_dir()
    folder = root and root / "decoded" / f"{builder.name}-{split}-{_fingerprint(builder)}"
    shape = (builder.info.splits[split].num_examples, *info.image_shape)
    stored = None if folder is None else _load(folder, shape)
    if stored is not None:
        return stored
    try:
        images, labels = _decode(builder, split, info)
    except Exception as error:
        # The readers of array_record, of its examples and of PNG each raise their own exceptions.
        raise UserError(
            f"{builder.data_path} is damaged ({str(error).strip()}). Remove it and run again."
        ) from error
    if folder is None:
        return Split(images, labels)
    try:
        _store(folder, images, labels)
    except OSError as error:
        logger.warning("The decoded images are not kept for the next start: %s", error)
        return Split(images, labels)
    # The memory-mapped file takes the place of the array, whose memory is then free.
    return _load(folder, shape) or Split(images, labels)


def _load(folder: Path, shape: tuple[int, ...]) -> Split | None:
    """Loads what `_store` wrote, images memory-mapped; None if it is missing or not whole."""
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy")
    except (OSError, ValueError, EOFError):
        return None
    whole = images.shape == shape and labels.shape == shape[:1]
    return Split(images, labels) if whole else None


def _fingerprint(builder: Any) -> str:
    """Hashes the names, sizes and times of the dataset's files.

    It changes when the dataset is prepared anew, so that the old cache is not used for it.
    """
    files = sorted(Path(builder.data_path).iterdir())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([os.path.realpath(builder.data_path), stats])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _decode(builder: Any, split: str, info: DatasetInfo) -> tuple[np.ndarray, np.ndarray]:
    """Decodes all examples of a split: images `[N, H, W, C]` uint8 and labels `[N]` int32."""
    source = builder.as_data_source(split=split)
    logger.info("Decoding %s's %s split, once on this machine ...", builder.name, split)
    images = np.empty((len(source), *info.image_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _DECODE_BATCH):
        indices = range(start, min(start + _DECODE_BATCH, len(source)))
        for i, example in zip(indices, source.__getitems__(list(indices)), strict=True):
            images[i], labels[i] = example["image"], example["label"]
    return images, labels


def _store(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes the arrays in one step, so that another process sees either both or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        if folder.is_dir():  # `_load` has found that it is not whole.
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.unlink(missing_ok=True)
        np.save(scratch / "images.npy", images)
        np.save(scratch / "labels.npy", labels)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
