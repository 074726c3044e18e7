"""Progress of training and evaluation on standard error.

On a terminal there is a bar, elsewhere a line every minute.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyvgg_jax import processes
from tinyvgg_jax.data.progress import has_terminal, say
from tinyvgg_jax.evaluate import OnProgress
from tinyvgg_jax.runs.folder import steps_taken
from tinyvgg_jax.runs.run import Run, Work
from tinyvgg_jax.step import StepSums

# Fetching sums waits for the device, so it happens at most this often.
_FETCH_SECONDS = 0.5
# Without a terminal, a log file gets a line this often.
_LINE_SECONDS = 60.0
# An evaluation shows no bar before this time.
_DELAY_SECONDS = 2.0
# Columns that a bar needs. Words that leave it fewer give way to shorter ones.
_BAR_COLUMNS = 6
# An evaluation has no backward pass, which takes about two thirds of a training step.
_EVALUATION_SHARE = 1 / 3


def duration(seconds: float) -> str:
    """Formats a duration, like "45 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class _Bar:
    """A bar on a terminal, which is removed at the end; elsewhere, a line every minute."""

    def __init__(self, title: str, total: int, done: int = 0, delay: float = 0.0):
        """Shows the beginning.

        Args:
            title: stands before the bar.
            total: number of images.
            done: number of images that an earlier call has done.
            delay: seconds before the bar is shown.
        """
        self._title = title
        self._last_look = self._last_line = time.monotonic()
        self._bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            delay=delay,
            # Whoever asks `is_due` calls `show` rarely enough.
            mininterval=0,
            miniters=1,
            disable=not (processes.is_first() and has_terminal()),
            leave=False,
            dynamic_ncols=True,
            bar_format=self._format(""),
        )

    @staticmethod
    def _format(words: str) -> str:
        return "{desc}: {percentage:3.0f}%|{bar}| " + words

    def is_due(self) -> bool:
        """Tells whether it is time to call `show`."""
        return time.monotonic() - self._last_look >= _FETCH_SECONDS

    def show(self, done: int, words: list[str], line: str | None) -> None:
        """Shows the progress.

        Args:
            done: number of images so far.
            words: what to write beside the bar, from the longest to the shortest: the first that
                fits into the terminal's line is taken.
            line: the line for a log file; None for none yet.
        """
        now = self._last_look = time.monotonic()
        if not self._bar.disable:
            room = self._bar.format_dict["ncols"] or 80
            room -= len(self._title) + len(": 100%|| ") + _BAR_COLUMNS
            fitting = (text for text in words if len(text) <= room)
            self._bar.bar_format = self._format(next(fitting, ""))
            self._bar.update(done - self._bar.n)
        elif line and now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            say(f"{self._title}, {line}")

    def close(self) -> None:
        """Removes the bar from the terminal."""
        self._bar.close()


@contextlib.contextmanager
def evaluation_progress(title: str, count: int) -> Iterator[OnProgress]:
    """Shows the progress of an evaluation, unless it is over within two seconds.

    Args:
        title: names what is evaluated.
        count: number of examples.

    Yields:
        The `on_progress` for `evaluate`.
    """
    if not processes.is_first():
        yield lambda _: None
        return
    start, bar = time.monotonic(), _Bar(title, count, delay=_DELAY_SECONDS)

    def show(done: int) -> None:
        if bar.is_due():
            rate = done / (time.monotonic() - start)
            left = f"{duration((count - done) / rate)} left"
            words = f"{rate:,.0f} images/s, {left}"
            bar.show(done, [words, left], f"image {done}/{count}: {words}")

    with contextlib.closing(bar):
        yield show


@dataclasses.dataclass
class Pace:
    """Speed of this process by its latest measurements, from which the time left is estimated.

    Attributes:
        train: seconds for an image in training; None before it is measured.
        evaluation: seconds for an image in an evaluation; None before it is measured.
    """

    train: float | None = None
    evaluation: float | None = None

    def seconds(self, work: Work) -> float | None:
        """Estimates the time for some work; None before training is measured."""
        if self.train is None:
            return None
        evaluation = self.evaluation or _EVALUATION_SHARE * self.train
        return work.train * self.train + work.evaluation * evaluation


@dataclasses.dataclass
class Command:
    """A call of `train_and_evaluate` and its runs.

    Attributes:
        workdir: the folder that it was given.
        titles: by the folder of each run, the beginning of lines about it; empty for a single run.
        pace: the speed so far.
    """

    workdir: Path
    titles: dict[Path, str]
    pace: Pace = dataclasses.field(default_factory=Pace)

    def title(self, runs: list[Run]) -> str:
        """Returns the beginning of lines about runs; several that train together have no name."""
        return self.titles[runs[0].workdir] if len(runs) == 1 else ""

    def work_of_others(self, runs: list[Run]) -> Work:
        """Counts the work that is left in all other runs, as far as their folders tell.

        Args:
            runs: the runs that are trained now.
        """
        others = Work(0, 0)
        for path in self.titles.keys() - {run.workdir for run in runs}:
            left = runs[0].work_left(steps_taken(path))
            if left.train or not (path / "summary.json").exists():
                others = others.plus(left)
        return others


