"""The list of runs, without JAX."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, stored

from tinyvgg_jax import UserError
from tinyvgg_jax.report.listing import list_runs, runs_table
from tinyvgg_jax.runs.files import write_json

Trained = tuple[Path, dict[str, Any]]


@pytest.fixture
def runs(trained: Trained, tmp_path: Path) -> Path:
    """A finished run, one in its second epoch, one that has just begun, and one of two seeds."""
    for name in ("b/finished", "a"):
        shutil.copytree(trained[0], tmp_path / name)
    (tmp_path / "a" / "summary.json").unlink()
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "a" / "metrics.jsonl").write_text(lines[0])
    for name in ("c", "d", "d/seed_0"):
        (tmp_path / name).mkdir()
        config = stored(trained[0] / "config.json")
        config["num_seeds"] = 2 if name == "d" else 1
        write_json(tmp_path / name / "config.json", config)
    return tmp_path


def test_every_run_is_listed_with_how_far_it_is(runs: Path, trained: Trained) -> None:
    found = {str(run.workdir.relative_to(runs)): run for run in list_runs([runs])}
    assert list(found) == ["a", "b/finished", "c", "d", "d/seed_0"]
    finished, begun = found["b/finished"], found["a"]
    assert (finished.split, finished.accuracy) == ("test", trained[1]["test_accuracy"])
    assert finished.parameters == trained[1]["parameters"]
    first = json.loads((runs / "a" / "metrics.jsonl").read_text())
    assert (begun.split, begun.accuracy) == ("validation", first["validation_accuracy"])
    assert (begun.epochs, begun.num_epochs) == (1, 3)
    assert found["c"].accuracy is None and found["c"].epochs == 0
    assert found["d"].num_seeds == 2 and found["d"].epochs is None
    rows = [line.split() for line in runs_table(list(found.values())).splitlines()]
    accuracy = f"{first['validation_accuracy']:.2%}"
    assert rows[1][:7] == [str(runs / "a"), "bars", accuracy, "validation", "1/3", "-", "1"]
    assert rows[2][4:7] == ["3", f"{finished.parameters:,}", "1"]
    assert rows[3][2:5] == ["-", "0/3", "-"]
    assert rows[4][3] == "-/3"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        ('{"model_type": "bert"}', "is not the config of a run"),
        ('{"num_epochs": 1e999, "data": {"name": "x"}}', "is not the config of a run"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_stops_nothing(
    runs: Path, caplog: pytest.LogCaptureFixture, content: str, reason: str
) -> None:
    (runs / "c" / "config.json").write_text(content)
    (runs / "a" / "metrics.jsonl").write_text("{damaged")
    found = list_runs([runs])
    assert len(found) == 4 and found[0].accuracy is None
    epochs, message = sorted(record.getMessage() for record in caplog.records)
    assert epochs == f"{runs / 'a' / 'metrics.jsonl'} is damaged, so its epochs are not shown."
    assert message.startswith(f"{runs / 'c' / 'config.json'} {reason}") and "\n" not in message


def test_links_are_followed_but_not_for_ever(runs: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "linked"
    elsewhere.mkdir()
    (elsewhere / "run").symlink_to(runs / "b" / "finished")
    (elsewhere / "up").symlink_to(elsewhere)
    assert [run.workdir for run in list_runs([elsewhere])] == [elsewhere / "run"]


def test_a_folder_without_runs_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list_runs([tmp_path]) == []
    assert f"There is no run below {tmp_path}" in caplog.text
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        list_runs([tmp_path / "none"])
    with pytest.raises(UserError, match=r"nnn cannot be read: File name too long"):
        list_runs([tmp_path / ("n" * 300)])


def test_it_does_not_wait_for_jax(runs: Path) -> None:
    """JAX takes a second to import, and a machine for browsing results may not have it."""
    code = (
        "import sys; sys.modules['jax'] = None; from tinyvgg_jax import main;"
        "sys.exit(main.main(['main.py', '--mode=list', *sys.argv[1:]]))"
    )
    (runs / "runs").mkdir()
    (runs / "b").rename(runs / "runs" / "b")
    for folders in ([], ["runs"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *folders],
            cwd=runs,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["run", "runs/b/finished"]
