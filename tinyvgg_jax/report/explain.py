"""Explanation of a prediction: the feature maps of each block, and Grad-CAM."""

import dataclasses
import hashlib
import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.ops.pooling import max_pool_2x2
from tinyvgg_jax.paths import local_path, open_regular, status_of
from tinyvgg_jax.pictures import load_picture, quiet_pillow
from tinyvgg_jax.predict import Predictor, load_predictor
from tinyvgg_jax.report.plots import png, short
from tinyvgg_jax.runs.files import output_file, subfolder, write_bytes
from tinyvgg_jax.step import to_float

# Columns of a grid of feature maps; blocks of more than 128 features get twice as many.
_COLUMNS = 16


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Feature maps and Grad-CAM of one image.

    Attributes:
        image: the network's input, `[H, W, C]` uint8.
        probabilities: `[num_classes]` float32.
        feature_maps: output of each block, after its pooling: block i, counted from 1, has
            `[H // 2**i, W // 2**i, features]` float32.
        saliency: Grad-CAM of the predicted class at the last convolution, `[h, w]` float32 in
            [0, 1].
    """

    image: np.ndarray
    probabilities: np.ndarray
    feature_maps: list[np.ndarray]
    saliency: np.ndarray


def explain(predictor: Predictor, image: np.ndarray) -> Explanation:
    """Computes the probabilities, feature maps and Grad-CAM of one image.

    Args:
        predictor: the network.
        image: `[H, W, C]` uint8, of the shape `predictor.image_shape`.

    Returns:
        The explanation.
    """
    probabilities, maps, saliency = jax.device_get(
        _explain(predictor.model, predictor.params, jnp.asarray(image))
    )
    return Explanation(image, probabilities, maps, saliency)


@partial(jax.jit, static_argnums=0)
def _explain(model: TinyVGG, params: Any, image: Array) -> tuple[Array, list[Array], Array]:
    """Computes the probabilities, the pooled feature maps of each block, and Grad-CAM."""
    variables = {"params": params}
    activations = cast(
        list[Array], model.apply(variables, to_float(image)[None], method="activations")
    )

    # The network is split after its last convolution, because Grad-CAM needs the gradient of a
    # logit with respect to that convolution's output.
    def classify(last: Array) -> Array:
        return cast(Array, model.apply(variables, last, method="classify"))[0]

    logits = classify(activations[-1])
    label = logits.argmax()
    gradient = jax.grad(lambda last: classify(last)[label])(activations[-1])
    pooled = [max_pool_2x2(a)[0].astype(jnp.float32) for a in activations]
    return jax.nn.softmax(logits), pooled, grad_cam(activations[-1][0], gradient[0])


def grad_cam(activations: Array, gradient: Array) -> Array:
    """Computes Grad-CAM (Selvaraju et al., arXiv:1610.02391).

    With activations A and the gradient G of a class's logit with respect to them, it is

        relu(sum over features k of w_k * A[:, :, k]),  w_k = mean over i, j of G[i, j, k]

    Args:
        activations: output of a convolution, `[H, W, features]`.
        gradient: gradient of the class's logit with respect to `activations`, of the same shape.

    Returns:
        `[H, W]` float32, divided by its maximum; 0 everywhere if no position is positive.
    """
    weights = gradient.astype(jnp.float32).mean(axis=(0, 1))
    saliency = jax.nn.relu(activations.astype(jnp.float32) @ weights)
    highest = saliency.max()
    return jnp.where(highest > 0, saliency / jnp.where(highest > 0, highest, 1), 0)


def explain_file(
    workdir: str | Path,
    path: str | Path,
    output: str | Path | None = None,
    invert: str = "auto",
    step: int | str = "best",
) -> Path:
    """Draws the feature maps and Grad-CAM of a picture file.

    Args:
        workdir: the run's folder.
        path: the picture file.
        output: the PNG to write; by default `explain/NAME.png` in the run's folder, NAME being the
            picture's without its suffix. Where another image is explained in a file of that name
            already, it is `NAME-2.png` and so on.
        invert: "auto", "yes" or "no", as in `pictures.load_picture`.
        step: as in `restore`.

    Returns:
        The path of the PNG.

    Raises:
        UserError: if there is no such run or picture, or the file cannot be written.
    """
    workdir, path = local_path(workdir), local_path(path)
    target = output_file(output) if output else None
    if target and status_of(path) and status_of(target) and target.samefile(path):
        raise UserError(f"{path} is the picture itself; name another file for its explanation.")
    predictor = load_predictor(workdir, step)
    with quiet_pillow():
        picture = load_picture(path, predictor.image_shape, invert, fit=predictor.fit)
    explanation = explain(predictor, picture.pixels)
    source = hashlib.sha256(picture.pixels.tobytes()).hexdigest()
    if target is None:
        target = _free_name(subfolder(workdir, "explain"), path.stem, source)
    figure = draw(explanation, predictor.class_names)
    write_bytes(target, png(figure, dpi=100, metadata={"Source": source}))
    return target


def _free_name(folder: Path, stem: str, source: str) -> Path:
    """Finds the first of `STEM.png`, `STEM-2.png` and so on that an explanation may take.

    Args:
        folder: the folder of the run's explanations.
        stem: the name of the picture, without its suffix.
        source: what identifies the explained image, whose own earlier explanation is replaced.

    Returns:
        The path.
    """
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for n in names if _is_free(path := folder / f"{n}.png", source))


def _is_free(path: Path, source: str) -> bool:
    """Checks that there is no file of that name, or an explanation of the same image."""
    if not os.path.lexists(path):
        return True
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return bool(image.info.get("Source") == source)
    except Exception:  # It is something else, and Pillow may raise anything.
        return False


# A dollar sign in a class name does not begin a formula.
@matplotlib.rc_context({"text.parse_math": False})
def draw(explanation: Explanation, class_names: tuple[str, ...]) -> Figure:
    """Draws an explanation as one figure.

    Args:
        explanation: the explanation.
        class_names: the names of all classes.

    Returns:
        A figure with the input, Grad-CAM and the most probable classes in the first row, and the
        feature maps of one block in each of the other rows.
    """
    grids = [_grid(maps) for maps in explanation.feature_maps]
    width = 12.0
    heights = [3.4] + [0.5 + (width - 0.4) * g.shape[0] / g.shape[1] for g in grids]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained", facecolor="white")
    subfigures = cast(list[SubFigure], figure.subfigures(len(heights), 1, height_ratios=heights))
    _draw_prediction(subfigures[0], explanation, class_names)
    for block, (subfigure, grid, maps) in enumerate(
        zip(subfigures[1:], grids, explanation.feature_maps, strict=True), start=1
    ):
        axes = subfigure.subplots()
        axes.imshow(grid, cmap="magma", vmin=0, interpolation="nearest")
        axes.set_axis_off()
        H, W, features = maps.shape
        zero = int((maps.max(axis=(0, 1)) <= 0).sum())
        axes.set_title(
            f"Feature maps of block {block}: {features} of {H}x{W} pixels, {zero} all zero",
            loc="left",
            fontsize=11,
        )
    return figure


def _draw_prediction(
    subfigure: SubFigure, explanation: Explanation, class_names: tuple[str, ...]
) -> None:
    """Draws the input, Grad-CAM over the input, and the most probable classes."""
    network_input, heat_map, bars = subfigure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    image = explanation.image[..., 0] if explanation.image.shape[2] == 1 else explanation.image
    H, W = image.shape[:2]
    for axes, title in ((network_input, "Input"), (heat_map, "Grad-CAM")):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, W, H, 0))
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    # Pooling leaves out the last row and column of an odd size, so the map may cover less.
    pixels = 2 ** (len(explanation.feature_maps) - 1)
    h, w = explanation.saliency.shape
    heat_map.imshow(
        explanation.saliency,
        cmap="inferno",
        alpha=0.6,
        vmin=0,
        vmax=1,
        extent=(0, w * pixels, h * pixels, 0),
        interpolation="bilinear",
    )
    heat_map.set(xlim=(0, W), ylim=(H, 0))
    order = np.argsort(-explanation.probabilities)[: min(6, len(class_names))]
    probabilities = explanation.probabilities[order]
    bars.barh(range(len(order)), probabilities, color=["#b5451c"] + ["#c9c4bc"] * (len(order) - 1))
    for row, probability in enumerate(probabilities):
        bars.text(probability + 0.01, row, f"{probability:.1%}", va="center", fontsize=10)
    bars.set_yticks(range(len(order)), [short(class_names[label]) for label in order])
    bars.set(xlim=(0, 1.15), ylim=(len(order) - 0.4, -0.6))
    bars.set_title("Prediction", fontsize=11)
    bars.tick_params(left=False, bottom=False, labelbottom=False)
    bars.spines[:].set_visible(False)


def _grid(maps: np.ndarray) -> np.ndarray:
    """Arranges the feature maps of a block in a grid, each divided by its own maximum.

    Args:
        maps: `[H, W, features]`.

    Returns:
        A grey image with NaN, which is drawn as white, between the maps.
    """
    H, W, features = maps.shape
    columns = min(_COLUMNS * (2 if features > 128 else 1), features)
    rows = -(-features // columns)
    gap = max(1, H // 7)
    grid = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap), np.nan)
    for index in range(features):
        top, left = index // columns * (H + gap), index % columns * (W + gap)
        one = maps[..., index]
        grid[top : top + H, left : left + W] = one / max(one.max(), 1e-12)
    return grid
