import logging
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stored
from ml_collections import ConfigDict
from scipy import stats

from tinyvgg_jax import InterruptedRunError, UserError, restore, train, train_and_evaluate
from tinyvgg_jax.data import SPLITS, Split, decode_splits, load_splits
from tinyvgg_jax.errors import DivergedError
from tinyvgg_jax.evaluate import evaluate
from tinyvgg_jax.model import apply
from tinyvgg_jax.pipeline import DevicePipeline
from tinyvgg_jax.report.compare import compare_runs
from tinyvgg_jax.report.evaluation import (
    evaluate_checkpoint,
    evaluate_each_seed,
    seeds_content,
)
from tinyvgg_jax.runs import run
from tinyvgg_jax.runs.run import first_state
from tinyvgg_jax.runs.seeds import statistics_of
from tinyvgg_jax.step import to_float

MEASURED = [f"{split}_{kind}" for split in SPLITS for kind in ("accuracy", "loss")]


@pytest.fixture
def modern(config: ConfigDict) -> ConfigDict:
    """A config with every option that adds to the state, and many that draw random numbers."""
    config.num_seeds, config.num_epochs, config.seed = 2, 2, 5
    config.optimizer, config.schedule, config.warmup_epochs = "muon", "cosine", 0.5
    config.nesterov, config.weight_decay, config.gradient_clipping = True, 0.01, 5.0
    config.label_smoothing, config.ema_decay, config.model.dropout = 0.1, 0.9, 0.1
    config.model.kernel_init = "he_normal"
    config.augment.update(alternating_flip=True, shift_pixels=1, cutout_size=2, mixup_alpha=0.1)
    return config


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains all seeds at once, as on an accelerator."""
    monkeypatch.setattr(train, "_accelerated", lambda: True)


def params_of(workdir: Path) -> Any:
    return restore(workdir, "latest")[1]


def assert_close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), ours, theirs)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_all_at_once_is_each_alone_to_rounding(
    modern: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """On a CPU a program holds the runs one after another, on a GPU mapped by `jax.vmap`."""
    one_by_one = train_and_evaluate(modern, tmp_path / "in turn")
    monkeypatch.setattr(train, "_accelerated", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    together = train_and_evaluate(modern, tmp_path / "together")
    for seed in (5, 6):
        ours, theirs = (tmp_path / name / f"seed_{seed}" for name in ("together", "in turn"))
        assert_close(params_of(ours), params_of(theirs))
        config = stored(ours / "config.json")
        assert (config["seed"], config["num_seeds"]) == (seed, 1)
        assert len((ours / "metrics.jsonl").read_text().splitlines()) == 2
    different = [params_of(tmp_path / "together" / f"seed_{seed}") for seed in (5, 6)]
    kernels = [params["dense"]["kernel"] for params in different]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    for name in MEASURED:
        assert together[name] == pytest.approx(one_by_one[name], abs=0.02)


def test_a_seed_of_several_is_the_run_of_that_seed(config: ConfigDict, tmp_path: Path) -> None:
    config.num_seeds, config.seed, config.num_epochs = 2, 3, 1
    summary = train_and_evaluate(config, tmp_path / "both")
    config.num_seeds, config.seed = 1, 4
    alone = train_and_evaluate(config, tmp_path / "alone")
    jax.tree.map(
        np.testing.assert_array_equal,
        params_of(tmp_path / "both" / "seed_4"),
        params_of(tmp_path / "alone"),
    )
    found = summary["seeds"]["validation_accuracy"]
    assert found["values"][1] == alone["validation_accuracy"]
    assert found["n"] == summary["num_seeds"] == 2
    assert (
        summary["validation_accuracy"] == found["mean"] == pytest.approx(sum(found["values"]) / 2)
    )
    # The folder of all seeds cannot be restored, but each seed's can.
    with pytest.raises(UserError, match=r"holds runs of 2 seeds; name one of them, like .*seed_3"):
        restore(tmp_path / "both")


class _StopAfter:
    """Sends SIGTERM to this process after so many calls of a pipeline."""

    def __init__(self, calls: int, monkeypatch: pytest.MonkeyPatch):
        self._left = calls
        original = DevicePipeline.epoch

        def epoch(pipeline: Any, *arguments: Any) -> Any:
            for now in original(pipeline, *arguments):
                self._left -= 1
                if self._left == 0:
                    signal_myself()
                yield now

        monkeypatch.setattr(DevicePipeline, "epoch", epoch)


def signal_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_interrupted_together_they_go_on_together(
    modern: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    """The signal comes within the first epoch or at its end; the results are equal bit for bit."""
    train_and_evaluate(modern, tmp_path / "whole")
    for calls in (3, 8):
        cut = tmp_path / f"cut {calls}"
        with monkeypatch.context() as patch:
            _StopAfter(calls, patch)
            with pytest.raises(InterruptedRunError, match=rf"everything is saved in .*cut {calls}"):
                train_and_evaluate(modern, cut)
        train_and_evaluate(modern, cut)
        for seed in (5, 6):
            whole, resumed = (path / f"seed_{seed}" for path in (tmp_path / "whole", cut))
            jax.tree.map(np.testing.assert_array_equal, params_of(resumed), params_of(whole))


def test_every_line_about_a_seed_names_it(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "tinyvgg_jax")
    config.num_seeds, config.num_epochs, config.seed = 2, 1, 3
    with monkeypatch.context() as patch:
        _StopAfter(8 + 3, patch)
        with pytest.raises(InterruptedRunError) as caught:
            train_and_evaluate(config, tmp_path)
    # The folder is the one to pass again.
    assert str(caught.value) == (
        "seed 4 (2 of 2): interrupted at step 3; everything is saved in "
        f"{tmp_path}. Run the same command again to go on from there."
    )
    train_and_evaluate(config, tmp_path)
    train_and_evaluate(config, tmp_path)
    lines = [line.getMessage() for line in caplog.records if line.name == "tinyvgg_jax.train"]
    expected = [
        r"seed 3 \(1 of 2\): epoch 1/1: train loss .*",
        r"seed 3 \(1 of 2\): Evaluating \.\.\.",
        r"seed 3 \(1 of 2\): Going on from step 8 in .*seed_3\.",
        r"seed 3 \(1 of 2\): This run is finished already\.",
        r"seed 4 \(2 of 2\): Going on from step 3 in .*seed_4\.",
        r"seed 4 \(2 of 2\): epoch 1/1: train loss .*",
        r"seed 4 \(2 of 2\): Evaluating \.\.\.",
        r"seed 3 \(1 of 2\): Going on from step 8 in .*seed_3\.",
        r"seed 3 \(1 of 2\): This run is finished already\.",
        r"seed 4 \(2 of 2\): Going on from step 8 in .*seed_4\.",
        r"seed 4 \(2 of 2\): This run is finished already\.",
    ]
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_a_seed_that_diverges_is_named_among_those_that_train_with_it(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    def poisoned(run: Any) -> Any:
        state = first_state(run)
        if run.config.seed == 1:
            params = jax.tree.map(lambda leaf: leaf * jnp.nan, state.train.params)
            state.train = state.train._replace(params=params)
        return state

    monkeypatch.setattr(train, "first_state", poisoned)
    config.num_seeds = 2
    with pytest.raises(DivergedError, match=r"at step 1\. What was saved .* kept in .*seed_1\."):
        train_and_evaluate(config, tmp_path)


def test_random_numbers_follow_from_the_seed_however_jax_is_set(
    modern: ConfigDict, tmp_path: Path
) -> None:
    modern.num_seeds, modern.num_epochs, modern.warmup_epochs = 1, 1, 0.0
    expected = train_and_evaluate(modern, tmp_path / "default")
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        found = train_and_evaluate(modern, tmp_path / "other")
    assert found["train_loss"] == expected["train_loss"]


def test_seeds_that_have_not_begun_are_said_to_be_missing(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.num_seeds = 2
    _StopAfter(3, monkeypatch)
    with pytest.raises(InterruptedRunError):
        train_and_evaluate(config, tmp_path)
    with pytest.raises(UserError, match="is not finished: 1 of its 2 seeds have begun"):
        evaluate_each_seed(tmp_path)


def test_a_signal_in_a_seeds_last_epoch_ends_all_seeds(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.num_seeds, config.num_epochs = 2, 1
    with monkeypatch.context() as patch:
        _StopAfter(8, patch)
        with pytest.raises(InterruptedRunError):
            train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "seed_1").exists()
    assert train_and_evaluate(config, tmp_path)["num_seeds"] == 2


def test_seeds_at_different_steps_are_not_averaged(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.num_seeds, config.num_epochs = 2, 1
    with monkeypatch.context() as patch:
        # The first seed takes eight calls, one a step.
        _StopAfter(8 + 3, patch)
        with pytest.raises(InterruptedRunError):
            train_and_evaluate(config, tmp_path)
    with pytest.raises(UserError, match=r"stand at different steps \(8, 3\)"):
        evaluate_each_seed(tmp_path)
    with pytest.raises(UserError, match=r"stand at different steps \(8, 3\)"):
        compare_runs([tmp_path, tmp_path])


def test_members_left_behind_catch_up_alone(
    config: ConfigDict, tmp_path: Path, at_once: None
) -> None:
    """One seed is ahead, as after a crash between the saves of two seeds."""
    config.num_seeds, config.num_epochs = 2, 1
    alone = config.copy_and_resolve_references()
    alone.num_seeds = 1
    train_and_evaluate(alone, tmp_path / "seed_0")
    summary = train_and_evaluate(config, tmp_path)
    assert summary["num_seeds"] == 2
    assert (tmp_path / "seed_1" / "summary.json").exists()


def test_without_room_for_all_they_run_in_turn(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at_once: None,
) -> None:
    original = DevicePipeline.epoch

    def epoch(pipeline: Any, state: Any, *rest: Any) -> Any:
        if state.step.ndim:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return original(pipeline, state, *rest)

    monkeypatch.setattr(DevicePipeline, "epoch", epoch)
    config.num_seeds, config.num_epochs = 2, 1
    assert train_and_evaluate(config, tmp_path)["num_seeds"] == 2
    assert "no room for all seeds at once; one after another" in caplog.text


def test_all_share_splits_that_are_loaded_once_and_warned_of_once(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def count(*arguments: Any) -> dict[str, Split]:
        calls.append(arguments)
        return decode_splits(*arguments)

    monkeypatch.setattr(run, "decode_splits", count)
    config.num_seeds, config.num_epochs, config.data.train_split = 2, 1, "train"
    with caplog.at_level(logging.WARNING, "tinyvgg_jax"):
        train_and_evaluate(config, tmp_path)
    assert len(calls) == 1
    assert ["shares examples" in record.getMessage() for record in caplog.records] == [True]


def test_all_are_evaluated_and_their_ensemble(
    config: ConfigDict, data_dir: Path, tmp_path: Path, command_line: Callable[..., Any]
) -> None:
    config.num_seeds, config.num_epochs, config.learning_rate = 2, 1, 0.01
    train_and_evaluate(config, tmp_path)
    content = seeds_content(evaluate_each_seed(tmp_path, "validation", flip_averaging=True))
    split = load_splits("bars", {"v": "train[250:]"}, str(data_dir))[0]["v"]
    each = [evaluate(*restore(tmp_path / f"seed_{seed}", "latest"), split) for seed in (0, 1)]
    assert content["seeds"]["accuracy"]["values"] == [one.accuracy for one in each]
    mean = (each[0].probabilities + each[1].probabilities) / 2
    right = mean.argmax(axis=1) == split.labels
    assert content["ensemble"]["accuracy"] == right.mean()
    confusion = np.zeros((5, 5), int)
    for one in each:
        np.add.at(confusion, (split.labels, one.predicted), 1)
    assert content["confusion"] == confusion.tolist()
    assert not (tmp_path / "evaluation").exists()
    done = command_line(
        "--mode=eval", f"--workdir={tmp_path}", "--split=validation", "--flip_averaging"
    )
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "evaluation" / "validation.json") == content
    assert (tmp_path / "seed_1" / "evaluation" / "validation.json").exists()
    assert "validation accuracy of the ensemble" in done.stdout
    assert "n = 2" in done.stdout


def test_flip_averaging_is_the_mean_of_both_views(
    trained: tuple[Path, dict[str, Any]], data_dir: Path
) -> None:
    evaluated = evaluate_checkpoint(trained[0], flip_averaging=True)
    assert evaluated.flipped is not None
    model, params = restore(trained[0], "latest")
    images = to_float(jnp.asarray(evaluated.data.images[:, :, ::-1]))
    logits = np.asarray(apply(model, params, images))
    np.testing.assert_allclose(evaluated.flipped.logits, logits, rtol=1e-3, atol=1e-4)
    mean = evaluated.result.logits + logits
    expected = (mean.argmax(axis=1) == evaluated.data.labels).mean()
    assert evaluated.flip_averaged_accuracy == pytest.approx(expected)
    assert evaluate_checkpoint(trained[0]).flip_averaged_accuracy is None


def test_intervals_of_close_values_are_students() -> None:
    for values, fractions in (([0.921, 0.923, 0.926], True), ([0.221, 0.223, 0.226], False)):
        found = statistics_of(values, fractions)
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["std"] == pytest.approx(np.std(values, ddof=1))
        expected = stats.t.interval(0.95, 2, loc=found["mean"], scale=found["std"] / 3**0.5)
        assert found["interval"] == pytest.approx(expected, abs=3e-4)


def test_an_interval_is_the_inverse_of_its_scale() -> None:
    values = [0.2, 0.5, 0.9]
    mean, half = np.mean(values), stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    low, high = statistics_of(values)["interval"]
    centre, spread = np.log(mean / (1 - mean)), half / (mean * (1 - mean))
    assert np.log([low / (1 - low), high / (1 - high)]) == pytest.approx(
        [centre - spread, centre + spread]
    )
    low, high = statistics_of(values, fractions=False)["interval"]
    assert np.log([low, high]) == pytest.approx(
        [np.log(mean) - half / mean, np.log(mean) + half / mean]
    )


@pytest.mark.parametrize("values", [[0.9, 1.0, 1.0], [0.0, 0.1, 0.7], [0.5, 0.999, 1.0, 0.998]])
def test_an_interval_of_accuracies_stays_within_0_and_1(values: list[float]) -> None:
    found = statistics_of(values)
    low, high = found["interval"]
    assert 0 <= low < found["mean"] < high <= 1
    # A loss cannot be negative, but may be large.
    low, high = statistics_of(values, fractions=False)["interval"]
    assert 0 <= low < found["mean"] < high


def test_there_is_no_interval_of_one_value_or_two() -> None:
    assert statistics_of([1.0])["interval"] is None
    assert statistics_of([1.0])["std"] is None
    found = statistics_of([0.9, 1.0])
    assert found["interval"] is None
    assert found["std"] == pytest.approx(0.1 / 2**0.5)
    assert statistics_of([1.0, 1.0, 1.0])["interval"] == [1.0, 1.0]
