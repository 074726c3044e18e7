"""Tables for the terminal."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvgg_jax.report.terminal import printable

# Accuracies that the paper reports for FashionMNIST, in percent.
PAPER = {"train": 90.3, "validation": 89.7, "test": 89.5}


def columns(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Aligns cells in columns that are as wide as their widest cells.

    Args:
        rows: the cells of each line, as many in each. What cannot be printed is escaped.
        left: indices of the columns that are aligned to the left; the others are to the right.

    Returns:
        The lines.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def percentage(fraction: float, digits: int = 2) -> str:
    """Formats a fraction in percent, of which rounding does not make 0 % or 100 %."""
    text, smallest = f"{fraction:.{digits}%}", 10.0 ** -(digits + 2)
    if fraction < 1 and text == f"{1:.{digits}%}":
        return f">{1 - smallest:.{digits}%}"
    if fraction > 0 and text == f"{0:.{digits}%}":
        return f"<{smallest:.{digits}%}"
    return text


def loss_text(loss: float) -> str:
    """Formats a loss; that of a run which nearly diverged may have dozens of digits."""
    return f"{loss:.4f}" if loss < 10_000 else f"{loss:.3e}"


def interval_text(statistics: dict[str, Any], show: Callable[[float], str]) -> str:
    """Formats the interval of a result of `seeds.statistics_of`, or says why there is none.

    Args:
        statistics: as from `seeds.statistics_of`.
        show: formats a bound.
    """
    if statistics["interval"] is None:
        return f"no interval from {statistics['n']} values"
    return "95 % interval of the mean {} to {}".format(*map(show, statistics["interval"]))


def summary_table(summary: dict[str, Any], workdir: Path) -> str:
    """Formats the summary of a finished run, beside the paper's accuracies on FashionMNIST.

    Args:
        summary: as `train_and_evaluate` returns it, of a single seed or several.
        workdir: the run's folder, to be named in the last line.
    """
    is_fashion_mnist = summary["dataset"] == "fashion_mnist"
    seeds, n = summary.get("seeds"), summary.get("num_seeds")
    rows = [["split", "accuracy", "loss"]]
    if is_fashion_mnist:
        rows[0].append("the paper")
    if seeds:
        rows[0].append(f"  {n} seeds: std")
    for split, paper in PAPER.items():
        row = [split, percentage(summary[f"{split}_accuracy"]), loss_text(summary[f"{split}_loss"])]
        if is_fashion_mnist:
            row.append(f"{paper:.1f}%")
        if seeds:
            found = seeds[f"{split}_accuracy"]
            row.append(f"  {found['std']:.2%}, {interval_text(found, percentage)}")
        rows.append(row)
    last = (
        f"{summary['parameters']:,} parameters, {summary['seconds']:,.0f} s of training on "
        f"{printable(summary['device'])}; everything is in {printable(str(workdir))}"
    )
    return "\n".join([*columns(rows, left=(0, 4 if is_fashion_mnist else 3)), last])


def evaluation_table(content: dict[str, Any], split: str) -> str:
    """Formats the accuracy of each class and of the split.

    Args:
        content: as from `evaluation_content`.
        split: the split's name.
    """
    rows = [["class", "accuracy", "correct", "count"]]
    for row in content["per_class"]:
        accuracy = "-" if row["accuracy"] is None else percentage(row["accuracy"])
        rows.append([row["class"], accuracy, f"{row['correct']:,}", f"{row['count']:,}"])
    lines = columns(rows)
    if "flip_averaged_accuracy" in content:
        lines.append(
            f"{split}: accuracy {percentage(content['flip_averaged_accuracy'])} averaged over "
            "mirror images"
        )
    lines.append(
        f"{split}: accuracy {percentage(content['accuracy'])} ({content['correct']:,} of "
        f"{content['count']:,}), loss {loss_text(content['loss'])}, checkpoint of step "
        f"{content['step']}"
    )
    return "\n".join(lines)


def seeds_table(content: dict[str, Any], split: str) -> str:
    """Formats the evaluation of several seeds and of their ensemble.

    Args:
        content: as from `seeds_content`.
        split: the split's name.
    """
    lines = []
    for name, found in content["seeds"].items():
        show = loss_text if name == "loss" else percentage
        std = f"{found['std']:.2%}" if show is percentage else loss_text(found["std"])
        lines.append(
            f"{split} {name.replace('_', ' ')}: {show(found['mean'])}, std {std}, "
            f"{interval_text(found, show)}, n = {found['n']}: "
            + " ".join(map(show, found["values"]))
        )
    ensemble = content["ensemble"]
    lines.append(
        f"{split} accuracy of the ensemble: {percentage(ensemble['accuracy'])} "
        f"({ensemble['correct']:,} of {ensemble['count']:,})"
    )
    return "\n".join(lines)


class PredictionTable:
    """Table of predictions of picture files, formatted line by line as they arrive."""

    def __init__(self, class_names: tuple[str, ...]):
        """Makes an empty table.

        Args:
            class_names: the names of all classes.
        """
        self._names = [printable(name) for name in class_names]
        # Six characters at least, so that the columns are as wide as their titles.
        self._width = max(6, *map(len, self._names))
        # A probability adds seven characters to a class name.
        column = self._width + 7
        self._head = f"{'prediction':<{column}}  {'second choice':<{column}}  file\n"

    def row(self, path: str, probabilities: np.ndarray, inverted: bool) -> str:
        """Formats the line of one picture.

        Args:
            path: the file.
            probabilities: `[num_classes]`, as fractions.
            inverted: whether the picture was inverted; the line says so.

        Returns:
            The line, with the head of the table before the first one.
        """
        head, self._head = self._head, ""
        cells = [
            f"{self._names[label]:<{self._width}} {probabilities[label]:>6.1%}"
            for label in np.argsort(-probabilities, kind="stable")[:2]
        ]
        # The path comes last because it may be long.
        return head + "  ".join([*cells, printable(path) + ("  (inverted)" if inverted else "")])
