"""Runs that earlier code wrote must restore, evaluate and resume for ever.

`earlier_runs.tar.gz` holds two finished runs of two epochs on the dataset of `conftest.py`, written
by version 0.1.0 before its files were moved: `plain` is the default recipe, `everything` has every
option of that time on. Do not make it anew: it stands for the runs that people have.
"""

import shutil
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import stored

from tinyvgg_jax import load_predictor, restore, train_and_evaluate
from tinyvgg_jax.report.evaluation import DataFolders, evaluate_checkpoint

ARCHIVE = Path(__file__).with_name("earlier_runs.tar.gz")


@pytest.fixture(params=["plain", "everything"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a run, as it was written."""
    with tarfile.open(ARCHIVE) as archive:
        # Python before 3.11.4 has no filters, and asks for none.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safely)
    return tmp_path / str(request.param)


def summary_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = stored(run / "summary.json")
    return content


def test_an_earlier_run_is_restored_and_evaluated(run: Path, data_dir: Path) -> None:
    before = summary_of(run)
    for split in ("train", "validation", "test"):
        found = evaluate_checkpoint(run, split, folders=DataFolders(str(data_dir))).result
        assert found.accuracy == before[f"{split}_accuracy"]
        assert found.mean_loss == pytest.approx(before[f"{split}_loss"], rel=1e-5)
    assert load_predictor(run).class_names == ("top", "upper", "middle", "lower", "bottom")


def test_an_earlier_run_is_resumed_to_the_same_end(run: Path, data_dir: Path) -> None:
    before = summary_of(run)
    _, expected = restore(run, 16)
    # As if it had been killed in its second epoch.
    shutil.rmtree(run / "checkpoints" / "16")
    (run / "summary.json").unlink()
    config = stored(run / "config.json")
    config["data"]["data_dir"] = str(data_dir)
    after = train_and_evaluate(config, run)
    for split in ("train", "validation", "test"):
        assert after[f"{split}_accuracy"] == before[f"{split}_accuracy"]
        assert after[f"{split}_loss"] == pytest.approx(before[f"{split}_loss"], rel=1e-5)
    # Bit for bit on the machine that wrote it; other processors round otherwise.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        restore(run, 16)[1],
        expected,
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["16", "8"]


def test_a_finished_earlier_run_stays_as_it_is(run: Path, data_dir: Path) -> None:
    config = stored(run / "config.json")
    config["data"]["data_dir"] = str(data_dir)
    assert train_and_evaluate(config, run) == summary_of(run)
