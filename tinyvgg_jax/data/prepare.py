"""Writing FashionMNIST as a tfds dataset (array_record), without TensorFlow and in one step."""

import contextlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tinyvgg_jax.data import fetch, idx
from tinyvgg_jax.errors import UserError

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

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


def prepare_fashion_mnist(data_dir: Path, source_dir: Path | None) -> None:
    """Writes `data_dir/fashion_mnist/VERSION`, which `tfds.data_source` then reads.

    Args:
        data_dir: tfds's folder of datasets; made if it does not exist.
        source_dir: a folder with four IDX files; None fetches FashionMNIST's.

    Raises:
        UserError: if the files are damaged or cannot be fetched, or if `data_dir` cannot be
            written to.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=data_dir))
    except OSError as error:
        raise UserError(
            f"cannot write to {data_dir} ({error.strerror}); "
            "pass another folder as --config.data.data_dir."
        ) from error
    try:
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
        write_dataset(arrays, NAME, CLASS_NAMES, scratch, data_dir)
    except OSError as error:
        raise UserError(f"cannot prepare {NAME} in {data_dir}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_dataset(
    arrays: Arrays, name: str, class_names: tuple[str, ...], scratch: Path, data_dir: Path
) -> None:
    """Writes arrays as a tfds dataset.

    It is built in `scratch` and moved into place in one step, so that no process ever sees a part
    of it.

    Args:
        arrays: images `[N, H, W]` or `[N, H, W, C]` uint8 and labels `[N]` for each split.
        name: name of the dataset.
        class_names: names of the classes, in the order of their labels.
        scratch: a folder on the file system of `data_dir`.
        data_dir: receives `name/VERSION`. If another process has written that first, it stays.
    """
    builder = _builder(arrays, name, class_names, scratch / "prepared")
    with _quiet():
        builder.download_and_prepare(file_format="array_record")
    built = Path(builder.data_path)
    target = data_dir / name / built.name
    target.parent.mkdir(exist_ok=True)
    try:
        built.rename(target)
    except OSError:
        if not (target / "dataset_info.json").exists():
            raise


def _builder(
    arrays: Arrays, name: str, class_names: tuple[str, ...], data_dir: Path
) -> tfds.core.DatasetBuilder:
    """Makes a tfds builder with the name, version and features of tfds's own, fed from arrays."""
    shape = next(iter(arrays.values()))[0].shape[1:]
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
                return {split: self._generate_examples(split) for split in arrays}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
                for i, (image, label) in enumerate(zip(*arrays[split], strict=True)):
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
