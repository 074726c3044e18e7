"""Prediction of the classes of images and of picture files by a trained network."""

import collections
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from tinyvgg_jax.devices import (
    REPLICATED,
    SPLIT,
    find_mesh,
    num_devices,
    on_each,
    put,
    replicate,
)
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.model import TinyVGG, apply, cast_params
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.pictures import Picture, find_all, load_picture, quiet_pillow
from tinyvgg_jax.runs.folder import read_dataset
from tinyvgg_jax.runs.restore import restore
from tinyvgg_jax.step import to_float
from tinyvgg_jax.system import MemoryBudget, available_memory

# Images in a call of the network. The last call is padded, so that one program serves any number.
_CHUNK = 64
# Pictures that are decoded ahead of the network; a bound, so that a million do not fill the memory.
_AHEAD = 8 * _CHUNK
# Bytes that all pictures under way may take at most, however much memory is available. Three of 100
# megapixels fit in it whatever their format, and eighty photos of 12 megapixels in JPEG.
_MOST_MEMORY = 8 * 2**30


class Predictions(NamedTuple):
    """Predictions for B images.

    Attributes:
        labels: `[B]` int, the most probable class of each image.
        probabilities: `[B, num_classes]` float32.
        class_names: names of the classes, in the order of their labels.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained network that predicts the classes of images.

    For each dtype of images it compiles at most twice: for a single one and for any larger number.

    Attributes:
        model: the network.
        params: its parameters.
        image_shape: `(H, W, C)` of its images.
        class_names: names of its classes, in the order of their labels.
        fit: how its images were made of pictures, as in `pictures.load_picture`.
    """

    model: TinyVGG
    params: Any
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fit: str = "garment"

    def __call__(self, images: ArrayLike) -> Predictions:
        """Predicts the classes of images that look like the dataset's.

        Args:
            images: `[H, W]`, `[H, W, C]`, `[B, H, W]` (where C is 1) or `[B, H, W, C]`; whole
                numbers from 0 to 255 of any dtype, or floating or bool in [0, 1]. For photos, see
                `tinyvgg_jax.pictures.load_picture`.

        Returns:
            The predictions; B is 1 for a single image.

        Raises:
            ValueError: if the images have another shape, dtype or range.
        """
        batch = _pixels(self._batch(np.asarray(images)))
        probabilities = self.probabilities(batch, 1 if len(batch) == 1 else _CHUNK)
        return Predictions(probabilities.argmax(axis=1), probabilities, self.class_names)

    def probabilities(self, batch: np.ndarray, size: int) -> np.ndarray:
        """Computes the probabilities of images that have been checked.

        Args:
            batch: `[B, H, W, C]` uint8, or float32 in [0, 1].
            size: number of images in a call of the network; the last call is padded.

        Returns:
            `[B, num_classes]` float32.
        """
        # A single image is not worth being sent to another device. Each of several processes
        # predicts its own images.
        mesh = find_mesh() if size > 1 and jax.process_count() == 1 else None
        size = math.ceil(size / num_devices(mesh)) * num_devices(mesh)
        params = replicate(self._cast_params, mesh)
        chunks = [batch[start : start + size] for start in range(0, len(batch), size)]
        answers = [
            _probabilities(self.model, mesh, params, put(padded(c, size), mesh, SPLIT))
            for c in chunks
        ]
        rows = [np.asarray(a)[: len(c)] for a, c in zip(answers, chunks, strict=True)]
        empty = np.zeros((0, len(self.class_names)), np.float32)
        return np.concatenate([empty, *rows])

    @functools.cached_property
    def _cast_params(self) -> Any:
        return cast_params(self.model, self.params)

    def _batch(self, images: np.ndarray) -> np.ndarray:
        """Adds the axes that were left out, and checks the shape: `[B, H, W, C]`."""
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
    """Checks dtype and range, and converts integers to uint8 and everything else to float32."""
    # JAX's test is used because NumPy does not count bfloat16 among the floating types.
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


