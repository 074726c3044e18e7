"""Progress of training: a bar or lines on standard error, and scalars for TensorBoard."""

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyvgg_jax.runs.files import subfolder, writing_to
from tinyvgg_jax.step import StepSums

# Fetching sums waits for the device, so it happens at most this often.
_FETCH_SECONDS = 0.5
# Without a terminal, a log file gets a line this often.
_LINE_SECONDS = 60.0


class ProgressBar:
    """Progress of one epoch on standard error: a bar on a terminal, lines elsewhere."""

    def __init__(self, epoch: int, num_epochs: int, first_step: int, steps: int, batch_size: int):
        """Shows an epoch that begins or is resumed.

        Args:
            epoch: number of the epoch, counted from 1.
            num_epochs: number of epochs of the run.
            first_step: number of steps of the epoch that an earlier call has taken.
            steps: number of steps of the epoch.
            batch_size: number of images of a step.
        """
        self._title = f"epoch {epoch}/{num_epochs}"
        self._batch_size = batch_size
        self._start = self._last_fetch = self._last_line = time.monotonic()
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
        """Tells whether it is time to fetch the sums from the device and call `show`."""
        return time.monotonic() - self._last_fetch >= _FETCH_SECONDS

    def show(self, step: int, sums: StepSums) -> None:
        """Shows the number of finished steps, the mean loss and the accuracy.

        Args:
            step: number of finished steps of the epoch.
            sums: sums over these steps, on the host; several runs are stacked, and averaged here.
        """
        examples = sums.examples.sum()
        loss, accuracy = sums.loss.sum() / examples, sums.correct.sum() / examples
        now = self._last_fetch = time.monotonic()
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
        """Removes the bar from the terminal."""
        self._bar.close()


def epoch_line(records: list[dict[str, Any]], num_epochs: int) -> str:
    """Formats the metrics of a finished epoch as one line.

    Args:
        records: the epoch's record in `metrics.jsonl`, of each run; several are averaged.
        num_epochs: number of epochs of the run.
    """
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


def tensorboard_writer(workdir: Path, history: list[dict[str, Any]]) -> Any:
    """Opens a `tensorboardX.SummaryWriter` that goes on after the epochs of a run so far.

    Args:
        workdir: the run's folder.
        history: the records in `metrics.jsonl`; what TensorBoard has beyond them is discarded.

    Raises:
        UserError: if the events cannot be written.
    """
    from tensorboardX import SummaryWriter

    folder = subfolder(workdir, "tensorboard")
    purge_step = history[-1]["step"] + 1 if history else None
    with writing_to(folder):
        return SummaryWriter(str(folder), purge_step=purge_step)


def tensorboard_scalars(writer: Any, record: dict[str, Any]) -> None:
    """Writes an epoch's record for TensorBoard, which groups `loss/...` and `accuracy/...`.

    Args:
        writer: a `tensorboardX.SummaryWriter`.
        record: the epoch's record in `metrics.jsonl`.
    """
    for name, value in record.items():
        split, _, kind = name.partition("_")
        if split in ("train", "validation"):
            writer.add_scalar(f"{kind}/{split}", value, record["step"])
    writer.add_scalar("learning_rate", record["learning_rate"], record["step"])
    writer.add_scalar("images_per_second", record["images_per_second"], record["step"])
    writer.flush()
