"""How a network sees one image: the feature maps of every block, and where it looked."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure, SubFigure

from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.ops.pooling import max_pool_2x2
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.pictures import load_picture
from tinyvgg_jax.predict import Predictor, load_predictor
from tinyvgg_jax.runs.folder import writing_to
from tinyvgg_jax.step import to_float

_COLUMNS_OF_MAPS = 16


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What happens to an image on its way through a network.

    Attributes:
        image: `[H, W, C]` uint8, as the network sees it.
        probabilities: `[num_classes]` float32.
        feature_maps: of each block, after its pooling, `[H, W, features]` float32.
        saliency: `[h, w]` float32, Grad-CAM of the most probable class at the last convolution,
            from 0 to 1.
    """

    image: np.ndarray
    probabilities: np.ndarray
    feature_maps: list[np.ndarray]
    saliency: np.ndarray


def explain(predictor: Predictor, image: np.ndarray) -> Explanation:
    """Runs one image through a network and keeps what is on the way.

    Args:
        predictor: the network.
        image: `[H, W, C]` uint8, of its size.

    Returns:
        The explanation.
    """
    probabilities, maps, saliency = jax.device_get(
        _explain(predictor.model, predictor.params, jnp.asarray(image))
    )
    return Explanation(image, probabilities, maps, saliency)


@partial(jax.jit, static_argnums=0)
def _explain(model: TinyVGG, params: Any, image: Array) -> tuple[Array, list[Array], Array]:
    variables = {"params": params}
    activations = cast(
        list[Array], model.apply(variables, to_float(image)[None], method="activations")
    )

    def classify(last: Array) -> Array:
        return cast(Array, model.apply(variables, last, method="classify"))[0]

    logits = classify(activations[-1])
    label = logits.argmax()
    gradient = jax.grad(lambda last: classify(last)[label])(activations[-1])
    pooled = [max_pool_2x2(a)[0].astype(jnp.float32) for a in activations]
    return jax.nn.softmax(logits), pooled, grad_cam(activations[-1][0], gradient[0])


def grad_cam(activations: Array, gradient: Array) -> Array:
    """Where a class is seen: Grad-CAM (Selvaraju et al., arXiv:1610.02391).

    Args:
        activations: `[H, W, features]` of a convolution.
        gradient: likewise, of the class's logit with respect to them.

    Returns:
        `[H, W]` float32: the features, weighted by their mean gradients, where positive; 1 at the
        highest, or 0 everywhere.
    """
    weights = gradient.astype(jnp.float32).mean(axis=(0, 1))
    saliency = jax.nn.relu(activations.astype(jnp.float32) @ weights)
    top = saliency.max()
    return jnp.where(top > 0, saliency / jnp.where(top > 0, top, 1), 0)


def explain_file(
    workdir: str | Path,
    path: str | Path,
    output: str | Path | None = None,
    invert: str = "auto",
    step: int | str = "best",
) -> Path:
    """Draws how a run's network sees one picture file.

    Args:
        workdir: the run's folder.
        path: the picture.
        output: the PNG to write; by default `explain/NAME.png` in the run's folder.
        invert: "auto", "yes" or "no", as in `pictures.normalise`.
        step: as in `restore`.

    Returns:
        The file that was written.

    Raises:
        UserError: if there is no such run or picture, or the file cannot be written.
    """
    workdir, path = local_path(workdir), local_path(path)
    predictor = load_predictor(workdir, step)
    picture = load_picture(path, predictor.image_shape, invert)
    explanation = explain(predictor, picture.pixels)
    target = local_path(output) if output else workdir / "explain" / f"{path.stem}.png"
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        figure = draw(explanation, predictor.class_names)
        figure.savefig(target, format="png", dpi=100)
    return target


def draw(explanation: Explanation, class_names: tuple[str, ...]) -> Figure:
    """One figure: the image, where the network looked, its probabilities, all feature maps."""
    grids = [_grid(maps) for maps in explanation.feature_maps]
    width = 12.0
    heights = [3.4] + [0.5 + (width - 0.4) * g.shape[0] / g.shape[1] for g in grids]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained", facecolor="white")
    rooms = cast(list[SubFigure], figure.subfigures(len(heights), 1, height_ratios=heights))
    _draw_answer(rooms[0], explanation, class_names)
    for block, (room, grid, maps) in enumerate(
        zip(rooms[1:], grids, explanation.feature_maps, strict=True), start=1
    ):
        axes = room.subplots()
        axes.imshow(grid, cmap="magma", vmin=0, interpolation="nearest")
        axes.set_axis_off()
        H, W, features = maps.shape
        silent = int((maps.max(axis=(0, 1)) <= 0).sum())
        axes.set_title(
            f"Block {block}: {features} feature maps of {H}x{W}, {silent} silent",
            loc="left",
            fontsize=11,
        )
    return figure


def _draw_answer(room: SubFigure, explanation: Explanation, class_names: tuple[str, ...]) -> None:
    seen, looked, bars = room.subplots(1, 3, width_ratios=(1, 1, 1.6))
    image = explanation.image[..., 0] if explanation.image.shape[2] == 1 else explanation.image
    H, W = image.shape[:2]
    for axes, title in ((seen, "What the network gets"), (looked, "Where it looked (Grad-CAM)")):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, W, H, 0))
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    looked.imshow(
        explanation.saliency,
        cmap="inferno",
        alpha=0.6,
        extent=(0, W, H, 0),
        interpolation="bilinear",
    )
    order = np.argsort(-explanation.probabilities)[: min(6, len(class_names))]
    shares = explanation.probabilities[order]
    bars.barh(range(len(order)), shares, color=["#b5451c"] + ["#c9c4bc"] * (len(order) - 1))
    for row, share in enumerate(shares):
        bars.text(share + 0.01, row, f"{share:.1%}", va="center", fontsize=10)
    bars.set_yticks(range(len(order)), [class_names[label] for label in order])
    bars.set(xlim=(0, 1.15), ylim=(len(order) - 0.4, -0.6))
    bars.set_title("What it takes it for", fontsize=11)
    bars.tick_params(left=False, bottom=False, labelbottom=False)
    bars.spines[:].set_visible(False)


def _grid(maps: np.ndarray) -> np.ndarray:
    """All maps of a block side by side, each from 0 to 1 by its own highest value."""
    H, W, features = maps.shape
    columns = min(_COLUMNS_OF_MAPS * (2 if features > 128 else 1), features)
    rows = -(-features // columns)
    gap = max(1, H // 7)
    grid = np.full((rows * (H + gap) - gap, columns * (W + gap) - gap), np.nan)
    for index in range(features):
        top, left = index // columns * (H + gap), index % columns * (W + gap)
        one = maps[..., index]
        grid[top : top + H, left : left + W] = one / max(one.max(), 1e-12)
    return grid
