"""A prepared tfds dataset: where it lies, its properties, and the ranges that a split means."""

import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyvgg_jax.data.folder import DEFAULTS, Options
from tinyvgg_jax.errors import UserError, first_line
from tinyvgg_jax.paths import local_path, status_of
from tinyvgg_jax.pictures import FITS

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Properties of a dataset that a model needs.

    Attributes:
        image_shape: `(H, W, C)` of the images.
        class_names: names of the classes, in the order of their labels.
        fit: how a picture becomes such an image, as in `pictures.load_picture`.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fit: str = "garment"


class Range(NamedTuple):
    """Consecutive examples, from `start` to before `stop`, of one of a dataset's own splits."""

    split: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of examples."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared dataset of images with one class each, of which no image has been read yet.

    Attributes:
        builder: tfds's reader of the dataset.
        info: its properties.
    """

    builder: Any
    info: DatasetInfo

    @property
    def name(self) -> str:
        """The name of the tfds dataset."""
        return str(self.builder.name)

    @property
    def folder(self) -> Path:
        """The folder with the dataset's files."""
        return Path(self.builder.data_path)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of examples of each of the dataset's own splits."""
        return {name: split.num_examples for name, split in self.builder.info.splits.items()}

    def ranges(self, specification: str) -> list[Range]:
        """Parses a split specification.

        Args:
            specification: a tfds split, like `train[:90%]+test`.

        Returns:
            Its examples, in this order; at least one.

        Raises:
            UserError: if a split does not exist, or the specification is ill-formed or empty.
        """
        import tensorflow_datasets as tfds

        try:
            instruction = tfds.core.ReadInstruction.from_spec(specification)
            parts = instruction.to_absolute(self.builder.info.splits)
        except Exception as error:
            known = ", ".join(f"{name} ({size:,})" for name, size in self.sizes.items())
            raise UserError(
                f"unknown split {specification!r} of {self.name}: {self.folder} has {known}, "
                "and slices like train[:90%]."
            ) from error
        ranges = []
        for part in parts:
            # tfds leaves open ends open, and does not mind an end before the start.
            start, stop, _ = slice(part.from_, part.to).indices(self.sizes[part.splitname])
            ranges.append(Range(part.splitname, start, max(start, stop)))
        if not sum(part.size for part in ranges):
            raise UserError(f"the split {specification!r} of {self.name} is empty.")
        return ranges

    def default_splits(self) -> dict[str, str]:
        """Returns the specifications of train, validation and test that this dataset suggests.

        FashionMNIST's validation split is its last 5,000 training examples. A dataset with a
        validation split has its own; another keeps back the last tenth of train.
        """
        from tinyvgg_jax.data import prepare

        if self.name == prepare.NAME:
            return dict(prepare.SPLITS)
        if "validation" in self.sizes:
            return {"train": "train", "validation": "validation", "test": "test"}
        # Without a train split the specification ends in an error, unless another is given.
        if "train" in self.sizes and self.sizes["train"] < 10:  # A tenth would be none.
            return {"train": "train[:-1]", "validation": "train[-1:]", "test": "test"}
        return {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"}

    def num_examples(self, specification: str) -> int:
        """Counts the examples of a split specification; raises as `ranges` does."""
        return sum(part.size for part in self.ranges(specification))

    def num_shared(self, specification: str, other: str) -> int:
        """Counts the examples that two split specifications share; raises as `ranges` does."""
        ours, theirs = self._members(specification), self._members(other)
        return sum(int((ours[split] & theirs[split]).sum()) for split in ours)

    def _members(self, specification: str) -> dict[str, np.ndarray]:
        """Marks the examples of a specification in a mask `[N]` for each of the own splits."""
        masks = {split: np.zeros(size, bool) for split, size in self.sizes.items()}
        for split, start, stop in self.ranges(specification):
            masks[split][start:stop] = True
        return masks

    def damaged(self, reason: object) -> UserError:
        """Makes the error of a dataset whose files are not as they were written."""
        return _damaged(self.folder, reason)


def default_data_dir() -> str:
    """Returns tfds's own folder of datasets, `~/tensorflow_datasets` if the user set no other."""
    import tensorflow_datasets as tfds

    return os.fspath(tfds.core.constants.DATA_DIR)


def find_dataset(
    name: str,
    data_dir: str | None = None,
    source_dir: str | None = None,
    options: Options = DEFAULTS,
) -> Dataset:
    """Finds a prepared dataset; one that is not, and that has a source, is prepared first.

    Args:
        name: name of the tfds dataset: "fashion_mnist", one prepared as array_record, or the name
            that what is in `source_dir` gets.
        data_dir: tfds's folder of datasets; None for its default, `~/tensorflow_datasets`.
        source_dir: a folder with pictures or IDX files to prepare from; None fetches FashionMNIST.
        options: how pictures become images of one size.

    Returns:
        The dataset.

    Raises:
        UserError: if the dataset is unknown or damaged, or does not consist of images with one
            class each.
        InterruptedRunError: after SIGTERM while it is prepared, which leaves nothing behind.
    """
    folder = _data_folder(data_dir)
    if source_dir is not None:
        from tinyvgg_jax.data import prepare

        prepare.check_name(name, local_path(source_dir).absolute())
    builder = _builder(name, folder) or _prepared(name, folder, source_dir, options)
    _require_array_record(builder)
    return Dataset(builder, _describe(builder))


def is_prepared(name: str, data_dir: str) -> bool:
    """Tells whether a folder holds a prepared dataset that can be read; it creates nothing.

    Args:
        name: name of the tfds dataset.
        data_dir: tfds's folder of datasets, which need not exist.
    """
    try:
        return _builder(name, _data_folder(data_dir)) is not None
    except UserError:
        return False


def _data_folder(data_dir: str | None) -> Path:
    try:
        # apt-get is started in another current folder, where a relative path would be wrong.
        return local_path(data_dir or default_data_dir()).absolute()
    except UserError:
        if data_dir:
            raise
        raise UserError(
            "this user has no home folder to keep datasets in; pass --config.data.data_dir=FOLDER."
        ) from None


def _builder(name: str, data_dir: Path) -> Any:
    """Returns a tfds builder that reads what is prepared in `data_dir`; None if nothing is."""
    from tensorflow_datasets.core import read_only_builder, registered

    plain = re.match(r"\w+", name)  # Without a configuration and a version.
    try:
        if plain:
            _require_files(data_dir / plain[0])
        builder = read_only_builder.builder_from_files(name, data_dir=os.fspath(data_dir))
    except (registered.DatasetNotFoundError, FileNotFoundError):
        return None
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(
            f"{error.filename or data_dir} cannot be read: {error.strerror}."
        ) from error
    except Exception as error:
        # tfds raises errors of many classes for damaged metadata and for ill-formed names.
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"the dataset {name!r} in {data_dir} cannot be read: {reason}. If it is damaged, "
            "remove its folder and run again."
        ) from error
    if plain and builder.name != plain[0]:
        raise _damaged(builder.data_path, f"dataset_info.json names it {builder.name!r}")
    return builder


