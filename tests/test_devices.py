"""One process on several devices: every test starts one with four, all on the same CPU."""

import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinyvgg_jax import load_predictor, train_and_evaluate
from tinyvgg_jax.config import validated
from tinyvgg_jax.data import Split
from tinyvgg_jax.devices import find_mesh, num_devices
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.evaluate import evaluate
from tinyvgg_jax.runs.restore import restore
from tinyvgg_jax.runs.run import Run, first_state, make_run
from tinyvgg_jax.train import make_pipeline

# Everything that draws random numbers, with sizes that four devices share unevenly if they err.
EVERYTHING: dict[str, Any] = {
    "batch_size": 24,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "weight_decay": 0.01,
    "gradient_clipping": 1.0,
    "model.dropout": 0.3,
    "augment.shift_pixels": 2,
    "augment.cutout_size": 4,
    "augment.erasing": 0.5,
    "augment.mixup_alpha": 0.2,
    "augment.scale": 0.2,
    "augment.aspect": 0.2,
    "augment.shear_degrees": 5.0,
    "augment.background": 0.2,
    "augment.gamma": 0.2,
    "augment.contrast": 0.2,
    "augment.brightness": 0.1,
    "augment.blur_sigma": 0.5,
    "augment.noise": 0.05,
    "augment.inverted": 0.3,
}


