import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, stored
from ml_collections import ConfigDict

from tinyvgg_jax import TinyVGG, train
from tinyvgg_jax.config import validated
from tinyvgg_jax.data import DatasetInfo, Split, splits
from tinyvgg_jax.errors import DivergedError, InterruptedRunError, UserError
from tinyvgg_jax.evaluate import evaluate
from tinyvgg_jax.pipeline import CallResult, DevicePipeline
from tinyvgg_jax.report.tensorboard import scalars
from tinyvgg_jax.runs import folder as run_folder
from tinyvgg_jax.runs import run
from tinyvgg_jax.runs.checkpoint import Checkpoints
from tinyvgg_jax.runs.folder import read_config
from tinyvgg_jax.runs.restore import abstract_params
from tinyvgg_jax.signals import stop_signals
from tinyvgg_jax.step import make_train_step
from tinyvgg_jax.train import train_and_evaluate

SMALL = TinyVGG(widths=(4, 8), convs_per_block=1, hidden=8, num_classes=5)


def content_of(workdir: Path) -> dict[str, Any]:
    """All that must be the same however often a run was interrupted."""
    config = read_config(workdir)
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["images_per_second"]
    summary = stored(workdir / "summary.json")
    del summary["seconds"]
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
    digests = {
        item.parent.parent.name: json.loads(item.read_text())["digests"]
        for item in (workdir / "checkpoints").glob("*/progress/metadata")
    }
    assert len(digests) == len(steps)
    for digest in digests.values():
        del digest["progress"]  # It holds times.
    return {
        "config": config.to_dict(),
        "records": records,
        "summary": summary,
        "steps": steps,
        "digests": digests,
    }


# A whole run


def test_a_run_learns_and_leaves_what_it_promises(config: ConfigDict, tmp_path: Path) -> None:
    config.num_epochs, config.learning_rate = 6, 0.1
    summary = train_and_evaluate(config, tmp_path)
    assert summary["test_accuracy"] > 0.9
    assert stored(tmp_path / "summary.json") == summary
    assert {"parameters", "seconds", "device", "versions", "step"} < set(summary)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records] == [8, 16, 24, 32, 40, 48]
    rates = [record["learning_rate"] for record in records]
    assert rates == pytest.approx([0.1 * config.learning_rate_decay**e for e in range(6)])
    assert list(records[0]) == [
        "epoch",
        "step",
        "learning_rate",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "seconds",
        "images_per_second",
    ]
    assert records[-1]["validation_accuracy"] == summary["validation_accuracy"]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_has_the_records_figures() -> None:
    record = {"step": 8, "learning_rate": 0.1, "images_per_second": 5.0}
    record |= {"train_loss": 1.0, "train_accuracy": 0.2, "validation_loss": 3.0}
    record |= {"validation_accuracy": 0.4, "epoch": 1, "seconds": 7.0}
    assert scalars(record) == {
        "accuracy/train": 0.2,
        "accuracy/validation": 0.4,
        "images_per_second": 5.0,
        "learning_rate": 0.1,
        "loss/train": 1.0,
        "loss/validation": 3.0,
    }


