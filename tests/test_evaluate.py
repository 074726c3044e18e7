import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stored
from ml_collections import ConfigDict

from tinyvgg_jax import UserError, restore
from tinyvgg_jax import evaluate as evaluation
from tinyvgg_jax.data import DatasetInfo, Split, load_splits
from tinyvgg_jax.evaluate import evaluate
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.report.evaluation import (
    DataFolders,
    evaluate_checkpoint,
    evaluate_each_seed,
    evaluation_content,
    write_evaluation,
)
from tinyvgg_jax.runs.files import write_json
from tinyvgg_jax.runs.restore import build_model
from tinyvgg_jax.step import to_float


@pytest.fixture(scope="module")
def network() -> tuple[TinyVGG, Any, Split]:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(53, 8, 8, 1)).astype(np.uint8)
    model = TinyVGG(widths=(4,), convs_per_block=1, hidden=8, num_classes=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    return model, params, Split(images, rng.integers(3, size=53).astype(np.int32))


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluates in the way of an accelerator, or of a CPU."""
    if way == "_evaluate_on_device":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    else:
        monkeypatch.setattr(evaluation, "fits_on_device", lambda _: False)


@pytest.mark.parametrize("way", ["_evaluate_streamed", "_evaluate_on_device"])
@pytest.mark.parametrize("batch_size", [1, 10, 53, 100])
def test_metrics_are_exact_whatever_the_batch_size(
    network: tuple[TinyVGG, Any, Split],
    batch_size: int,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(way, monkeypatch)
    model, params, split = network
    logits = np.asarray(apply(model, params, to_float(jnp.asarray(split.images))), np.float64)
    right = logits.argmax(1) == split.labels
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(53), split.labels]
    result = evaluate(model, params, split, batch_size)
    assert (result.count, result.correct) == (53, right.sum())
    assert result.count_per_class.tolist() == np.bincount(split.labels, minlength=4).tolist()
    by_class = [right[split.labels == label].sum() for label in range(4)]
    assert result.correct_per_class.tolist() == by_class
    assert result.accuracy == right.mean()
    assert result.mean_loss == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("way", ["_evaluate_streamed", "_evaluate_on_device"])
def test_progress_is_told_up_to_the_last_example_and_changes_nothing(
    network: tuple[TinyVGG, Any, Split], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(way, monkeypatch)
    told: list[int] = []
    result = evaluate(*network, 5, told.append)
    assert told == ([10, 15, 20, 25, 30, 35, 40, 53] if way == "_evaluate_streamed" else [53])
    np.testing.assert_array_equal(result.logits, evaluate(*network, 5).logits)


def test_the_loss_of_guessing_is_the_entropy_of_the_classes(
    network: tuple[TinyVGG, Any, Split],
) -> None:
    model, params, split = network
    # Logits that ignore the image and are the log frequencies of the classes; the last has none.
    counts = np.bincount(split.labels, minlength=4)
    with np.errstate(divide="ignore"):
        bias = np.maximum(np.log(counts / len(split)), -100)
    guessing = jax.tree.map(jnp.zeros_like, params)
    guessing["logits"]["bias"] = jnp.asarray(bias, jnp.float32)
    result = evaluate(model, guessing, split)
    assert result.guessing_loss == pytest.approx(result.mean_loss, rel=1e-5)
    assert result.guessing_loss < np.log(3)


def test_evaluating_again_compiles_nothing(network: tuple[TinyVGG, Any, Split]) -> None:
    from tinyvgg_jax.evaluate import _evaluate_shared

    model, params, split = network
    evaluate(model, params, split, 10)
    before = _evaluate_shared._cache_size()  # type: ignore[attr-defined]
    assert before > 0
    evaluate(model.clone(), jax.tree.map(lambda a: a + 1, params), split, 10)
    assert _evaluate_shared._cache_size() == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_run_evaluated_again_gives_its_summary_to_the_last_image(
    trained: tuple[Path, dict[str, Any]], split: str
) -> None:
    workdir, summary = trained
    content = evaluation_content(evaluate_checkpoint(workdir, split))
    write_evaluation(workdir, split, content)
    assert content["accuracy"] == summary[f"{split}_accuracy"]
    assert content["loss"] == summary[f"{split}_loss"]
    assert content["step"] == summary["step"]
    assert content["correct"] == sum(row["correct"] for row in content["per_class"])
    assert content["count"] == {"train": 250, "validation": 80, "test": 70}[split]
    assert stored(workdir / "evaluation" / f"{split}.json") == content


def test_a_folder_that_only_the_runs_config_names_is_used_or_left_alone(
    trained: tuple[Path, dict[str, Any]],
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    accuracy = trained[1]["test_accuracy"]
    assert evaluate_checkpoint(workdir).result.accuracy == accuracy
    assert not caplog.records

    config = stored(workdir / "config.json")
    config["data"]["data_dir"] = str(tmp_path / "a strangers")
    config["data"]["source_dir"] = str(tmp_path / "sources")
    write_json(workdir / "config.json", config)
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(data_dir))
    with caplog.at_level(logging.WARNING, "tinyvgg_jax"):
        assert [one.result.accuracy for one in evaluate_each_seed(workdir)] == [accuracy]
    (record,) = caplog.records
    assert str(tmp_path / "a strangers") in record.getMessage()
    assert not (tmp_path / "a strangers").exists()

    # A folder that is given beside the run is not replaced by another.
    with pytest.raises(UserError, match="no prepared dataset 'bars'"):
        evaluate_checkpoint(workdir, folders=DataFolders(str(tmp_path / "given")))


def test_restore_gives_the_best_checkpoint_without_any_dataset(
    trained: tuple[Path, dict[str, Any]], data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, _ = trained
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    best = max(records, key=lambda record: (record["validation_accuracy"], record["step"]))
    split = load_splits("bars", {"v": "train[250:]"}, str(data_dir))[0]["v"]
    monkeypatch.setattr("tinyvgg_jax.data.load_splits", None)
    monkeypatch.setattr("tinyvgg_jax.data.splits.load_splits", None)
    model, params = restore(workdir)
    assert evaluate(model, params, split).accuracy == best["validation_accuracy"]
    assert apply(model, params, to_float(jnp.asarray(split.images[:3]))).shape == (3, 5)
    _, latest = restore(str(workdir), "latest")
    assert evaluate(model, latest, split).accuracy == records[-1]["validation_accuracy"]


def test_restore_is_silent(trained: tuple[Path, dict[str, Any]]) -> None:
    code = f"import tinyvgg_jax; tinyvgg_jax.restore({str(trained[0])!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_what_cannot_be_evaluated_is_said(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    workdir, _ = trained
    with pytest.raises(UserError, match=r"unknown split 'tset'.*did you mean 'test'"):
        evaluate_checkpoint(workdir, "tset")
    with pytest.raises(UserError, match="no checkpoint of step 7; there are"):
        evaluate_checkpoint(workdir, "test", 7)
    with pytest.raises(UserError, match="holds no run"):
        restore(tmp_path)
    for name in ("config.json", "dataset.json"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        restore(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        restore(tmp_path)


def test_images_too_small_for_the_blocks_are_refused(config: ConfigDict) -> None:
    config.model.widths = (4, 4, 4, 4, 4)
    with pytest.raises(UserError, match="5 blocks, which need images of at least 32x32"):
        build_model(config, DatasetInfo((16, 16, 1), ("a", "b")))
