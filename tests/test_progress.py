import contextlib
import fcntl
import os
import re
import struct
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import pytest
from conftest import stored
from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax import train
from tinyvgg_jax.data import Split
from tinyvgg_jax.report import evaluation, progress
from tinyvgg_jax.report.progress import Command, Pace, TrainingProgress, duration
from tinyvgg_jax.runs.files import write_json
from tinyvgg_jax.runs.run import Run, Work
from tinyvgg_jax.step import StepSums


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def make_run(config: ConfigDict, workdir: Path) -> Run:
    """A run of 3 epochs of 8 steps of 30 images; 80 images to validate on, and 70 to test on."""
    splits = {
        name: Split(np.zeros((size, 4, 4, 1), np.uint8), np.zeros(size, np.int32))
        for name, size in (("train", 250), ("validation", 80), ("test", 70))
    }
    nothing: Any = None
    return Run(config_lib.validated(config), workdir, splits, nothing, nothing, nothing, nothing)


def sums(steps: int, num_runs: int = 1) -> StepSums:
    """Sums of a mean loss of 1.5 and an accuracy of a half."""
    examples = np.full(num_runs, 30 * steps) if num_runs > 1 else np.int32(30 * steps)
    return StepSums(1.5 * examples, examples // 2, examples, 0 * examples)  # type: ignore[arg-type]


@pytest.fixture
def run(config: ConfigDict, tmp_path: Path) -> Run:
    return make_run(config, tmp_path)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (5970, "100 min"),
        (5990, "1 h 40 min"),
        (90000, "25 h 0 min"),
    ],
)
def test_durations_are_in_the_units_of_people(seconds: float, words: str) -> None:
    # A hundred minutes are an hour and forty.
    assert duration(seconds) == words.replace("100 min", "1 h 40 min")


# The time left


def test_the_time_left_counts_what_is_measured_but_not_the_first_call(
    run: Run, clock: Clock
) -> None:
    shown = TrainingProgress([run], command := Command(run.workdir, {run.workdir: ""}))
    with shown.epoch(0, 0):
        clock.now += 100  # The first call compiles.
        shown.show(1, sums(1))
        assert command.pace.train is None
        clock.now += 6
        shown.show(3, sums(3))
    assert command.pace.train == pytest.approx(0.1)
    # 21 steps of 30 images; an evaluation takes a third of the time: of three validations of 80
    # images, and of the 400 images of all splits.
    assert shown._left(3) == duration((21 * 30 + (3 * 80 + 400) / 3) * 0.1) == "84 s"
    command.pace.evaluation = 0.01
    assert shown._left(8) == duration(16 * 30 * 0.1 + (2 * 80 + 400) * 0.01) == "54 s"
    # Later epochs are measured from their beginning.
    with shown.epoch(1, 0):
        clock.now += 12
        shown.show(2, sums(2))
    assert command.pace.train == pytest.approx(0.2)


