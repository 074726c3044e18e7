"""The figures of a report: functions from arrays to Matplotlib figures, in light or dark."""

import dataclasses
import functools
import io
import textwrap
import unicodedata
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from tinyvgg_jax.report.scores import Calibration
from tinyvgg_jax.report.tables import percentage

# Numbers do not fit into the confusion matrix of more classes.
MAX_CLASSES_WITH_NUMBERS = 20
# Text on a darker cell has the background's colour.
DEEP_SHADE = 0.75
# The calibration curve has no line through bins of fewer images, where it would be chance.
MIN_IMAGES_IN_BIN = 10
_LONGEST_NAME = 20
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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


@functools.cache
def _drawable_characters() -> frozenset[int]:
    """Lists the code points that Matplotlib's own font has."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return frozenset(font.get_charmap())


def drawable(text: str) -> str:
    """Replaces what Matplotlib cannot draw, like emoji, by the replacement character.

    Without that it would warn, and draw an empty box. Control characters become spaces.
    """
    result = ""
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cf", "Me", "Mn") and result.endswith(_REPLACEMENT):
            continue  # It joins or changes an emoji that is replaced.
        if category in ("Cc", "Zl", "Zp"):
            result += " "
        else:
            result += character if ord(character) in _drawable_characters() else _REPLACEMENT
    return result


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    """Makes a label from a class name: drawable, and without the end of a long name."""
    name = drawable(name)
    return name if len(name) <= longest else name[: longest - 3].rstrip() + "..."


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


def confusion_shades(matrix: np.ndarray) -> np.ndarray:
    """Computes the shades of a confusion matrix's cells.

    Square roots keep errors of a few percent visible beside the diagonal.

    Args:
        matrix: `[C, C]` int, as in `confusion_matrix`.

    Returns:
        `[C, C]` in [0, 1], from the background's colour to the full one.
    """
    return np.sqrt(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))


@matplotlib.rc_context({"text.parse_math": False})
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
    with_numbers = len(class_names) <= MAX_CLASSES_WITH_NUMBERS
    side = 2.2 + len(class_names) * (0.62 if with_numbers else 0.15)
    figure = _figure(max(5.0, side), max(5.0, side), theme)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("percentages", [theme.background, theme.first])
    axes.imshow(confusion_shades(matrix), cmap=colours, vmin=0, vmax=1)
    _style(axes, theme)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    places, labels = range(len(class_names)), [short(name) for name in class_names]
    size = 10.0 if with_numbers else 7.5
    axes.set_xticks(
        places,
        labels,
        fontsize=size,
        rotation=40 if with_numbers else 90,
        ha="right",
        va="top" if with_numbers else "center",
        rotation_mode="anchor",
    )
    axes.set_yticks(places, labels, fontsize=size)
    axes.set(xlabel="Predicted class", ylabel="True class")
    if with_numbers:
        _write_numbers(axes, matrix, theme)
    return figure


def _write_numbers(axes: Axes, matrix: np.ndarray, theme: Theme) -> None:
    """Writes counts and percentages into the cells of a confusion matrix."""
    totals, shades = matrix.sum(axis=1), confusion_shades(matrix)
    # A cell is as wide as five characters of this size.
    size = 11.0 * min(1.0, 5 / len(f"{matrix.max():,}"))
    for (row, column), count in np.ndenumerate(matrix):
        if not count:
            continue
        colour = theme.background if shades[row, column] > DEEP_SHADE else theme.ink
        share = percentage(count / totals[row], 1)
        for text, shift, one in ((f"{count:,}", -0.17, size), (share, 0.2, 9.0)):
            axes.text(
                column, row + shift, text, ha="center", va="center", color=colour, fontsize=one
            )


def calibration_curve(curve: Calibration, theme: Theme = LIGHT) -> Figure:
    """Draws a calibration curve (reliability diagram) and the number of images in each bin.

    Args:
        curve: confidence, accuracy and number of images by bin of confidence.
        theme: the colours.

    Returns:
        The figure. Each point has its 95 % confidence interval; a line connects the points of bins
        that are not nearly empty.
    """
    figure = _figure(5.4, 5.6, theme)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = 100 * np.linspace(0, 1, len(curve.counts) + 1)
    upper.plot(
        [0, 100],
        [0, 100],
        color=theme.second,
        linewidth=1,
        linestyle="--",
        label="perfect calibration",
    )
    confidence, accuracy = 100 * curve.confidence, 100 * curve.accuracy
    low, high = 100 * curve.intervals.T
    filled, enough = curve.counts > 0, curve.counts >= MIN_IMAGES_IN_BIN
    upper.plot(confidence[enough], accuracy[enough], color=theme.first)
    upper.errorbar(
        confidence[filled],
        accuracy[filled],
        # Rounding may leave a bound on the wrong side by 1e-16.
        yerr=np.maximum([accuracy - low, high - accuracy], 0)[:, filled],
        color=theme.first,
        fmt="o",
        markersize=4,
        elinewidth=1,
        capsize=2,
        label="this network, with 95 % interval",
    )
    upper.legend(loc="best", frameon=False, labelcolor=theme.ink)
    upper.set(ylabel="Accuracy (%)", ylim=(-2, 102), xlim=(0, 100))
    lower.bar(edges[:-1], curve.counts, width=np.diff(edges) * 0.9, align="edge", color=theme.first)
    lower.set(ylabel="Images", xlabel="Confidence: probability of the predicted class (%)")
    lower.set_yscale("symlog", linthresh=10)
    for axes in (upper, lower):
        _style(axes, theme)
    return figure


def learning_curves(
    histories: list[list[dict[str, Any]]], note: str = "", theme: Theme = LIGHT
) -> Figure:
    """Draws accuracy and loss on the train and validation splits by epoch.

    The metrics on train are means over an epoch, so they are drawn in its middle.

    Args:
        histories: of each run one record for each epoch, as in `metrics.jsonl`.
        note: how the two were measured; it is written below the curves, if it is not empty.
        theme: the colours.

    Returns:
        The figure.
    """
    figure = _figure(5.4, 6.0 if note else 5.6, theme)
    curves = (
        ("train", -0.5, theme.first, "train, mean over the epoch"),
        ("validation", 0.0, theme.second, "validation, after the epoch"),
    )
    width = 1.5 if len(histories) == 1 else 0.8
    for axes, kind, scale in zip(
        figure.subplots(2, 1, sharex=True), ("accuracy", "loss"), (100, 1), strict=True
    ):
        for split, shift, colour, label in curves:
            for number, history in enumerate(histories):
                axes.plot(
                    [record["epoch"] + shift for record in history],
                    [scale * record[f"{split}_{kind}"] for record in history],
                    color=colour,
                    marker="o",
                    markersize=2 * width,
                    linewidth=width,
                    label=label if number == 0 else None,
                )
        _style(axes, theme)
        axes.set(ylabel="Accuracy (%)" if kind == "accuracy" else "Loss")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, labelcolor=theme.ink)
    axes.set_xlabel("Epoch", color=theme.ink)
    if note:
        figure.supxlabel(textwrap.fill(note, 76), fontsize=8.5, color=theme.ink, x=0.02, ha="left")
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
