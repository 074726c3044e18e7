"""Tables for the terminal."""

from pathlib import Path
from typing import Any

import numpy as np

# The paper's accuracies, in percent.
PAPER = {"train": 90.3, "validation": 89.7, "test": 89.5}


def summary_table(summary: dict[str, Any], workdir: Path) -> str:
    """The accuracies of a finished run, beside the paper's if they are of its dataset."""
    is_papers = summary["dataset"] == "fashion_mnist"
    seeds, n = summary.get("seeds"), summary.get("num_seeds")
    head = "split         accuracy    loss" + "      the paper" * is_papers
    lines = [head + f"    of {n} seeds: std, 95 % interval of the mean" * bool(seeds)]
    for split, paper in PAPER.items():
        accuracy, loss = summary[f"{split}_accuracy"], summary[f"{split}_loss"]
        line = f"{split:<12}  {accuracy:>7.2%}    {loss:.4f}" + f"    {paper:.1f}%" * is_papers
        if seeds:
            found = seeds[f"{split}_accuracy"]
            low, high = found["interval"]
            line += f"{'':<8} {found['std']:.2%}, {low:.2%} to {high:.2%}"
        lines.append(line)
    lines.append(
        f"{summary['parameters']:,} parameters, {summary['seconds']:,.0f} s of training on "
        f"{summary['device']}; all in {workdir}"
    )
    return "\n".join(lines)


def evaluation_table(content: dict[str, Any], split: str) -> str:
    """What `evaluation/SPLIT.json` says, as a table."""
    width = max(len(row["class"]) for row in content["per_class"])
    lines = [f"{'class':<{width}}  accuracy  correct    count"]
    for row in content["per_class"]:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
        lines.append(
            f"{row['class']:<{width}}  {accuracy:>8}  {row['correct']:>7,}  {row['count']:>7,}"
        )
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
    """What `evaluation/SPLIT.json` of several seeds says."""
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
        f"{split} accuracy of their ensemble: {ensemble['accuracy']:.2%} "
        f"({ensemble['correct']:,} of {ensemble['count']:,})"
    )
    return "\n".join(lines)


class PredictionTable:
    """Predictions of picture files as lines of a table, which begin with its head."""

    def __init__(self, class_names: tuple[str, ...]):
        self._names = class_names
        self._width = max(len(name) for name in class_names)
        self._head = f"{'class':<{self._width}}         second guess{'':<{self._width}}  file\n"

    def row(self, path: str, probabilities: np.ndarray, inverted: bool) -> str:
        """One picture's line.

        Args:
            path: the file.
            probabilities: `[num_classes]`.
            inverted: whether it was inverted, which the line says.

        Returns:
            The line, after the table's head if it is the first.
        """
        head, self._head = self._head, ""
        guesses = [
            f"{self._names[label]:<{self._width}} {probabilities[label]:>6.1%}"
            for label in np.argsort(-probabilities, kind="stable")[:2]
        ]
        # The path comes last: its length is anybody's guess. It may even have a line's end in it.
        path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)
        return head + "  ".join([*guesses, path + "  (inverted)" * inverted])