class TrainingProgress:
    """Progress of a run, or of several that are trained together, and the time left."""

    def __init__(self, runs: list[Run], command: Command):
        """Prepares the bars of the epochs.

        Args:
            runs: runs that differ in their seeds only.
            command: the call that trains them.
        """
        self._run, self._num_runs = runs[0], len(runs)
        self._title, self._pace = command.title(runs), command.pace
        self._others = command.work_of_others(runs)
        alone = len(command.titles) == len(runs)
        self._all, self._all_in_brief = ("the run", "run") if alone else ("all seeds", "all")
        # Time and step of the epoch from which on the speed is measured; the first call compiles.
        self._mark: tuple[float, int] | None = None
        self._is_compiled = False

    @contextlib.contextmanager
    def epoch(self, epoch: int, first_step: int) -> Iterator[None]:
        """Shows an epoch that begins or is resumed, until the end of the context.

        Args:
            epoch: number of the epoch, counted from 0.
            first_step: number of steps of the epoch that an earlier call has taken.
        """
        config, self._epoch = self._run.config, epoch
        self._bar = _Bar(
            f"{self._title}epoch {epoch + 1}/{config.num_epochs}",
            self._run.steps_per_epoch * config.batch_size,
            first_step * config.batch_size,
        )
        self._mark = (time.monotonic(), first_step) if self._is_compiled else None
        with contextlib.closing(self._bar):
            yield

    def is_due(self) -> bool:
        """Tells whether it is time to fetch the sums from the device and call `show`."""
        return processes.is_first() and self._bar.is_due()

    def measure(self, step: int) -> None:
        """Measures the speed; the device must have finished the steps.

        Args:
            step: number of finished steps of the epoch.
        """
        now, self._is_compiled = time.monotonic(), True
        if self._mark is None:
            self._mark = (now, step)
        start, first_step = self._mark
        if step > first_step:
            self._pace.train = (now - start) / self._images(step - first_step)

    def _images(self, steps: int) -> int:
        """Counts the images of some steps, over all runs."""
        return steps * self._run.config.batch_size * self._num_runs

    def show(self, step: int, sums: StepSums) -> None:
        """Shows the number of finished steps, the mean loss, the accuracy and the time left.

        Args:
            step: number of finished steps of the epoch.
            sums: sums over these steps, on the host; several runs are stacked, and averaged here.
        """
        self.measure(step)
        steps, examples = self._run.steps_per_epoch, sums.examples.sum()
        loss = f"loss {sums.loss.sum() / examples:.4f}"
        both = f"{loss}, accuracy {sums.correct.sum() / examples:.2%}"
        words, line = [both, loss], None
        left = self._left(self._epoch * steps + step)
        if self._pace.train is not None and left is not None:
            rate = f"{1 / self._pace.train:,.0f} images/s"
            epoch_seconds = self._images(steps - step) * self._pace.train
            epoch, in_all = f"{duration(epoch_seconds)} left", f"{left} in {self._all}"
            brief = f"{self._all_in_brief} {left}"
            short = f"{epoch}, {brief}"
            words = [
                f"{both}, {rate}, {epoch} in the epoch, {in_all}",
                f"{both}, {epoch} in the epoch, {in_all}",
                f"{both}, {short}",
                f"{loss}, {short}",
                short,
                brief,
            ]
            line = f"step {step}/{steps}: {both}, {rate}, {epoch_seconds:.0f} s left in the epoch, "
            line += in_all
        self._bar.show(step * self._run.config.batch_size, words, line)

    def _left(self, step: int) -> str | None:
        """Formats the time that is left after a step of the run, for all runs."""
        train, evaluation = self._run.work_left(step)
        work = Work(self._num_runs * train, self._num_runs * evaluation).plus(self._others)
        seconds = self._pace.seconds(work)
        return None if seconds is None else duration(seconds)

    def epoch_line(self, records: list[dict[str, Any]]) -> str:
        """Formats the metrics of a finished epoch as one line, with the time left.

        Args:
            records: the epoch's record in `metrics.jsonl`, of each run.
        """
        line = self._title + epoch_line(records, self._run.config.num_epochs)
        left = self._left(records[0]["step"])
        return line if left is None else f"{line}, {left} left in {self._all}"


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
