"""The figures of a report: functions from arrays to Matplotlib figures, in light or dark."""

import dataclasses
import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from tinyvgg_jax.report.scores import Calibration


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a figure, as hexadecimal strings.

    Attributes:
        background: colour of the background.
        ink: colour of text.
        faint: colour of grid lines and axes.
        first: colour of the main curve.
        second: colour of the second curve.
    """

    background: str
    ink: str
    faint: str
    first: str
    second: str


LIGHT = Theme("#ffffff", "#22201d", "#dcd7d0", "#b5451c", "#2f6f8f")
DARK = Theme("#1d1c1a", "#ece8e1", "#4a4641", "#f08a5d", "#7cc0dd")


def png(figure: Figure, dpi: int = 140, metadata: dict[str, str] | None = None) -> bytes:
    """Renders a figure as the bytes of a PNG file, with `metadata` among its text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def _figure(width: float, height: float, theme: Theme) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor=theme.background)


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.ink, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(theme.faint)
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(theme.ink)


def confusion_matrix(
    matrix: np.ndarray, class_names: tuple[str, ...], theme: Theme = LIGHT
) -> Figure:
    """Draws a confusion matrix, with counts and percentages of the rows.

    Args:
        matrix: `[C, C]` int; a row for each true class, a column for each predicted class.
        class_names: C names.
        theme: the colours.

    Returns:
        The figure. With more than 20 classes it has colours only, since numbers would not fit.
    """
    percentages = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(5.0, 1.6 + 0.62 * len(class_names))
    figure = _figure(side, side, theme)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("percentages", [theme.background, theme.first])
    # Square roots keep errors of a few percent visible beside the diagonal.
    axes.imshow(np.sqrt(percentages), cmap=colours, vmin=0, vmax=10)
    _style(axes, theme)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(
        range(len(class_names)), class_names, rotation=40, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="Predicted class", ylabel="True class")
    for (row, column), count in np.ndenumerate(matrix):
        if not count or len(class_names) > 20:
            continue
        percentage = percentages[row, column]
        label = f"{percentage:.0f}%" if percentage >= 1 else "<1%"
        colour = theme.background if percentage > 35 else theme.ink
        for text, shift, size in ((f"{count:,}", -0.14, 9.5), (label, 0.22, 7.0)):
            axes.text(
                column, row + shift, text, ha="center", va="center", color=colour, fontsize=size
            )
    return figure


def calibration_curve(curve: Calibration, theme: Theme = LIGHT) -> Figure:
    """Draws a calibration curve (reliability diagram) and the number of images in each bin.

    Args:
        curve: confidence, accuracy and number of images by bin of confidence.
        theme: the colours.

    Returns:
        The figure.
    """
    figure = _figure(5.4, 5.2, theme)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = curve.counts > 0
    edges = 100 * np.linspace(0, 1, len(curve.counts) + 1)
    upper.plot(
        [0, 100],
        [0, 100],
        color=theme.second,
        linewidth=1,
        linestyle="--",
        label="perfect calibration",
    )
    upper.plot(
        100 * curve.confidence[filled],
        100 * curve.accuracy[filled],
        color=theme.first,
        marker="o",
        markersize=4,
        label="this network",
    )
    upper.legend(loc="upper left", frameon=False, labelcolor=theme.ink)
    upper.set(ylabel="Accuracy (%)", ylim=(0, 102), xlim=(0, 100))
    lower.bar(edges[:-1], curve.counts, width=np.diff(edges) * 0.9, align="edge", color=theme.first)
    lower.set(ylabel="Images", xlabel="Confidence: probability of the predicted class (%)")
    lower.set_yscale("symlog", linthresh=10)
    for axes in (upper, lower):
        _style(axes, theme)
    return figure


def learning_curves(history: list[dict[str, Any]], theme: Theme = LIGHT) -> Figure:
    """Draws accuracy and loss on the train and validation splits by epoch.

    Args:
        history: one record for each epoch, as in `metrics.jsonl`.
        theme: the colours.

    Returns:
        The figure.
    """
    figure = _figure(5.4, 5.6, theme)
    epochs = [record["epoch"] for record in history]
    for axes, kind, scale in zip(
        figure.subplots(2, 1, sharex=True), ("accuracy", "loss"), (100, 1), strict=True
    ):
        for split, colour in (("train", theme.first), ("validation", theme.second)):
            values = [scale * record[f"{split}_{kind}"] for record in history]
            axes.plot(epochs, values, color=colour, marker="o", markersize=3.5, label=split)
        _style(axes, theme)
        axes.set(ylabel="Accuracy (%)" if kind == "accuracy" else "Loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, labelcolor=theme.ink)
    axes.set_xlabel("Epoch", color=theme.ink)
    return figure


@matplotlib.rc_context({"text.parse_math": False})
def gallery(images: np.ndarray, captions: list[str], columns: int = 6) -> Figure:
    """Draws images in a grid, with a caption below each.

    Args:
        images: `[N, H, W, C]` uint8; grey if C is 1, else RGB.
        captions: N captions of at most two lines.
        columns: number of images in a row.

    Returns:
        The figure; it says "none" if N is 0.
    """
    rows = max(1, -(-len(images) // columns))
    figure = _figure(1.75 * columns, 2.25 * rows, LIGHT)
    for axes in np.ravel(figure.subplots(rows, columns)):
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    if not len(images):
        figure.axes[0].text(0.5, 0.5, "none", ha="center", color=LIGHT.ink)
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        grey = image.shape[2] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray", vmin=0, vmax=255)
        axes.set_xlabel(caption, fontsize=8, color=LIGHT.ink)
    return figure
