"""Tables for the terminal."""

from pathlib import Path
from typing import Any

import numpy as np

from tinyvgg_jax.report.terminal import printable

# Accuracies that the paper reports for FashionMNIST, in percent.
PAPER = {"train": 90.3, "validation": 89.7, "test": 89.5}


def summary_table(summary: dict[str, Any], workdir: Path) -> str:
    """Formats the summary of a finished run, beside the paper's accuracies on FashionMNIST.

    Args:
        summary: as `train_and_evaluate` returns it, of a single seed or several.
        workdir: the run's folder, to be named in the last line.
    """
    is_fashion_mnist = summary["dataset"] == "fashion_mnist"
    seeds, n = summary.get("seeds"), summary.get("num_seeds")
    head = f"{'split':<12}{'accuracy':>10}{'loss':>8}"
    head += f"{'the paper':>11}" if is_fashion_mnist else ""
    lines = [head + (f"    {n} seeds: std, 95 % interval of the mean" if seeds else "")]
    for split, paper in PAPER.items():
        line = f"{split:<12}{summary[f'{split}_accuracy']:>10.2%}{summary[f'{split}_loss']:>8.4f}"
        line += f"{paper:>10.1f}%" if is_fashion_mnist else ""
        if seeds:
            found = seeds[f"{split}_accuracy"]
            low, high = found["interval"]
            line += f"{'':<14}{found['std']:.2%}, {low:.2%} to {high:.2%}"
        lines.append(line)
    lines.append(
        f"{summary['parameters']:,} parameters, {summary['seconds']:,.0f} s of training on "
        f"{printable(summary['device'])}; everything is in {printable(str(workdir))}"
    )
    return "\n".join(lines)


def evaluation_table(content: dict[str, Any], split: str) -> str:
    """Formats the accuracy of each class and of the split.

    Args:
        content: as from `evaluation_content`.
        split: the split's name.
    """
    names = [printable(row["class"]) for row in content["per_class"]]
    width = max(map(len, names))
    lines = [f"{'class':<{width}}  accuracy  correct    count"]
    for name, row in zip(names, content["per_class"], strict=True):
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
        lines.append(f"{name:<{width}}  {accuracy:>8}  {row['correct']:>7,}  {row['count']:>7,}")
    if "flip_averaged_accuracy" in content:
        lines.append(
            f"{split}: accuracy {content['flip_averaged_accuracy']:.2%} averaged over mirror images"
        )
    lines.append(
        f"{split}: accuracy {content['accuracy']:.2%} ({content['correct']:,} of "
        f"{content['count']:,}), loss {content['loss']:.4f}, checkpoint of step {content['step']}"
    )
    return "\n".join(lines)


def seeds_table(content: dict[str, Any], split: str) -> str:
    """Formats the evaluation of several seeds and of their ensemble.

    Args:
        content: as `evaluate_seeds` returns it for the folder of all seeds.
        split: the split's name.
    """
    lines = []
    for name, found in content["seeds"].items():
        show = "{:.4f}".format if name == "loss" else "{:.2%}".format
        low, high = map(show, found["interval"])
        lines.append(
            f"{split} {name.replace('_', ' ')}: {show(found['mean'])}, std {show(found['std'])}, "
            f"95 % interval of the mean {low} to {high}, n = {found['n']}: "
            + " ".join(map(show, found["values"]))
        )
    ensemble = content["ensemble"]
    lines.append(
        f"{split} accuracy of the ensemble: {ensemble['accuracy']:.2%} "
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
