"""The report of a machine: its parts, and what is left of it when something goes wrong."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from tinyvgg_jax import InterruptedRunError, UserError
from tinyvgg_jax.benchmark.cases import Setting
from tinyvgg_jax.benchmark.parts import (
    REHEARSAL,
    Part,
    Progress,
    Size,
    all_parts,
    check_fields,
    chosen_parts,
)
from tinyvgg_jax.benchmark.recipe_worker import time_to_target
from tinyvgg_jax.benchmark.report import Report

PARTS = [
    *("epochs", "default", "train-32", "train-512", "train-4096", "fast", "fast-at-once"),
    *("infer-1", "infer-32", "infer-256", "best-at-once", "best"),
]


def part(name: str, *steps: Progress | BaseException) -> Part:
    """A part that measures, or raises, what it is given."""

    def run() -> Generator[Progress]:
        for step in steps:
            if isinstance(step, BaseException):
                raise step
            yield step

    return Part(name, f"Heading of {name}", run())


def states(path: Path) -> dict[str, str]:
    """The state of each part, as the file tells."""
    return dict(re.findall(r"^- ([\w-]+): (.*)$", path.read_text().partition("After ")[2], re.M))


def test_a_part_that_fails_is_named_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    parts = [
        part(
            "first", Progress("| 1 |", "1 of 2 seeds"), ValueError("no /some/folder/here\nor there")
        ),
        part("second", Progress("| 2 |")),
    ]
    report = Report(path, "The head at 5 images/s/GPU", parts, 60)
    assert states(path) == {"first": "not begun", "second": "not begun"}
    report.measure()
    assert report.failed == ["first"]
    # No path of the machine, nor more than one line.
    assert states(path) == {"first": "failed: no here", "second": "done in 0 s"}
    text = path.read_text()
    assert text.startswith("The head at 5 images/s/GPU\n")
    assert "## Heading of first\n\n| 1 |\n\n## Heading of second\n\n| 2 |\n" in text


def test_an_interruption_leaves_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    parts = [
        part("first", Progress("| 1 |")),
        part("second", Progress("| 2 |", "4 of 5 seeds"), InterruptedRunError("stop", 15)),
        part("third", Progress("| 3 |")),
    ]
    with pytest.raises(InterruptedRunError):
        Report(path, "The head", parts, 60).measure()
    assert states(path) == {"first": "done in 0 s", "second": "interrupted", "third": "not begun"}
    text = path.read_text()
    assert "| 1 |" in text and "| 2 |" in text and "| 3 |" not in text


def test_no_part_or_seed_begins_after_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, now = tmp_path / "report.md", [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def seeds(count: int) -> Generator[Progress]:
        for done in range(1, count + 1):
            now[0] += 40
            yield Progress(
                f"| {done} of {count} |", f"{count - done} seeds" if done < count else ""
            )

    def measured(parts: list[Part]) -> dict[str, str]:
        now[0] = 0.0
        report = Report(path, "The head", parts, 90)
        report.measure()
        assert not report.failed
        return states(path)

    assert measured([Part("a", "A", seeds(4)), part("b", Progress("| 9 |"))]) == {
        "a": "stopped: the time was over, 1 seeds left",
        "b": "not begun: the time was over",
    }
    assert "| 3 of 4 |" in path.read_text() and "| 9 |" not in path.read_text()
    # A part that is complete when the time is over is done.
    assert measured([Part("a", "A", seeds(3))]) == {"a": "done in 120 s"}


def test_the_parts_come_in_the_order_of_their_importance() -> None:
    parts = all_parts(Size(), Setting(on_cpu=False, dtypes=("float32",), brief=True))
    assert [part.name for part in parts] == PARTS
    assert chosen_parts(None, parts) == parts
    found = [part.name for part in chosen_parts(["best", "train", "infer-1"], parts)]
    assert found == ["best", "train-32", "train-512", "train-4096", "infer-1"]
    with pytest.raises(UserError, match="unknown part 'swim'; one of epochs, default"):
        chosen_parts(["swim"], parts)


def test_wrong_fields_are_found_before_anything_is_measured() -> None:
    check_fields(Size(fields={"data.name": "bars"}))
    with pytest.raises(UserError, match="batch_size"):
        check_fields(Size(fields={"batch_size": "many"}))


def test_the_time_to_a_target_ends_with_the_first_epoch_that_reaches_it() -> None:
    ends = [9.0, 12.0, 14.0, 16.0]
    found = time_to_target([0.5, 0.95, 0.93, 0.96], ends, 0.94)
    # The first epoch counts as the median of the others, 2 s, and the second took 3 s.
    assert found == {"target_epoch": 2, "target_seconds": 12.0, "target_seconds_compiled": 5.0}
    assert set(time_to_target([0.5], [9.0], 0.94).values()) == {None}
    # A single epoch does not tell how long it takes without compilation.
    assert time_to_target([0.95], [9.0], 0.94)["target_seconds_compiled"] is None


def rehearsal(folder: Path, data_dir: Path, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "tinyvgg_jax.benchmark", "--rehearse"]
    data = ["--set=data.name=bars", f"--set=data.data_dir={data_dir}"]
    return [*command, "--report", str(folder / "report.md"), *data, *arguments]


def options(folder: Path) -> dict[str, Any]:
    # Programs so small need no optimization, which takes longer than they run.
    environment = {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # Threads that wait for one another, for next to no work, take long where cores are busy.
    environment["OMP_NUM_THREADS"] = "1"
    return {"cwd": folder, "env": os.environ | environment, "text": True}


@pytest.mark.slow
def test_a_rehearsal_does_everything(data_dir: Path, tmp_path: Path) -> None:
    peer = ["--peer=torch"] if importlib.util.find_spec("torch") else []
    done = subprocess.run(
        rehearsal(tmp_path, data_dir, *peer),
        **options(tmp_path),
        capture_output=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "report.md").read_text()
    found = states(tmp_path / "report.md")
    assert [re.sub(r"\d+", "", name) for name in found] == [
        *("epochs", "default", "train-", "fast", "fast-at-once", "infer-", "best-at-once", "best")
    ]
    assert all(state.startswith("done in ") for state in found.values())
    assert text.count("\n## ") == len(found)
    assert "A rehearsal" in text and "`data.data_dir" not in text
    assert str(tmp_path) not in text and str(data_dir) not in text
    assert text.count("reached by 2 of 2 seeds") == 5
    assert "of the roofline" in text
    assert ("times as fast as the fastest peer, PyTorch" in text) == bool(peer)


def test_a_report_that_is_stopped_holds_the_parts_that_were_done(
    data_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "report.md"
    command = rehearsal(tmp_path, data_dir, "--parts=infer,default", "--dtypes=float32")
    with subprocess.Popen(command, **options(tmp_path), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("default: "):
                break
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    found = states(path)
    size = REHEARSAL.inference_batch_sizes[0]
    assert found.pop(f"infer-{size}").startswith("done in ")
    assert found == {"default": "interrupted"}
    assert "| tinyvgg_jax, float32 | 2 | " in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--report=r.md", "--set=colour=red"], "colour=red"),
        (["--report=r.md", "--set=batch_size=0"], "batch_size"),
        (["--report=r.md", "--parts=swim"], "swim"),
        (["--report=r.md", "--cases=train"], "--parts"),
        (["--report=no/folder/r.md"], "no/folder/r.md"),
        (["--rehearse"], "--report"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tinyvgg_jax.benchmark", *arguments]
    done = subprocess.run(
        command, **options(tmp_path), capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
