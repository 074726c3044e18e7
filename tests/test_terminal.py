"""Whatever files and folders are named, they cannot steer the terminal."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyvgg_jax import data, report
from tinyvgg_jax.report.tables import PredictionTable, evaluation_table, summary_table
from tinyvgg_jax.report.terminal import Formatter, lines, one_line, printable

EVIL = "a\x1b]0;title\x07b\x9b2Jc\u202ed\x00e\nf\udcff"
ESCAPED = r"a\x1b]0;title\x07b\x9b2Jc\u202ed\x00e\nf\udcff"


def test_what_cannot_be_printed_is_escaped() -> None:
    assert printable(EVIL) == ESCAPED
    assert printable("Ärmel 10 °C, 袖") == "Ärmel 10 °C, 袖"
    assert lines("a\x1b\nb") == "a\\x1b\nb"
    assert one_line("a\n\t b\x1b") == "a b\\x1b"


class _Full(io.StringIO):
    """Standard error in a file on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [None, _Full()], ids=["closed", "full"])
def test_progress_that_cannot_be_shown_ends_nothing(
    stream: _Full | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    data.progress.say("a line")
    for module in (data.progress, report.progress):
        monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    with data.progress.progress(100, "decoding") as advance:
        advance(50)
        advance(50)
    bar = report.progress._Bar("epoch 1/2", 100)
    bar.show(50, ["half"], "half")
    bar.close()


def test_the_command_line_does_without_standard_error() -> None:
    command = f"{sys.executable} -m tinyvgg_jax.main --mode list nowhere 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert done.returncode == 2 and done.stdout == b""


def test_an_error_that_cannot_be_printed_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyvgg_jax import main

    monkeypatch.setattr(sys, "stderr", _Full())
    assert main._fail("broken.png: not an image", 1) == 1


def test_log_messages_are_escaped() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "in %s", ("a\x1b[2J",), None)
    assert Formatter("%(message)s").format(record) == r"in a\x1b[2J"


@pytest.mark.parametrize("table", ["predictions", "evaluation", "summary"])
def test_no_name_breaks_a_table(table: str) -> None:
    if table == "predictions":
        predictions = PredictionTable((EVIL, "other"))
        text = predictions.row(EVIL, np.array([0.4, 0.6]), False)
        assert len(text.splitlines()) == 2
    elif table == "evaluation":
        row = {"class": EVIL, "accuracy": 0.5, "correct": 1, "count": 2}
        content = {"per_class": [row], "accuracy": 0.5, "correct": 1, "count": 2, "loss": 1.0}
        text = evaluation_table({**content, "step": 1}, "test")
        assert len(text.splitlines()) == 3
    else:
        summary = {
            f"{s}_{k}": 0.5 for s in ("train", "validation", "test") for k in ("accuracy", "loss")
        }
        others = {"dataset": "x", "parameters": 1, "seconds": 1.0, "device": EVIL}
        text = summary_table({**summary, **others}, Path(EVIL))
        assert len(text.splitlines()) == 5
    assert ESCAPED in text and text == lines(text)
