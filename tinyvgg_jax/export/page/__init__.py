"""Export to a page for the browser that shows a network at work: one file, without a network.

The page is `page.html` with everything in it: the JavaScript modules of this folder, the parameters
and some test images. Nothing is fetched, which its Content-Security-Policy enforces.
"""

import base64
import hashlib
import re
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyvgg_jax.export import card as cards
from tinyvgg_jax.export.card import Card
from tinyvgg_jax.export.layers import Convolution, Layer, layers_of
from tinyvgg_jax.export.verify import LARGEST_DIFFERENCE
from tinyvgg_jax.model import TinyVGG, count_parameters
from tinyvgg_jax.predict import Predictor
from tinyvgg_jax.report.describe import describe_model
from tinyvgg_jax.report.parts import text
from tinyvgg_jax.report.scores import confusion_matrix

_FOLDER = Path(__file__).parent
# Modules in the order of their use. They become one script, so their names must differ.
_MODULES = (
    "network",
    "gradcam",
    "arithmetic",
    "pictures",
    "drawing",
    "inputs",
    "columns",
    "detail",
    "facts",
    "main",
)
_WORKER_MODULES = ("network", "worker")
_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)
# Test images that the page brings: of each class so many that are predicted correctly, and others.
_RIGHT_PER_CLASS, _MOST_RIGHT, _MOST_WRONG = 2, 24, 12
# Networks with more parameters are rounded to 16 bits, if the page is verified all the same. Those
# with fewer make small pages anyway.
_SMALL = 200_000


class SplitPredictions(NamedTuple):
    """A network's predictions on a split.

    Attributes:
        images: `[N, H, W, C]` uint8.
        labels: `[N]` int, true classes.
        probabilities: `[N, num_classes]`, predicted probabilities of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """Predicted classes, `[N]` int."""
        return self.probabilities.argmax(axis=1)


def to_page(
    model: TinyVGG,
    params: Any,
    card: Card,
    tested: SplitPredictions,
    title: str,
    verified_on: SplitPredictions | None = None,
) -> bytes:
    """Exports a network to a page for the browser.

    More than 200,000 parameters are rounded to 16 bits, unless that changes the class of an image
    of `verified_on`, or a probability by more than 0.01.

    Args:
        model: the network; whatever its dtype, the page computes in float32 or more.
        params: its parameters.
        card: what is known about it, as from `make_card`.
        tested: its predictions on a test split.
        title: the page's title.
        verified_on: its predictions on the split that the file is verified on; None for `tested`.

    Returns:
        The bytes of an HTML file.

    Raises:
        ValueError: if the parameters are not those of the network for such images, or not finite;
            or if there are no test images.
    """
    if not len(tested.labels):
        raise ValueError("a page needs images of a test split")
    height, width, channels = card["image_shape"]
    shape = (height, width, channels)
    layers = layers_of(model, params, shape)
    if not all(
        np.isfinite(array).all() for layer in layers for array in (layer.kernel, layer.bias)
    ):
        raise ValueError("its parameters are not finite numbers")
    dtype, tested = _rounded(model, params, tested, verified_on or tested)
    weights = b"".join(_arrays(layer, dtype) for layer in layers)
    chosen = _examples(tested)
    described = _described(model, layers, shape)
    facts = {
        **card,
        "layers": described,
        "bits": 8 * dtype.itemsize,
        "accuracies": {"test": float((tested.predicted == tested.labels).mean())}
        | ({"validation": card["validation_accuracy"]} if "validation_accuracy" in card else {}),
        "confusion": confusion_matrix(
            tested.labels, tested.predicted, len(card["class_names"])
        ).tolist(),
        "examples": [
            {"label": int(tested.labels[i]), "predicted": int(tested.predicted[i])} for i in chosen
        ],
    }
    count = sum(layer["parameters"] for layer in described)
    return _filled(
        title=title,
        facts=f"{count:,} parameters, {facts['accuracies']['test']:.1%} correct on the test split",
        made=f"Made by {card['package']}.",
        card=cards.to_text(facts, weights),
        weights=weights,
        examples=tested.images[chosen].tobytes(),
    )


def _rounded(
    model: TinyVGG, params: Any, tested: SplitPredictions, exact: SplitPredictions
) -> tuple[np.dtype[Any], SplitPredictions]:
    """Rounds a large network to float16, little-endian, if it predicts almost the same of `exact`.

    Returns:
        The dtype, float32 if it is not rounded; and what the network then predicts of `tested`.
    """
    whole, half = np.dtype("<f4"), np.dtype("<f2")
    if count_parameters(params) <= _SMALL:
        return whole, tested
    rounded = jax.tree.map(lambda x: jnp.asarray(x, half).astype(jnp.float32), params)
    if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(rounded)):
        return whole, tested
    names = tuple(map(str, range(model.num_classes)))
    shape = exact.images.shape[1:]
    network = Predictor(model.clone(dtype=jnp.float32, native=False), rounded, shape, names)

    def predict(split: SplitPredictions) -> SplitPredictions:
        return split._replace(probabilities=network.probabilities(split.images, 250))

    found = predict(exact)
    if (found.predicted != exact.predicted).any():
        return whole, tested
    if not np.allclose(found.probabilities, exact.probabilities, rtol=0, atol=LARGEST_DIFFERENCE):
        return whole, tested
    return half, predict(tested)


def _arrays(layer: Layer, dtype: np.dtype[Any]) -> bytes:
    """Serialises a layer's kernel, the weights of each output together, and its bias."""
    order = (3, 0, 1, 2) if isinstance(layer, Convolution) else (1, 0)
    kernel = layer.kernel.transpose(order)
    return kernel.astype(dtype).tobytes() + layer.bias.astype(dtype).tobytes()