def padded(images: np.ndarray, size: int) -> np.ndarray:
    """Appends images of zeros until there are `size`."""
    return np.concatenate(
        [images, np.zeros_like(images, shape=(size - len(images), *images.shape[1:]))]
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probabilities(model: TinyVGG, mesh: Mesh | None, params: Any, images: Array) -> Array:
    def own(params: Any, images: Array) -> Array:
        floats = to_float(images) if images.dtype == jnp.uint8 else images
        # The fast convolutions restrict which derivatives exist, but no gradient is taken here.
        return jax.nn.softmax(apply(model.clone(native=True), params, floats))

    return on_each(own, mesh, (REPLICATED, SPLIT), SPLIT)(params, images)


def load_predictor(workdir: str | Path, step: int | str = "best") -> Predictor:
    """Restores a trained network for predictions, without its dataset.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        step: the checkpoint: "best", by validation accuracy, "latest", or a number of steps.

    Returns:
        The predictor.

    Raises:
        UserError: if there is no such run or checkpoint, or none that is intact; see `restore`.
    """
    model, params = restore(workdir, step)
    info = read_dataset(local_path(workdir))
    return Predictor(model, params, info.image_shape, info.class_names, info.fit)


class Classifier(Protocol):
    """A network that `predict_files` can use, like a `Predictor`, whose members these are."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def fit(self) -> str: ...

    def probabilities(self, batch: np.ndarray, size: int) -> np.ndarray: ...


class FilePrediction(NamedTuple):
    """Prediction for a picture file.

    Attributes:
        path: the file.
        inverted: whether the picture was inverted, because its garment was dark.
        probabilities: `[num_classes]` float32.
    """

    path: Path
    inverted: bool
    probabilities: np.ndarray

    def to_json(self, class_names: tuple[str, ...]) -> dict[str, Any]:
        """Converts to a JSON object: the file, its two most probable classes, and `inverted`."""
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
    predictor: Classifier, paths: Iterable[str | Path], invert: str = "auto"
) -> Iterator[FilePrediction | UserError]:
    """Predicts the classes of picture files; it decodes files while the network runs.

    Args:
        predictor: the network.
        paths: files, and folders, which are searched for pictures with their subfolders. The number
            of other files in a folder is logged.
        invert: "auto", "yes" or "no", as in `pictures.load_picture`.

    Yields:
        The prediction for each file, in order, or the error that says what is wrong with it.
    """
    budget = MemoryBudget(min(_MOST_MEMORY, available_memory() // 2))
    read = functools.partial(
        _read,
        image_shape=predictor.image_shape,
        invert=invert,
        reserve=budget.take,
        fit=predictor.fit,
    )
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with quiet_pillow():
            decoded = _ahead(pool, read, find_all(paths))
            # A single picture compiles the program for one image, which is faster. The first chunk
            # decides, so that a last chunk of one picture compiles no second program.
            size = 0
            while chunk := list(itertools.islice(decoded, _CHUNK)):
                size = size or (1 if len(chunk) == 1 else _CHUNK)
                yield from _predict_chunk(predictor, chunk, size)
    finally:
        # After Ctrl-C, or when the caller has seen enough, no other file is read, and those under
        # way are not waited for.
        budget.close()
        pool.shutdown(wait=False, cancel_futures=True)


Decoded = tuple[Path, Picture | UserError]


def _read(path: Path, **options: Any) -> Picture | UserError:
    """Reads a picture file; an error is returned, so that the other files are still predicted."""
    try:
        return load_picture(path, **options)
    except UserError as error:
        # The error that was raised refers to the frames that it passed, and they to the pixels.
        return UserError(str(error))


def _ahead(
    pool: ThreadPoolExecutor, read: Any, paths: Iterator[Path | UserError]
) -> Iterator[Decoded]:
    """Reads files in threads, at most `_AHEAD` of them before they are asked for."""
    waiting: collections.deque[tuple[Path, Future[Picture | UserError] | UserError]]
    waiting = collections.deque()
    for path in paths:
        if isinstance(path, UserError):
            waiting.append((Path(), path))
        else:
            waiting.append((path, pool.submit(read, path)))
        if len(waiting) > _AHEAD:
            yield _result(*waiting.popleft())
    while waiting:
        yield _result(*waiting.popleft())


def _result(path: Path, reading: Future[Picture | UserError] | UserError) -> Decoded:
    """Waits for a picture or its error."""
    return path, reading if isinstance(reading, UserError) else reading.result()


def _predict_chunk(
    predictor: Classifier, chunk: list[Decoded], size: int
) -> Iterator[FilePrediction | UserError]:
    """Predicts the pictures of a chunk in one call, and yields its errors at their places."""
    pictures = [picture for _, picture in chunk if isinstance(picture, Picture)]
    if pictures:
        pixels = np.stack([picture.pixels for picture in pictures])
        rows = iter(predictor.probabilities(pixels, size))
    for path, picture in chunk:
        if isinstance(picture, Picture):
            yield FilePrediction(path, picture.inverted, next(rows))
        else:
            yield picture
