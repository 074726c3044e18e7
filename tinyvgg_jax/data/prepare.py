"""Writing tfds datasets (array_record), without TensorFlow and in one step."""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tinyvgg_jax.data import fetch, idx
from tinyvgg_jax.data.folder import DEFAULTS, Options, Rows, fingerprint, read_folder
from tinyvgg_jax.errors import UserError, first_line
from tinyvgg_jax.paths import is_folder
from tinyvgg_jax.signals import raised_signals

logger = logging.getLogger(__name__)

NAME = "fashion_mnist"
IMAGE_SHAPE = (28, 28, 1)
# The version of tfds's own FashionMNIST.
DATASET_VERSION = "3.0.1"
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# The specifications of its splits, the paper's.
SPLITS = {"train": "train[:55000]", "validation": "train[55000:]", "test": "test"}
# Beside the dataset's files: what it was prepared from.
SOURCE = "source.json"

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
Examples = Mapping[str, tuple[Rows | np.ndarray, np.ndarray]]


def prepare_fashion_mnist(data_dir: Path, source_dir: Path | None) -> None:
    """Writes `data_dir/fashion_mnist/VERSION`, which `tfds.data_source` then reads.

    Args:
        data_dir: tfds's folder of datasets; made if it does not exist.
        source_dir: a folder with four IDX files; None fetches FashionMNIST's.

    Raises:
        UserError: if the files are damaged or cannot be fetched, or if `data_dir` cannot be
            written to.
    """
    with _scratch(NAME, data_dir) as scratch:
        # The user's own files need not be FashionMNIST's, but fetched ones must be.
        folder = source_dir or fetch.fetch_fashion_mnist(scratch)
        arrays = idx.read_folder(folder)
        unlike = idx.unlike_fashion_mnist(folder)
        if 0 < len(unlike) < len(idx.FILE_NAMES):
            raise UserError(
                f"{folder} is damaged: its {unlike[0]} is not FashionMNIST's, although others of "
                "its files are. Fetch it again."
            )
        if unlike:
            logger.warning("The IDX files in %s are not FashionMNIST's; used as they are.", folder)
        logger.info("Preparing %s in %s ...", NAME, data_dir)
        source = describe_source(folder, DEFAULTS)
        write_dataset(arrays, NAME, CLASS_NAMES, scratch, data_dir, source)


def prepare_own(name: str, data_dir: Path, source_dir: Path, options: Options) -> None:
    """Writes `data_dir/NAME/VERSION` from a folder of pictures, or of IDX files.

    Args:
        name: name of the dataset.
        data_dir: tfds's folder of datasets; made if it does not exist.
        source_dir: see `folder.read_folder` and `idx.read_any`.
        options: how pictures become images of one size; IDX files have their own.

    Raises:
        UserError: if the folder is not right, or `data_dir` cannot be written to.
    """
    with _scratch(name, data_dir) as scratch:
        examples: Examples
        if idx.is_idx_folder(source_dir):
            class_names, examples = idx.read_any(source_dir)
        else:
            class_names, examples = read_folder(source_dir, options, scratch)
        sizes = ", ".join(f"{len(labels):,} {split}" for split, (_, labels) in examples.items())
        classes = ", ".join([*class_names[:10], *(["..."] if len(class_names) > 10 else [])])
        number = len(class_names)
        logger.info(
            "Preparing %s in %s: %d classes (%s), %s ...", name, data_dir, number, classes, sizes
        )
        source = describe_source(source_dir, options)
        write_dataset(examples, name, class_names, scratch, data_dir, source)


def check_name(name: str, source_dir: Path) -> None:
    """Checks that what is in a folder can be prepared under a name.

    Raises:
        UserError: if it cannot.
    """
    if name == NAME:
        if is_folder(source_dir) and not idx.is_idx_folder(source_dir):
            raise UserError(
                f"{source_dir} holds no IDX files of FashionMNIST. To train on a folder of "
                "pictures, give it a name of its own: --config.data.name=NAME."
            )
    elif not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", name):
        raise UserError(
            "config.data.name must be a small letter and then at most 99 small letters, digits and "
            f"_ to name a new dataset, not {name!r}."
        )