def _described(
    model: TinyVGG, layers: list[Layer], shape: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """Describes the layers for `readLayers`, and for the page's table."""
    result = []
    facts = {layer.name: layer for layer in describe_model(model, shape)}
    for layer in layers:
        own = facts[layer.name]
        kind = "convolution" if isinstance(layer, Convolution) else "dense"
        pools = isinstance(layer, Convolution) and layer.pool
        block = layer.name.removeprefix("conv").partition("_")[0]
        result.append(
            {
                "name": layer.name,
                "kind": kind,
                "inputs": layer.kernel.shape[-2],
                "outputs": layer.kernel.shape[-1],
                "pool": f"pool{block}" if pools else None,
                "relu": isinstance(layer, Convolution) or layer.relu,
                "output": list(own.output),
                "parameters": own.parameters,
                "multiply_adds": own.multiply_adds,
            }
        )
    return result


def _examples(tested: SplitPredictions) -> np.ndarray:
    """Chooses images of every class that are predicted correctly, and some that are not."""
    right = tested.predicted == tested.labels
    classes = np.unique(tested.labels)
    of_each = [np.flatnonzero(right & (tested.labels == label)) for label in classes]
    # The first of every class, then the second of every class, and so on.
    turns = [found[turn : turn + 1] for turn in range(_RIGHT_PER_CLASS) for found in of_each]
    correct = np.concatenate(turns)[: max(_MOST_RIGHT, len(classes))]
    wrong = np.flatnonzero(~right)[:_MOST_WRONG]
    first = correct[:1] if len(correct) else wrong[:1]
    # After the first one, right and wrong ones stand among one another.
    return np.concatenate([first, np.setdiff1d(np.concatenate([correct, wrong]), first)])


def _filled(
    *, title: str, facts: str, made: str, card: str, weights: bytes, examples: bytes
) -> bytes:
    """Fills the template; what comes from a run is escaped, since it may be a stranger's."""
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = _script(_MODULES)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src 'sha256-{_sha256(script)}'",
            f"style-src 'sha256-{_sha256(style)}'",
            "img-src data: blob:",
            "media-src blob:",
            "worker-src blob:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    page = Template((_FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=text(title),
        facts=text(facts),
        made=text(made),
        policy=text(policy),
        style=style,
        script=script,
        worker=_script(_WORKER_MODULES),
        # The end of a script is the only markup within it.
        card=card.replace("<", "\\u003c"),
        weights=base64.b64encode(weights).decode(),
        examples=base64.b64encode(examples).decode(),
    )
    return page.encode()


def _script(modules: tuple[str, ...]) -> str:
    """Joins JavaScript modules to one script, in which nothing is imported or exported."""
    texts = [(_FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in modules]
    return "\n".join(_EXPORT.sub("", _IMPORT.sub("", text)) for text in texts)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def read_page(page: str) -> tuple[TinyVGG, dict[str, Any], Card]:
    """Reads the network back from a page, whose parameters may be rounded.

    Args:
        page: the text of a page from `to_page`.

    Returns:
        `(model, params, card)`.

    Raises:
        ValueError: if it is no such page, or does not match its card.
    """
    contents = dict(re.findall(r'<script type="[a-z/]+" id="([a-z-]+)">(.*?)</script>', page, re.S))
    if not {"card", "weights"} <= contents.keys():
        raise ValueError("it is no page of a network")
    weights = base64.b64decode(contents["weights"])
    card = cards.from_text(contents["card"], weights)
    numbers = np.frombuffer(weights, f"<f{card['bits'] // 8}").astype(np.float32)
    params: dict[str, Any] = {}
    start = 0
    for layer in card["layers"]:
        inputs, outputs = layer["inputs"], layer["outputs"]
        window = (3, 3) if layer["kind"] == "convolution" else ()
        count = outputs * inputs * (9 if window else 1)
        kernel = numbers[start : start + count].reshape(outputs, *window, inputs)
        bias = numbers[start + count : start + count + outputs]
        params[layer["name"]] = {"kernel": np.moveaxis(kernel, 0, -1), "bias": bias}
        start += count + outputs
    convolutions = [layer for layer in card["layers"] if layer["kind"] == "convolution"]
    pooled = [layer for layer in convolutions if layer["pool"]]
    model = TinyVGG(
        widths=tuple(layer["outputs"] for layer in pooled),
        convs_per_block=len(convolutions) // len(pooled),
        hidden=card["layers"][-2]["outputs"],
        num_classes=card["layers"][-1]["outputs"],
    )
    return model, params, card