def test_the_time_left_of_a_run_that_is_resumed_in_an_epoch_is_measured_anew(
    run: Run, clock: Clock
) -> None:
    shown = TrainingProgress([run], command := Command(run.workdir, {run.workdir: ""}))
    with shown.epoch(1, 7):
        clock.now += 100
        shown.show(8, sums(8))
        shown.measure(8)
    # The only step that was left was that of the first call.
    assert command.pace.train is None
    record = {"epoch": 2, "step": 16, "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 1.0}
    record |= {"validation_loss": 1.0, "validation_accuracy": 0.5, "images_per_second": 3.0}
    assert shown.epoch_line([record]).endswith("1.0 s, 3 images/s")
    with shown.epoch(2, 0):
        clock.now += 3
        shown.show(1, sums(1))
    assert command.pace.train == pytest.approx(0.1)
    assert shown.epoch_line([record]).endswith("1.0 s, 3 images/s, 40 s left in the run")


def test_the_time_left_counts_the_seeds_that_come_later(
    run: Run, config: ConfigDict, tmp_path: Path
) -> None:
    folders = [tmp_path / f"seed_{seed}" for seed in range(4)]
    runs = [make_run(config, folder) for folder in folders]
    command = Command(tmp_path, {folder: f"{folder.name}: " for folder in folders})
    command.pace = Pace(0.1, 0.01)
    # The first is finished, the second is trained now, of the third there are two epochs.
    (folders[0] / "checkpoints" / "24").mkdir(parents=True)
    (folders[0] / "summary.json").touch()
    (folders[2] / "checkpoints" / "16").mkdir(parents=True)
    (folders[2] / "checkpoints" / "24.orbax-checkpoint-tmp").mkdir()
    third, fourth = Work(8 * 30, 80 + 400), Work(24 * 30, 3 * 80 + 400)
    assert command.work_of_others(runs[1:2]) == third.plus(fourth)
    assert TrainingProgress(runs[1:2], command)._left(16) == duration(
        (8 * 30 + 8 * 30 + 24 * 30) * 0.1 + (480 + 480 + 640) * 0.01
    )
    # All that are trained together take their time together.
    assert command.work_of_others(runs) == Work(0, 0)
    assert TrainingProgress(runs, command)._left(16) == duration(4 * (24 + 4.8))


# Lines without a terminal


def test_the_line_of_a_log_file_ends_with_the_time_left_in_the_run(
    run: Run, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = TrainingProgress([run], Command(run.workdir, {run.workdir: ""}))
    with shown.epoch(0, 0):
        shown.show(1, sums(1))
        for step in (2, 3, 4):
            clock.now += 30
            shown.show(step, sums(step))
    assert capsys.readouterr().err == (
        "epoch 1/3, step 3/8: loss 1.5000, accuracy 50.00%, 1 images/s, 150 s left in the epoch, "
        "14 min in the run\n"
    )


def test_lines_name_the_seed_and_the_time_of_all_seeds(
    run: Run, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = {run.workdir: "seed 3 (1 of 2): ", run.workdir / "other": "seed 4 (2 of 2): "}
    shown = TrainingProgress([run], Command(run.workdir, titles))
    with shown.epoch(2, 0):
        shown.show(1, sums(1))
        clock.now += 60
        shown.show(7, sums(7))
    assert re.fullmatch(
        r"seed 3 \(1 of 2\): epoch 3/3, step 7/8: .* 10 s left in the epoch, 6 min in all seeds\n",
        capsys.readouterr().err,
    )


def test_an_evaluation_has_a_line_a_minute_that_names_the_split(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.evaluation_progress("evaluating test", 10000) as show:
        for done in range(1000, 10001, 1000):
            clock.now += 20
            show(done)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating test, image 3000/10000: 50 images/s, 2 min left",
        "evaluating test, image 6000/10000: 50 images/s, 80 s left",
        "evaluating test, image 9000/10000: 50 images/s, 20 s left",
    ]


# Bars on a terminal


class Terminal:
    """A pseudo-terminal as standard error."""

    def __init__(self, columns: int):
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stderr: TextIO = os.fdopen(slave, "w")

    def lines(self) -> list[str]:
        """Everything that was written, between carriage returns, without what cleared a line."""
        self.stderr.flush()
        os.set_blocking(self._master, False)
        written = b""
        try:
            while part := os.read(self._master, 65536):
                written += part
        except BlockingIOError:
            pass
        return [line for line in re.split("[\r\n]", written.decode()) if line.strip()]

    def close(self) -> None:
        self.stderr.close()
        os.close(self._master)


@contextlib.contextmanager
def terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Makes standard error a terminal. No fixture could: pytest sets it anew for the test."""
    with monkeypatch.context() as patch, contextlib.closing(Terminal(columns)) as opened:
        patch.setattr("sys.stderr", opened.stderr)
        yield opened


@pytest.mark.parametrize(
    ("title", "columns", "words"),
    [
        ("", 40, "run 5 h 40 min"),
        ("", 80, "loss 1.5000, 70 min left, run 5 h 40 min"),
        ("", 100, "loss 1.5000, accuracy 50.00%, 70 min left, run 5 h 40 min"),
        ("", 110, "loss 1.5000, accuracy 50.00%, 70 min left in the epoch, 5 h 40 min in the run"),
        ("seed 3 (12 of 50): ", 40, ""),
        ("seed 3 (12 of 50): ", 80, "70 min left, run 5 h 40 min"),
    ],
)
def test_a_bar_fits_in_one_line_with_as_many_words_as_there_is_room_for(
    run: Run,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    title: str,
    columns: int,
    words: str,
) -> None:
    with terminal(columns, monkeypatch) as shown_on:
        shown = TrainingProgress([run], Command(run.workdir, {run.workdir: title}))
        with shown.epoch(0, 0):
            shown.show(1, sums(1))
            clock.now += 700
            shown.show(2, sums(2))
            *_, last = shown_on.lines()
            assert len(last) < columns
        assert last.startswith(f"{title}epoch 1/3:  25%|")
        assert last.rpartition("| ")[2] == words
        assert shown_on.lines() == []


@pytest.mark.parametrize(("columns", "end"), [(40, "| "), (80, "| 556 images/s, 15 s left")])
def test_the_bar_of_an_evaluation_appears_only_after_two_seconds(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int, end: str
) -> None:
    with terminal(columns, monkeypatch) as shown_on:
        with progress.evaluation_progress("evaluating validation", 10000) as show:
            for done in (500, 1000, 1500):
                assert shown_on.lines() == []
                clock.now += 0.9
                show(done)
            (line,) = shown_on.lines()
        assert line.startswith("evaluating validation:  15%|") and len(line) < columns
        assert line.endswith(end)


# Where it is shown


class Recorder:
    """Takes the place of `evaluation_progress`."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.ends: list[int] = []

    @contextlib.contextmanager
    def __call__(self, title: str, count: int) -> Iterator[Callable[[int], None]]:
        told: list[int] = []
        yield told.append
        self.titles.append(title)
        self.ends.append(told[-1])
        assert told[-1] == count


def test_every_evaluation_of_a_training_shows_its_progress(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(train, "evaluation_progress", recorder)
    config.num_epochs = 1
    train.train_and_evaluate(config, tmp_path)
    splits = ["validation", "train", "validation", "test"]
    assert recorder.titles == [f"evaluating {split}" for split in splits]
    assert recorder.ends == [80, 250, 80, 70]


def test_the_evaluations_of_a_checkpoint_show_their_progress(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(evaluation, "evaluation_progress", recorder)
    evaluation.evaluate_checkpoint(trained[0], flip_averaging=True, title="seed 3 (2 of 5): ")
    title = "seed 3 (2 of 5): evaluating test"
    assert recorder.titles == [title, f"{title}, mirrored"]
    assert recorder.ends == [70, 70]


def test_the_evaluation_of_several_seeds_names_each(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(evaluation, "evaluation_progress", recorder)
    config = stored(trained[0] / "config.json")
    write_json(tmp_path / "config.json", config | {"num_seeds": 2})
    for seed in (0, 1):
        (tmp_path / f"seed_{seed}").symlink_to(trained[0])
    evaluation.evaluate_each_seed(tmp_path)
    assert recorder.titles == [f"seed {i} ({i + 1} of 2): evaluating test" for i in (0, 1)]