def describe_source(source_dir: Path, options: Options) -> dict[str, Any]:
    """Describes what a dataset is prepared from, so that another source is recognised.

    Returns:
        `content`, a hash; for pictures `fit`, and for IDX files `classes`, a hash of the file that
        names them, if there is one; JSON-serialisable.

    Raises:
        UserError: if the folder cannot be read.
    """
    if idx.is_idx_folder(source_dir):
        names = idx.class_names_sha256(source_dir)
        return {"content": idx.content_sha256(source_dir)} | ({"classes": names} if names else {})
    return {"content": fingerprint(source_dir), "fit": options.fit or "crop"}


@contextlib.contextmanager
def _scratch(name: str, data_dir: Path) -> Iterator[Path]:
    """Provides a scratch folder in `data_dir`, and says what failed in one line."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=data_dir))
    except OSError as error:
        raise UserError(
            f"cannot write to {data_dir} ({error.strerror}); "
            "pass another folder as --config.data.data_dir."
        ) from error
    try:
        # SIGTERM would leave the scratch folder, in which all pictures may lie.
        with raised_signals("nothing was prepared.", (signal.SIGTERM,)):
            yield scratch
    except OSError as error:
        raise UserError(f"cannot prepare {name} in {data_dir}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_dataset(
    examples: Examples,
    name: str,
    class_names: tuple[str, ...],
    scratch: Path,
    data_dir: Path,
    source: dict[str, Any] | None = None,
) -> None:
    """Writes examples as a tfds dataset.

    It is built in `scratch` and moved into place in one step, so that no process ever sees a part
    of it.

    Args:
        examples: images `[N, H, W]` or `[N, H, W, C]` uint8 and labels `[N]` for each split.
        name: name of the dataset.
        class_names: names of the classes, in the order of their labels.
        scratch: a folder on the file system of `data_dir`.
        data_dir: receives `name/VERSION`. If another process has written that first, it stays.
        source: what is kept of the source, JSON-serialisable; None for nothing.
    """
    builder = _builder(examples, name, class_names, scratch / "prepared")
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record")
    except RuntimeError as error:
        # The writer of array_record raises no OSError, for example where the disk is full.
        raise UserError(f"cannot prepare {name} in {data_dir}: {first_line(error)}") from error
    built = Path(builder.data_path)
    if source is not None:
        (built / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    target = data_dir / name / built.name
    target.parent.mkdir(exist_ok=True)
    try:
        built.rename(target)
    except OSError:
        if not (target / "dataset_info.json").exists():
            raise


def _builder(
    examples: Examples, name: str, class_names: tuple[str, ...], data_dir: Path
) -> tfds.core.DatasetBuilder:
    """Makes a tfds builder with the name, version and features of tfds's own, fed from arrays."""
    shape = next(iter(examples.values()))[0].shape[1:]
    shape = shape if len(shape) == 3 else (*shape, 1)

    class Info(tfds.core.DatasetInfo):
        def initialize_from_bucket(self) -> None:
            """Skips tfds's search for a description of the dataset in its bucket.

            The description is given below, and the search leaves an empty temporary folder behind.
            """

    # tfds registers each builder class by its name, and would refuse the class of a second call.
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(DATASET_VERSION)

            def _info(self) -> tfds.core.DatasetInfo:
                features = {
                    "image": tfds.features.Image(shape=shape),
                    "label": tfds.features.ClassLabel(names=list(class_names)),
                }
                return Info(
                    builder=self,
                    description="Images and their classes, prepared without TensorFlow.",
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(split) for split in examples}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
                for i, (image, label) in enumerate(zip(*examples[split], strict=True)):
                    png = io.BytesIO()
                    Image.fromarray(image.squeeze()).save(png, "png", compress_level=1)
                    png.seek(0)
                    yield i, {"image": png, "label": int(label)}

    Builder.name = name
    return Builder(data_dir=os.fspath(data_dir))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences tfds, which draws five progress bars and prints to standard output.

    Standard output is kept for results, which other programs may read.
    """
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