def _require_files(folder: Path) -> None:
    """Checks that everything in a dataset's folder is a file or a folder.

    Raises:
        UserError: if there is anything else, like a named pipe, for which tfds would wait.
    """
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise _damaged(folder, f"{path} is no regular file")


def require_same_source(
    dataset: Dataset, source_dir: str | None, options: Options = DEFAULTS
) -> None:
    """Checks that a prepared dataset is what a source would make of it.

    Raises:
        UserError: if the dataset was prepared from other content, or as images of another shape.
    """
    from tinyvgg_jax.data import prepare

    H, _, C = dataset.info.image_shape
    for name, wanted, have in (
        ("image_size", options.image_size, H),
        ("channels", options.channels, C),
        ("fit", options.fit, dataset.info.fit),
    ):
        if wanted not in (None, have):
            raise UserError(
                f"config.data.{name} is {wanted}, and the {dataset.name} in {dataset.folder} has "
                f"{have}. Leave it out, or pass another config.data.name or data_dir."
            )
    recorded = _recorded_source(dataset.folder)
    if source_dir is None or recorded is None:
        return
    source = local_path(source_dir).absolute()
    if status_of(source) is None:
        logger.warning("%s is not there any more; %s is used as it was.", source, dataset.name)
        return
    if prepare.describe_source(source, Options(fit=dataset.info.fit)) != recorded:
        raise UserError(
            f"{dataset.folder} was prepared from other content than {source} has now. Remove it to "
            "prepare it anew, or pass another config.data.name or config.data.data_dir."
        )