def on_four(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of this file in a process with four devices, and returns its result."""
    code = (
        "import json, sys, test_devices;"
        "print(json.dumps(getattr(test_devices, sys.argv[1])(*json.loads(sys.argv[2]))))"
    )
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, function.__name__, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def config_of(fields: dict[str, Any], **changes: Any) -> ConfigDict:
    config = ConfigDict(fields)
    config.update_from_flattened_dict(changes)
    return validated(config)


def make(fields: dict[str, Any], **changes: Any) -> Run:
    return make_run(config_of(fields, **changes), Path("unused"))


@pytest.fixture
def fields(config: ConfigDict) -> dict[str, Any]:
    return dict(config.to_dict())


# Training


def steps_on(fields: dict[str, Any], num_devices: int, pipeline: str) -> dict[str, Any]:
    """The first eight steps: their sums, and the size and compilations of what they end in."""
    run = make(fields, **EVERYTHING, **{"num_devices": num_devices, "data.pipeline": pipeline})
    state = first_state(run)
    steps = make_pipeline([run])
    losses = []
    for result in steps.epoch(state.train, state.sums, 0, 0):
        losses.append(float(result.sums.loss))
        last = result
        if result.step == 8:
            break
    arrays = jax.tree.leaves(jax.device_get(last.state))
    return {
        "losses": losses,
        "correct": int(last.sums.correct),
        "state": [array.ravel().tolist() for array in arrays],
        "programs": steps._update._cache_size(),  # type: ignore[attr-defined]
        "devices": len(last.sums.loss.sharding.device_set),
    }


def compare_numbers_of_devices(fields: dict[str, Any]) -> dict[str, Any]:
    # On one device the pipelines are compared in test_pipeline.py.
    cases = [("device", 1), ("device", 2), ("device", 4), ("stream", 4)]
    return {f"{pipeline} {count}": steps_on(fields, count, pipeline) for pipeline, count in cases}


def test_steps_are_the_same_on_any_number_of_devices(fields: dict[str, Any]) -> None:
    found = on_four(compare_numbers_of_devices, fields)
    one = found["device 1"]
    assert len(one["losses"]) == 8
    for name, other in found.items():
        assert other["devices"] == int(name.split()[1])
        # Each pipeline compiles one program, and no step another.
        assert other["programs"] == 1, name
        np.testing.assert_allclose(other["losses"], one["losses"], rtol=2e-6, err_msg=name)
        assert other["correct"] == one["correct"], name
        for ours, theirs in zip(other["state"], one["state"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6, err_msg=name)


def collectives_of(fields: dict[str, Any], pipeline: str) -> dict[str, Any]:
    """Lists what devices exchange in the program of a step."""
    run = make(fields, **{"batch_size": 24, "data.pipeline": pipeline})
    state = first_state(run)
    steps = make_pipeline([run])
    programs: list[str] = []

    def spy(*arguments: Any) -> Any:
        programs.append(str(update.lower(*arguments).compile().as_text()))
        return update(*arguments)

    update = steps._update
    vars(steps)["_update"] = spy
    next(iter(steps.epoch(state.train, state.sums, 0, 0)))
    lines = [line for line in programs[0].splitlines() if " = " in line]
    pattern = r" (all-[a-z]+|collective-[a-z]+|reduce-scatter|send|recv)(-start)?\("
    found = [(match[1], line) for line in lines if (match := re.search(pattern, line))]
    # The results of an operation stand before its name.
    sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
        for name, line in found
        for dims in re.findall(r"[fs]32\[([0-9,]*)\]", line.split(f" {name}")[0].split(" = ")[1])
    ]
    params = sum(leaf.size for leaf in jax.tree.leaves(state.train.params))
    return {"kinds": sorted({name for name, _ in found}), "sizes": sum(sizes), "params": params}


@pytest.mark.parametrize("pipeline", ["device", "stream"])
def test_devices_exchange_gradients_and_sums_only(fields: dict[str, Any], pipeline: str) -> None:
    found = on_four(collectives_of, fields, pipeline)
    assert found["kinds"] == ["all-reduce"]
    # Beside the gradients there are the loss and the number of correct predictions.
    assert found["sizes"] == found["params"] + 2


def rows_of_a_batch(fields: dict[str, Any]) -> list[list[int]]:
    """The labels that each device holds of a streamed batch."""
    run = make(fields, **{"batch_size": 24, "data.pipeline": "stream"})
    from tinyvgg_jax.data import epoch_order, stream

    order = np.asarray(epoch_order(run.keys.order, 0, len(run.splits["train"])))
    batch = next(stream(run.splits["train"], order, 24, 0, run.mesh))
    whole = run.splits["train"].labels[order[:24]]
    shards = sorted(batch.labels.addressable_shards, key=lambda shard: shard.index[0].start)
    held = [np.asarray(shard.data).tolist() for shard in shards]
    assert np.concatenate(held).tolist() == whole.tolist()
    return held


def test_each_device_holds_its_share_of_a_streamed_batch(fields: dict[str, Any]) -> None:
    assert [len(labels) for labels in on_four(rows_of_a_batch, fields)] == [6, 6, 6, 6]


# A batch that the devices could not share, and need not.
OF_SEEDS = EVERYTHING | {"batch_size": 30, "num_epochs": 1}


def train_seeds(fields: dict[str, Any], workdir: str, num_seeds: int = 5) -> dict[str, Any]:
    return train_and_evaluate(config_of(fields, **OF_SEEDS, num_seeds=num_seeds), workdir)


def test_seeds_are_spread_over_the_devices(fields: dict[str, Any], tmp_path: Path) -> None:
    """Five on four devices, so that one device has two, and others repeat a run."""
    on_four_devices = on_four(train_seeds, fields, str(tmp_path / "four"))
    in_turn = train_seeds(fields, str(tmp_path / "one"))
    for seed in range(5):
        ours, theirs = (restore(tmp_path / name / f"seed_{seed}")[1] for name in ("four", "one"))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, theirs
        )
    ours, theirs = (found["seeds"]["train_loss"]["values"] for found in (on_four_devices, in_turn))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def train_a_seed_more(fields: dict[str, Any], workdir: str) -> dict[str, Any]:
    train_seeds(fields, workdir, 2)
    return train_seeds(fields, workdir, 3)


def test_a_seed_that_is_left_alone_is_trained_on_whole_batches(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    on_four(train_a_seed_more, fields, str(tmp_path / "four"))
    train_and_evaluate(config_of(fields, **OF_SEEDS, seed=fields["seed"] + 2), tmp_path / "one")
    ours, theirs = restore(tmp_path / "four" / "seed_2")[1], restore(tmp_path / "one")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, theirs)


# From one number of devices to another


def train_on(fields: dict[str, Any], workdir: str, changes: dict[str, Any]) -> dict[str, Any]:
    return train_and_evaluate(config_of(fields, **changes), workdir)


@pytest.mark.parametrize("before", [1, 4])
def test_a_run_goes_on_on_another_number_of_devices(
    fields: dict[str, Any], tmp_path: Path, before: int
) -> None:
    changes = {"batch_size": 24, "num_epochs": 1, "model.dropout": 0.1}
    after = {"batch_size": 24, "num_epochs": 2, "model.dropout": 0.1}
    if before == 4:
        on_four(train_on, fields, str(tmp_path / "run"), changes)
        train_and_evaluate(config_of(fields, **after), tmp_path / "run")
    else:
        train_and_evaluate(config_of(fields, **changes), tmp_path / "run")
        on_four(train_on, fields, str(tmp_path / "run"), after)
    train_and_evaluate(config_of(fields, **after), tmp_path / "whole")
    ours = restore(tmp_path / "run")[1]
    theirs = restore(tmp_path / "whole")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), ours, theirs)


# Evaluation and prediction


def evaluate_and_predict(workdir: str) -> dict[str, Any]:
    devices: set[int] = set()

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(model: Any, mesh: Mesh | None, *others: Any) -> Any:
            devices.add(num_devices(mesh))
            return function(model, mesh, *others)

        return call

    model, params = restore(workdir)
    predictor = load_predictor(workdir)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(103, 16, 16, 1)).astype(np.uint8)
    split = Split(images, rng.integers(5, size=103).astype(np.int32))
    with pytest.MonkeyPatch.context() as patch:
        for place in ("evaluate._evaluate_shared", "predict._probabilities"):
            name = f"tinyvgg_jax.{place}"
            patch.setattr(name, noting(pkgutil.resolve_name(name)))
        result = evaluate(model, params, split, 10, mesh=find_mesh())
        probabilities = predictor(images).probabilities
    return {
        "loss": result.loss,
        "correct": result.correct_per_class.tolist(),
        "logits": result.logits.tolist(),
        "probabilities": probabilities.tolist(),
        "devices": sorted(devices),
    }


def test_evaluation_and_prediction_are_shared(trained: tuple[Path, dict[str, Any]]) -> None:
    four = on_four(evaluate_and_predict, str(trained[0]))
    one = evaluate_and_predict(str(trained[0]))
    assert (four.pop("devices"), one.pop("devices")) == ([4], [1])
    assert four.pop("correct") == one.pop("correct")
    for name, value in one.items():
        np.testing.assert_allclose(four[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


# Bad input


def refusals(fields: dict[str, Any], changes: dict[str, Any]) -> str:
    try:
        make(fields, **changes)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"batch_size": 30},
            "config.batch_size is 30, which 4 devices cannot share evenly. Pass "
            "--config.num_devices=3, or --config.batch_size=32.",
        ),
        ({"num_devices": 5}, "config.num_devices is 5, and JAX finds 4 devices here."),
        ({"num_devices": 0}, "config.num_devices must be at least 1, or left out for all, not 0."),
        ({"num_devices": 3}, ""),
    ],
)
def test_what_devices_cannot_share_is_refused(
    fields: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    assert on_four(refusals, fields, changes) == words
