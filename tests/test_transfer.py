"""Runs that start from a trained one, and layers that stay as they are."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tinyvgg_jax import processes, train_and_evaluate
from tinyvgg_jax.config import validated
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.runs.files import write_json
from tinyvgg_jax.runs.restore import restore
from tinyvgg_jax.runs.run import first_state, make_run, with_source
from tinyvgg_jax.runs.transfer import fitting_layers, frozen_layers, trained_network

LAYERS = ["conv1_1", "conv2_1", "dense", "logits"]


def layers_equal(ours: Any, theirs: Any) -> dict[str, bool]:
    return {
        layer: all(
            np.array_equal(a, b)
            for a, b in zip(*map(jax.tree.leaves, (ours[layer], theirs[layer])), strict=True)
        )
        for layer in ours
    }


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_run_starts_with_the_layers_that_fit(
    config: ConfigDict, trained: tuple[Path, dict[str, Any]], ema_decay: float, tmp_path: Path
) -> None:
    """Another width of the dense layer fits neither it nor the one after it."""
    config.init_from, config.model.hidden, config.ema_decay = str(trained[0]), 16, ema_decay
    config.seed = 5
    run = with_source(make_run(config, tmp_path))
    state = first_state(run).train
    best = restore(trained[0])[1]
    taken = layers_equal({k: state.params[k] for k in LAYERS[:2]}, best)
    assert taken == dict.fromkeys(LAYERS[:2], True)
    assert state.params["dense"]["kernel"].shape[1] == 16
    new = first_state(make_run(config, tmp_path)).train
    assert layers_equal(state.params, new.params) == {
        "conv1_1": False,
        "conv2_1": False,
        "dense": True,
        "logits": True,
    }
    if ema_decay:
        jax.tree.map(np.testing.assert_array_equal, state.average, state.params)


def test_one_line_says_what_is_taken(
    config: ConfigDict, trained: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    config.init_from, config.model.hidden = f"{trained[0]}:latest", 16
    run = with_source(make_run(config, Path("unused")))
    with caplog.at_level(logging.INFO, "tinyvgg_jax.runs.run"):
        first_state(run)
    lines = [one.getMessage() for one in caplog.records if one.name == "tinyvgg_jax.runs.run"]
    assert lines == [
        f"Starting from {trained[0]}:latest, with its layers conv1_1, conv2_1; new: dense, logits."
    ]


def test_a_step_may_be_named(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = trained[0]
    for name, step in (("", "best"), (":best", "best"), (":latest", "latest"), (":24", 24)):
        ours = trained_network(f"{folder}{name}").params
        assert all(layers_equal(ours, restore(folder, step)[1]).values()), name
    # A folder's own name may end like that.
    (tmp_path / "a:1").symlink_to(folder)
    trained_network(f"{tmp_path / 'a:1'}")
    with pytest.raises(UserError, match="there is no checkpoint of step 7"):
        trained_network(f"{folder}:7")


def test_a_run_goes_on_when_its_source_is_gone(
    config: ConfigDict, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "source")
    config.init_from, config.freeze = str(tmp_path / "source"), ("conv1",)
    whole = train_and_evaluate(config, tmp_path / "whole")
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path / "parts")
    shutil.rmtree(tmp_path / "source")
    config.num_epochs = 3
    parts = train_and_evaluate(config, tmp_path / "parts")
    assert parts["test_loss"] == whole["test_loss"]


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_frozen_layers_stay_as_they_are(
    config: ConfigDict,
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    optimizer: str,
) -> None:
    config.init_from, config.freeze = str(trained[0]), ("conv1", "dense")
    config.optimizer = optimizer
    config.weight_decay, config.gradient_clipping, config.ema_decay = 0.01, 1.0, 0.9
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path)
    assert layers_equal(restore(tmp_path)[1], restore(trained[0])[1]) == {
        "conv1_1": True,
        "conv2_1": False,
        "dense": True,
        "logits": False,
    }


def test_layers_are_named_whole_or_by_block() -> None:
    params = dict.fromkeys(["conv1_1", "conv1_2", "conv10_1", "dense"], 0)
    assert frozen_layers(params, ("conv1",)) == {"conv1_1", "conv1_2"}
    assert frozen_layers(params, ("conv1_2", "dense")) == {"conv1_2", "dense"}
    with pytest.raises(UserError, match="'conv3'; the layers are conv10_1, conv1_1, conv1_2"):
        frozen_layers(params, ("conv3",))
    with pytest.raises(UserError, match="leaves no layer to be trained"):
        frozen_layers(params, ("conv1", "conv10", "dense"))


def test_other_classes_have_a_last_layer_of_their_own(
    config: ConfigDict,
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = shutil.copytree(trained[0], tmp_path / "source")
    content = json.loads((source / "dataset.json").read_text())
    content["class_names"] = list(reversed(content["class_names"]))
    (source / "dataset.json").unlink()
    write_json(source / "dataset.json", {k: v for k, v in content.items() if k != "sha256"})
    for folder, last_is_taken in ((trained[0], True), (source, False)):
        config.init_from, config.freeze = str(folder), ("logits",)
        run = with_source(make_run(config, tmp_path / "run"))
        assert run.source is not None
        assert ("logits" in run.source) == last_is_taken and "dense" in run.source
        assert ("config.freeze keeps logits" in caplog.text) != last_is_taken


def test_a_damaged_source_is_said(
    config: ConfigDict, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source = shutil.copytree(trained[0], tmp_path / "source")
    for file in (source / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    config.init_from = str(source)
    with pytest.raises(UserError) as raised:
        train_and_evaluate(config, tmp_path / "run")
    assert str(raised.value).startswith("config.init_from: ") and "damaged" in str(raised.value)
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_a_source_that_one_process_cannot_reach_ends_all(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.init_from = str(tmp_path / "nothing")
    made = make_run(validated(config), tmp_path / "run")
    monkeypatch.setattr(processes, "count", lambda: 2)
    # As if this were the second process, and the first had found the source.
    monkeypatch.setattr(processes, "exchange", lambda message: [None, message])
    with pytest.raises(UserError, match=r"process 1: config\.init_from: .* holds no run"):
        with_source(made)


def test_a_source_that_does_not_fit_leaves_nothing_behind(
    config: ConfigDict, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config.model.widths, config.model.hidden = (5, 9), 16
    for source, words in (
        (tmp_path / "nothing", "config.init_from: "),
        ("n" * 300 + ":5", "config.init_from: .*File name too long"),
        (trained[0], "is another network in every layer"),
    ):
        config.init_from = str(source)
        with pytest.raises(UserError, match=words):
            train_and_evaluate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        # Nor does it in the folder of several seeds.
        config.num_seeds = 2
    with pytest.raises(UserError, match="another network in every layer"):
        fitting_layers({"a": np.zeros(3)}, {"a": np.zeros(4)}, "it")
