"""Classes of images and of picture files, from a trained run."""

import collections
import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from PIL import Image

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.pictures import Picture, find_all, load_picture
from tinyvgg_jax.runs.restore import restore, run_info
from tinyvgg_jax.step import to_float

# Images at a time; the last are padded, so that one program serves any number.
_CHUNK = 64
# Pictures decoded ahead of the network, so that a million files do not fill the memory.
_AHEAD = 8 * _CHUNK


class Predictions(NamedTuple):
    """What a network takes B images for.

    Attributes:
        labels: `[B]` int, the most probable class of each.
        probabilities: `[B, num_classes]` float32.
        class_names: of the classes, in the order of their labels.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained network, called with images.

    It compiles twice at most, once for a single image and once for any larger number.

    Attributes:
        model: the network.
        params: its parameters.
        image_shape: `(H, W, C)` of its images.
        class_names: of its classes.
    """

    model: TinyVGG
    params: Any
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    def __call__(self, images: ArrayLike) -> Predictions:
        """Predicts the classes of images that look like the dataset's.

        Args:
            images: `[H, W]`, `[H, W, C]`, `[B, H, W]` (where C is 1) or `[B, H, W, C]`; whole
                numbers from 0 to 255 of any dtype, or floating or bool in [0, 1]. For photos, see
                `tinyvgg_jax.pictures.load_picture`.

        Returns:
            The predictions; B is 1 for a single image.

        Raises:
            ValueError: if the shape, dtype or range is another.
        """
        batch = _pixels(self._batch(np.asarray(images)))
        probabilities = self.probabilities(batch, 1 if len(batch) == 1 else _CHUNK)
        return Predictions(probabilities.argmax(axis=1), probabilities, self.class_names)

    def probabilities(self, batch: np.ndarray, size: int) -> np.ndarray:
        """`[B, num_classes]` float32 of a checked batch, so many images at a time."""
        chunks = [batch[start : start + size] for start in range(0, len(batch), size)]
        answers = [_probabilities(self.model, self.params, _padded(c, size)) for c in chunks]
        rows = [np.asarray(a)[: len(c)] for a, c in zip(answers, chunks, strict=True)]
        empty = np.zeros((0, len(self.class_names)), np.float32)
        return np.concatenate([empty, *rows])

    def _batch(self, images: np.ndarray) -> np.ndarray:
        """Adds the axes that may be left out: `[B, H, W, C]`."""
        H, W, C = self.image_shape
        given = images.shape
        if C == 1 and given[-2:] == (H, W) and images.ndim in (2, 3):
            images = images[..., None]
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must be [{H}, {W}, {C}] or [B, {H}, {W}, {C}]"
                + (f", or without the last axis [{H}, {W}] or [B, {H}, {W}]" if C == 1 else "")
                + f", not of shape {list(given)}; tinyvgg_jax.pictures.load_picture resizes."
            )
        return images


def _pixels(images: np.ndarray) -> np.ndarray:
    """Checks dtype and range, and gives uint8 for whole numbers and float32 for all others."""
    # NumPy does not count bfloat16 among the floating types, JAX does.
    if images.dtype == bool or jnp.issubdtype(images.dtype, jnp.floating):
        images = images.astype(np.float32)
        if not ((images >= 0) & (images <= 1)).all():
            raise ValueError("floating images must be in [0, 1]; pass integers for 0 to 255.")
        return images
    if not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"images must be integers, floating or bool, not {images.dtype}.")
    if not ((images >= 0) & (images <= 255)).all():
        raise ValueError("integer images must be in 0 to 255; pass floats for [0, 1].")
    return images.astype(np.uint8)


def _padded(images: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate(
        [images, np.zeros_like(images, shape=(size - len(images), *images.shape[1:]))]
    )


@partial(jax.jit, static_argnums=0)
def _probabilities(model: TinyVGG, params: Any, images: Array) -> Array:
    floats = to_float(images) if images.dtype == jnp.uint8 else images
    # No gradient is taken here.
    return jax.nn.softmax(apply(model.clone(native=True), params, floats))


def load_predictor(workdir: str | Path, step: int | str = "best") -> Predictor:
    """Restores a trained network for predictions; needs no dataset.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        step: as in `restore`.

    Returns:
        The predictor.

    Raises:
        UserError: as `restore`.
    """
    model, params = restore(workdir, step)
    info = run_info(local_path(workdir))
    return Predictor(model, params, info.image_shape, info.class_names)


class FilePrediction(NamedTuple):
    """What a network takes a picture file for.

    Attributes:
        path: the file.
        inverted: whether dark was made light.
        probabilities: `[num_classes]` float32.
    """

    path: Path
    inverted: bool
    probabilities: np.ndarray

    def to_json(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """`file`, `class`, `probability`, `second_class`, `second_probability`, `inverted`."""
        first, *others = np.argsort(-self.probabilities, kind="stable")
        return {
            "file": str(self.path),
            "class": class_names[first],
            "probability": float(self.probabilities[first]),
            "second_class": class_names[others[0]] if others else None,
            "second_probability": float(self.probabilities[others[0]]) if others else None,
            "inverted": self.inverted,
        }


def predict_files(
    predictor: Predictor, paths: Iterable[str | Path], invert: str = "auto"
) -> Iterator[FilePrediction | UserError]:
    """Predicts picture files while others are being decoded.

    Args:
        predictor: the network.
        paths: files and folders, whose pictures are taken, in subfolders too; how many other files
            a folder holds is logged.
        invert: "auto", "yes" or "no", as in `pictures.normalise`.

    Yields:
        For each file, in order, its prediction, or what is wrong with it.
    """
    read = partial(load_picture, image_shape=predictor.image_shape, invert=invert)
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        # Pillow warns of large pictures; `load_picture` has a limit of its own.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        decoded = _ahead(pool, read, find_all(paths))
        size = 0
        while chunk := list(itertools.islice(decoded, _CHUNK)):
            size = size or (1 if len(chunk) == 1 else _CHUNK)
            yield from _predict_chunk(predictor, chunk, size)


Decoded = tuple[Path, Picture | UserError]


def _ahead(
    pool: ThreadPoolExecutor, read: Any, paths: Iterator[Path | UserError]
) -> Iterator[Decoded]:
    """Reads files in threads, some ahead of those that are asked for."""
    waiting: collections.deque[tuple[Path, Future[Picture] | UserError]] = collections.deque()
    for path in paths:
        if isinstance(path, UserError):
            waiting.append((Path(), path))
        else:
            waiting.append((path, pool.submit(read, path)))
        if len(waiting) > _AHEAD:
            yield _result(*waiting.popleft())
    while waiting:
        yield _result(*waiting.popleft())


def _result(path: Path, reading: Future[Picture] | UserError) -> Decoded:
    if isinstance(reading, UserError):
        return path, reading
    try:
        return path, reading.result()
    except UserError as error:
        return path, error


def _predict_chunk(
    predictor: Predictor, chunk: list[Decoded], size: int
) -> Iterator[FilePrediction | UserError]:
    pictures = [picture for _, picture in chunk if isinstance(picture, Picture)]
    if pictures:
        pixels = np.stack([picture.pixels for picture in pictures])
        rows = iter(predictor.probabilities(pixels, size))
    for path, picture in chunk:
        if isinstance(picture, Picture):
            yield FilePrediction(path, picture.inverted, next(rows))
        else:
            yield picture
