"""What a run tells people and tools: the progress bar, metrics.jsonl, TensorBoard, tables."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

# Between two looks at the device's figures, and between lines where there is no terminal.
_LOOK_SECONDS = 0.5
_LINE_SECONDS = 60.0
# The paper's accuracies, in percent.
PAPER = {"train": 90.3, "validation": 89.7, "test": 89.5}


class Progress:
    """The progress of one epoch on standard error: a bar on a terminal, lines elsewhere."""

    def __init__(self, epoch: int, num_epochs: int, first_step: int, steps: int, batch_size: int):
        self._title = f"epoch {epoch}/{num_epochs}"
        self._batch_size = batch_size
        self._start = self._last_look = self._last_line = time.monotonic()
        self._first_step, self._steps = first_step, steps
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=self._title,
            total=steps * batch_size,
            initial=first_step * batch_size,
            unit=" images",
            unit_scale=True,
            disable=not self._is_terminal,
            leave=False,
        )

    def is_due(self) -> bool:
        """Whether it is time to fetch figures from the device and call `show`."""
        return time.monotonic() - self._last_look >= _LOOK_SECONDS

    def show(self, step: int, loss: float, accuracy: float) -> None:
        """Shows figures of the epoch so far: its finished steps, mean loss and accuracy."""
        now = self._last_look = time.monotonic()
        if self._is_terminal:
            self._bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
            self._bar.update(step * self._batch_size - self._bar.n)
            return
        if now - self._last_line < _LINE_SECONDS:
            return
        self._last_line = now
        rate = (step - self._first_step) / (now - self._start)
        left = (self._steps - step) / rate if rate else float("nan")
        print(
            f"{self._title}, step {step}/{self._steps}: loss {loss:.4f}, accuracy {accuracy:.2%}, "
            f"{rate * self._batch_size:,.0f} images/s, {left:.0f} s left in the epoch",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Takes the bar off the terminal."""
        self._bar.close()


def epoch_line(records: list[dict[str, Any]], num_epochs: int) -> str:
    """One line on a finished epoch, from its records in metrics.jsonl: means, if several."""
    record = {
        name: sum(one[name] for one in records) / len(records)
        for name, value in records[0].items()
        if isinstance(value, float)
    }
    return (
        f"epoch {records[0]['epoch']}/{num_epochs}: "
        + (f"mean of {len(records)} seeds, " if len(records) > 1 else "")
        + f"train loss {record['train_loss']:.4f}, accuracy {record['train_accuracy']:.2%}; "
        f"validation loss {record['validation_loss']:.4f}, "
        f"accuracy {record['validation_accuracy']:.2%}; "
        f"{record['seconds']:.1f} s, {record['images_per_second']:,.0f} images/s"
    )


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Writes metrics.jsonl anew, in one step: a line an epoch."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in history))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file, so that a reader and a crash see the old or the new one, whole."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def tensorboard_scalars(writer: Any, record: dict[str, Any]) -> None:
    """Adds an epoch's record to a tensorboardX writer, in TensorBoard's two groups."""
    for name, value in record.items():
        split, _, kind = name.partition("_")
        if split in ("train", "validation"):
            writer.add_scalar(f"{kind}/{split}", value, record["step"])
    writer.add_scalar("learning_rate", record["learning_rate"], record["step"])
    writer.add_scalar("images_per_second", record["images_per_second"], record["step"])
    writer.flush()


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