def test_the_seed_decides_everything(config: ConfigDict, tmp_path: Path) -> None:
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path / "a")
    train_and_evaluate(config, tmp_path / "b")
    config.seed = 1
    train_and_evaluate(config, tmp_path / "c")
    a, b, c = (content_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a["digests"] != c["digests"]


def test_the_test_split_is_evaluated_once_after_training(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spy(model: TinyVGG, params: Any, split: Split, **rest: Any) -> Any:
        sizes.append(len(split))
        return evaluate(model, params, split, **rest)

    monkeypatch.setattr(train, "evaluate", spy)
    train_and_evaluate(config, tmp_path)
    assert sizes == [80, 80, 80, 250, 80, 70]


# Interrupted and resumed


@pytest.fixture(scope="module")
def uninterrupted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import importlib

    config = importlib.import_module("tinyvgg_jax.configs.default").get_config()
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train_and_evaluate(as_small(config, data_dir), workdir)
    return content_of(workdir)


@pytest.mark.parametrize("pipeline", ["stream", "device"])
def test_the_pipelines_end_in_the_same_run(
    config: ConfigDict, tmp_path: Path, uninterrupted: dict[str, Any], pipeline: str
) -> None:
    """On a CPU bit for bit, because there a call of either is one step."""
    config.data.pipeline = pipeline
    train_and_evaluate(config, tmp_path)
    content, expected = content_of(tmp_path), dict(uninterrupted)
    del content["config"], expected["config"]
    assert content == expected


def as_small(config: ConfigDict, data_dir: Path) -> ConfigDict:
    config.num_epochs, config.batch_size, config.learning_rate = 3, 30, 0.05
    config.model.widths, config.model.convs_per_block, config.model.hidden = (4, 8), 1, 8
    config.data.name, config.data.data_dir = "bars", str(data_dir)
    config.data.train_split, config.data.validation_split = "train[:250]", "train[250:]"
    return config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("steps", [1, 8, 11, 24])
def test_a_signal_saves_and_the_same_call_goes_on_bit_for_bit(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
    number: signal.Signals,
    steps: int,
) -> None:
    seen = 0
    handler = signal.getsignal(number)

    epoch = DevicePipeline.epoch

    def interrupting(*arguments: Any) -> Iterator[CallResult]:
        nonlocal seen
        for now in epoch(*arguments):
            seen += 1
            if seen == steps:
                os.kill(os.getpid(), number)
            yield now

    with monkeypatch.context() as patch:
        patch.setattr(DevicePipeline, "epoch", interrupting)
        with pytest.raises(InterruptedRunError, match=f"interrupted at step {steps}") as caught:
            train_and_evaluate(config, tmp_path)
    assert caught.value.signal_number == number
    assert signal.getsignal(number) == handler
    train_and_evaluate(config, tmp_path)
    assert without_steps(content_of(tmp_path)) == without_steps(uninterrupted)


def without_steps(content: dict[str, Any]) -> dict[str, Any]:
    """Leaves out all checkpoints but the last, because only the others may differ."""
    last = str(content["steps"][-1])
    digests = {last: content["digests"][last]}
    return {key: value for key, value in content.items() if key != "steps"} | {"digests": digests}


KILL = """
import json, os, signal, sys, time
from pathlib import Path
from tinyvgg_jax import train
from tinyvgg_jax.runs import checkpoint
from tinyvgg_jax.pipeline import DevicePipeline

config, workdir, where, count = sys.argv[1:]
seen = 0
epoch = DevicePipeline.epoch

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def steps(*arguments):
    global seen
    for now in epoch(*arguments):
        seen += 1
        if seen == int(count):
            die()
        yield now

class Saving(checkpoint.Checkpoints):
    def save(self, *arguments):
        global seen
        super().save(*arguments)
        seen += 1
        if seen == int(count):
            die()

if where == "step":
    DevicePipeline.epoch = steps
else:
    train.Checkpoints = Saving
train.train_and_evaluate(json.loads(config), workdir)
"""


@pytest.mark.parametrize(("where", "count"), [("step", 12), ("save", 2)])
def test_killed_in_a_run_or_a_save_the_same_call_goes_on_bit_for_bit(
    config: ConfigDict, tmp_path: Path, uninterrupted: dict[str, Any], where: str, count: int
) -> None:
    command = [sys.executable, "-c", KILL, json.dumps(config.to_dict()), str(tmp_path), where]
    killed = subprocess.run([*command, str(count)], cwd=ROOT, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "summary.json").exists()
    train_and_evaluate(config, tmp_path)
    assert without_steps(content_of(tmp_path)) == without_steps(uninterrupted)


def test_with_a_damaged_newest_checkpoint_it_goes_on_from_the_one_before(
    config: ConfigDict, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    train_and_evaluate(config, tmp_path)
    (tmp_path / "summary.json").unlink()
    newest = tmp_path / "checkpoints" / "24" / "params"
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    train_and_evaluate(config, tmp_path)
    assert without_steps(content_of(tmp_path)) == without_steps(uninterrupted)


def test_a_finished_run_is_not_run_again(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.num_epochs = 1
    summary = train_and_evaluate(config, tmp_path)
    monkeypatch.setattr(train, "evaluate", None)
    monkeypatch.setattr(DevicePipeline, "epoch", None)
    assert train_and_evaluate(config, tmp_path) == summary


def test_the_summary_of_an_earlier_training_is_not_this_ones(
    config: ConfigDict, tmp_path: Path
) -> None:
    config.num_epochs = 1
    summary = train_and_evaluate(config, tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"test_accuracy": 2.0}))
    shutil.rmtree(tmp_path / "checkpoints")
    again = train_and_evaluate(config, tmp_path)
    assert again["test_accuracy"] == summary["test_accuracy"]


def test_checkpoints_of_nobody_knows_what_are_not_adopted(
    config: ConfigDict, tmp_path: Path
) -> None:
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path)
    (tmp_path / "config.json").unlink()
    config.seed = 5
    with pytest.raises(
        UserError, match=r"holds checkpoints, metrics\.jsonl, summary\.json, but no config\.json"
    ):
        train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
def test_files_of_another_program_are_left_alone(
    config: ConfigDict, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match=rf"holds {name}, but no config.json"):
        train_and_evaluate(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"


def test_without_room_on_the_device_the_error_says_what_to_do(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(DevicePipeline, "epoch", full)
    advice = r"no room for this run\..* lower config\.batch_size .* another --workdir\. RES"
    with pytest.raises(UserError, match=advice):
        train_and_evaluate(config, tmp_path)


def test_a_run_does_not_go_on_with_other_data(config: ConfigDict, tmp_path: Path) -> None:
    config.num_epochs = 1
    config.data.test_split = "test"
    train_and_evaluate(config, tmp_path)
    content = stored(tmp_path / "dataset.json")
    assert content["num_examples"] == {"train": 250, "validation": 80, "test": 70}
    others = content | {"num_examples": content["num_examples"] | {"test": 71}}
    # As many images, of which one has another label.
    relabelled = content | {"digests": content["digests"] | {"train": 64 * "0"}}
    for other in (others, relabelled):
        (tmp_path / "dataset.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="holds a run on other data"):
            train_and_evaluate(config, tmp_path)
    # Earlier versions did not write digests.
    del content["digests"]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    train_and_evaluate(config, tmp_path)
    assert set(stored(tmp_path / "dataset.json")["digests"]) == {"train", "validation", "test"}
    (tmp_path / "dataset.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        train_and_evaluate(config, tmp_path)


def test_a_second_signal_acts_at_once() -> None:
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_it_trains_outside_of_the_main_thread(config: ConfigDict, tmp_path: Path) -> None:
    config.num_epochs = 1
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(train_and_evaluate(config, tmp_path)))
    thread.start()
    thread.join()
    assert result and "test_accuracy" in result[0]


# Errors


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(*arguments: Any, **settings: Any) -> Callable[..., Any]:
        step = make_train_step(*arguments, **settings)

        def poisoned_step(state: Any, batch: Any, key: Any) -> Any:
            params = jax.tree.map(lambda p: jnp.where(state.step == 10, jnp.nan, p), state.params)
            return step(state._replace(params=params), batch, key)

        return poisoned_step

    monkeypatch.setattr(run, "make_train_step", poisoned)
    with pytest.raises(DivergedError, match="not a finite number at step 11") as caught:
        train_and_evaluate(config, tmp_path)
    assert caught.value.step == 11
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [8]
        kept = checkpoints.restore_params("latest", abstract_params(SMALL, (16, 16, 1)))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(kept.params))
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(("learning_rate", "warnings"), [(0.05, 0), (1e4, 1)])
def test_a_loss_that_is_no_better_than_guessing_is_warned_of_once(
    config: ConfigDict,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    learning_rate: float,
    warnings: int,
) -> None:
    config.learning_rate = learning_rate
    summary = train_and_evaluate(config, tmp_path)
    assert (summary["train_loss"] > 1.7) == bool(warnings)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == warnings
    for line in said:
        assert line.startswith(f"The train loss, {summary['train_loss']:.4g}, is no better than")
        assert "Try a lower --config.learning_rate" in line


def test_parameters_that_diverge_in_the_last_step_are_not_saved(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.learning_rate = 1e38
    config.batch_size = 250
    config.num_epochs = 1
    with pytest.raises(DivergedError, match="validation loss is not a finite number at step 1"):
        train_and_evaluate(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_folder_with_a_run_of_another_config_is_refused_and_untouched(
    config: ConfigDict, tmp_path: Path
) -> None:
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    config.seed, config.model.hidden = 5, 9
    with pytest.raises(UserError, match=r"another config \(seed: 5, not 0; model.hidden: 9, not 8"):
        train_and_evaluate(config, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 251, "batch_size is 251, more than the 250 examples"),
        ("data.validation_split", "tset", "unknown split 'tset'"),
        ("data.test_split", "test[:0]", "is empty"),
        ("model.widths", (4,) * 5, "5 blocks, which need images of at least 32x32"),
    ],
)
def test_a_wrong_config_is_found_before_any_image_is_decoded(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: Any,
    message: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(splits, "_whole_split", lambda *_: pytest.fail("decoded"))
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("train_split", "validation_split", "shared"),
    [
        ("train[:250]", "train[250:]", []),
        ("train", "train[250:]", ["80 with the validation split 'train[250:]'"]),
        ("train[:90%]", "train[250:]", ["47 with the validation split 'train[250:]'"]),
        (
            "train+test",
            "train[250:]",
            ["80 with the validation split 'train[250:]'", "70 with the test split 'test'"],
        ),
    ],
)
def test_splits_that_share_examples_are_one_warning(
    config: ConfigDict,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    train_split: str,
    validation_split: str,
    shared: list[str],
) -> None:
    config.data.train_split, config.data.validation_split = train_split, validation_split
    run.make_run(validated(config), tmp_path)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == bool(shared)
    for part in shared:
        assert f"The train split {train_split!r} shares" in warnings[0] and part in warnings[0]
        assert "\n" not in warnings[0]


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_rejected_config_leaves_no_folder(
    config: ConfigDict, tmp_path: Path, num_seeds: int
) -> None:
    config.batch_size, config.num_seeds = 251, num_seeds
    with pytest.raises(UserError, match="batch_size is 251, more than the 250 examples"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_said(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot write to"):
            train_and_evaluate(config, folder)


def test_two_runs_in_one_folder_are_refused(config: ConfigDict, tmp_path: Path) -> None:
    with run_folder.locked(tmp_path), pytest.raises(UserError, match="another process is training"):
        train_and_evaluate(config, tmp_path)
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path)


# The real data


def test_it_learns_the_real_data_in_seconds(
    real_data: tuple[dict[str, Split], DatasetInfo], tmp_path: Path
) -> None:
    import importlib

    config = importlib.import_module("tinyvgg_jax.configs.quick").get_config()
    config.num_epochs = 1
    config.model.widths = (8, 16)
    config.data.train_split = "train[:12800]"
    config.data.validation_split = "train[55000:56000]"
    config.data.test_split = "test[:2000]"
    assert train_and_evaluate(config, tmp_path)["test_accuracy"] > 0.7