def _prepared(name: str, data_dir: Path, source_dir: str | None, options: Options) -> Any:
    """Prepares a dataset and returns its builder; without a source there may be only advice."""
    from tinyvgg_jax.data import prepare

    if name != prepare.NAME and source_dir is None:
        raise UserError(
            f"there is no prepared dataset {name!r} in {data_dir}. Pass "
            f"--config.data.source_dir=FOLDER with pictures or IDX files. Or: {_advice(name)}."
        )
    target = data_dir / name / prepare.DATASET_VERSION
    # If it is there, it was not readable, or another process has just prepared it.
    if not target.exists():
        source = local_path(source_dir).absolute() if source_dir else None
        if name == prepare.NAME:
            prepare.prepare_fashion_mnist(data_dir, source)
        else:
            assert source is not None
            prepare.prepare_own(name, data_dir, source, options)
    builder = _builder(name, data_dir)
    if builder is None:
        raise UserError(
            f"{target} is in the way: it is not a prepared dataset. Remove it, "
            "or pass another folder as --config.data.data_dir."
        )
    return builder


def _advice(name: str) -> str:
    """Says how to get a dataset for which tfds needs TensorFlow: all but FashionMNIST."""
    return (
        f"On a machine with TensorFlow, run `tfds build {name} --file_format=array_record "
        "--data_dir=DIR`, copy the folder DIR to this one, and pass --config.data.data_dir=DIR"
    )


def _require_array_record(builder: Any) -> None:
    """Checks that a dataset is in the one file format that can be read without TensorFlow."""
    from tinyvgg_jax.data import prepare

    kind = builder.info.file_format and builder.info.file_format.value
    if kind != "array_record":
        raise UserError(
            f"{builder.data_path} was prepared as {kind}, which only TensorFlow reads. It was left "
            "as it is; pass another folder as --config.data.data_dir"
            + (
                " and it is prepared there."
                if builder.name == prepare.NAME
                else f". {_advice(builder.name)}."
            )
        )


def _describe(builder: Any) -> DatasetInfo:
    """Reads the properties of a dataset, and checks that it has uint8 images of one size."""
    from tinyvgg_jax.data import prepare

    features = builder.info.features
    try:
        image, label = features["image"], features["label"]
        names = _class_names(Path(builder.data_path), label)
        shape = tuple(image.shape)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{builder.name} is not a set of images with one class each: "
            f"{builder.data_path} needs the features `image` and `label`."
        ) from error
    if len(shape) != 3 or None in shape or image.np_dtype != np.uint8:
        raise UserError(
            f"the images of {builder.name} are {image.np_dtype} of shape {shape}; "
            "uint8 [H, W, C] of one size are needed."
        )
    if builder.name == prepare.NAME and (names != prepare.CLASS_NAMES or shape[2] != 1):
        file = "label.labels.txt" if names != prepare.CLASS_NAMES else "features.json"
        raise _damaged(builder.data_path, f"{file} does not describe FashionMNIST")
    source = _recorded_source(Path(builder.data_path)) or {}
    return DatasetInfo(image_shape=shape, class_names=names, fit=source.get("fit", "garment"))


def _recorded_source(folder: Path) -> dict[str, Any] | None:
    """Reads what a dataset was prepared from; None if tfds, or an older version, prepared it."""
    from tinyvgg_jax.data import prepare

    path = folder / prepare.SOURCE
    if not path.exists():
        return None
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{path.name}: {first_line(error)}") from error
    if not isinstance(recorded, dict) or recorded.get("fit", "garment") not in FITS:
        raise _damaged(folder, f"{path.name} does not describe a source")
    return recorded


def _class_names(folder: Path, label: Any) -> tuple[str, ...]:
    """Reads the names of the classes; they are numbers if the dataset has none.

    tfds has read them too, but takes numbers where it cannot, and any number of names.
    """
    path = folder / "label.labels.txt"
    if not path.exists():
        return tuple(label.names)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(folder, f"{path.name}: {first_line(error)}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not len(names) == len(set(names)) == label.num_classes:
        raise _damaged(
            folder, f"{path.name} has {len(set(names))} names of {label.num_classes} classes"
        )
    return names


def _damaged(folder: str | os.PathLike[str], reason: object) -> UserError:
    return UserError(f"{os.fspath(folder)} is damaged ({reason}). Remove it and run again.")
