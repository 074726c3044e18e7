"""Exported networks, loaded from their files to classify images."""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.export import card as cards
from tinyvgg_jax.export.card import Card
from tinyvgg_jax.export.onnx import read_card
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.paths import local_path, open_regular
from tinyvgg_jax.step import to_float

# Computes the probabilities `[B, num_classes]` float32 of images `[B, H, W, C]` uint8.
Call = Callable[[np.ndarray], np.ndarray]


class Loaded(NamedTuple):
    """An exported network, with the members of `predict.Classifier`.

    Attributes:
        path: its file.
        card: what the file says about the network.
        call: computes the probabilities of a batch of images.
    """

    path: Path
    card: Card
    call: Call

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of its images."""
        height, width, channels = self.card["image_shape"]
        return height, width, channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its classes, in the order of their labels."""
        return tuple(self.card["class_names"])

    @property
    def fit(self) -> str:
        """How its images were made of pictures, as in `pictures.load_picture`."""
        return str(self.card.get("fit", "garment"))

    def probabilities(self, batch: np.ndarray, size: int) -> np.ndarray:
        """Computes the probabilities of images.

        Args:
            batch: `[B, H, W, C]` uint8.
            size: number of images in a call of the network.

        Returns:
            `[B, num_classes]` float32.
        """
        chunks = [batch[start : start + size] for start in range(0, len(batch), size)]
        empty = np.zeros((0, len(self.class_names)), np.float32)
        return np.concatenate([empty, *map(self.call, chunks)])


def load(path: str | Path, threads: int | None = None) -> Loaded:
    """Loads an exported network.

    Args:
        path: a `.jax`, `.onnx` or `.tflite` file that this package has written.
        threads: number of threads in a call; None leaves it to the library. JAX always does so.

    Returns:
        The network.

    Raises:
        UserError: if there is no such file, if it is damaged, of another kind or of another
            network, or if the library that runs it is missing.
    """
    path = local_path(path)
    loaders = {".jax": _load_stablehlo, ".onnx": _load_onnx, ".tflite": _load_litert}
    loader = loaders.get(path.suffix)
    if loader is None:
        raise UserError(f"{path}: a model to run ends in {', '.join(loaders)}.")
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        with quiet():
            loaded = Loaded(path, *loader(content, threads))
            images = np.zeros((1, *loaded.image_shape), np.uint8)
            shape = loaded.call(images).shape
    except UserError:
        raise
    except Exception as error:
        # Each library raises its own exceptions for a damaged file.
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is no exported network, or is damaged: {what}.") from error
    if shape != (1, len(loaded.class_names)):
        raise UserError(f"{path} is damaged: its card names {len(loaded.class_names)} classes.")
    return loaded


def call_in_jax(model: TinyVGG, params: Any) -> Call:
    """Makes the call of a network that was read back from a file into JAX."""

    def call(images: np.ndarray) -> np.ndarray:
        return np.asarray(jax.nn.softmax(apply(model, params, to_float(jnp.asarray(images)))))

    return call


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what libraries in C++ print on standard error; their exceptions come through.

    What Python writes to `sys.stderr`, like the answer to Ctrl-C, is still seen.
    """
    sys.stderr.flush()
    with (
        Path(os.devnull).open("w") as null,
        os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace") as shown,
        contextlib.redirect_stderr(shown),
        warnings.catch_warnings(action="ignore"),
    ):
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(shown.fileno(), 2)


def require(module: str, extra: str) -> Any:
    """Imports a library of an extra.

    Raises:
        UserError: if it is missing; the message says which extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {module.partition('.')[0]}: pip install 'tinyvgg-jax[{extra}]' ({error})."
        ) from error


def _load_stablehlo(content: bytes, _: int | None) -> tuple[Card, Call]:
    require("flatbuffers", "export")
    import jax.export

    artifact, card = cards.read_appended(content)
    exported = jax.export.deserialize(bytearray(artifact))
    return card, lambda images: np.asarray(exported.call(images))


def _load_onnx(content: bytes, threads: int | None) -> tuple[Card, Call]:
    runtime, onnx = require("onnxruntime", "onnx"), require("onnx", "onnx")
    card = read_card(onnx.load_from_string(content))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Only what is an error, which is raised too.
    options.log_severity_level = 4
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return card, lambda images: session.run(["probabilities"], {"images": images})[0]


def _load_litert(content: bytes, threads: int | None) -> tuple[Card, Call]:
    interpreter_module = require("ai_edge_litert.interpreter", "litert")
    artifact, card = cards.read_appended(content)
    interpreter = interpreter_module.Interpreter(model_content=artifact, num_threads=threads)
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(images: np.ndarray) -> np.ndarray:
        answers = []
        for image in images:
            interpreter.set_tensor(given["index"], litert_input(image[None], given["dtype"]))
            interpreter.invoke()
            answers.append(litert_output(interpreter.get_tensor(made["index"]), made))
        return np.concatenate(answers)

    return card, call


def litert_input(images: np.ndarray, dtype: Any) -> np.ndarray:
    """Converts uint8 images to the input of a `.tflite` file: in [0, 1], or minus 128 in int8."""
    if dtype == np.int8:
        return (images.astype(np.int16) - 128).astype(np.int8)
    return images.astype(np.float32) / 255


def litert_output(output: np.ndarray, details: Any) -> np.ndarray:
    """Converts the output of a `.tflite` file to probabilities."""
    if output.dtype == np.int8:
        scale, zero_point = details["quantization"]
        return (output.astype(np.float32) - zero_point) * np.float32(scale)
    return output
