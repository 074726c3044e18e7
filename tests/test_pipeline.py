import contextlib
import gzip
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tinyvgg_jax import TinyVGG, data, train
from tinyvgg_jax.augment import augment
from tinyvgg_jax.data import Batch, Split, fits_on_device
from tinyvgg_jax.optimizer import learning_rate_schedule, make_optimizer
from tinyvgg_jax.pipeline import CallResult, DevicePipeline, Keys, StreamPipeline, limit_queue
from tinyvgg_jax.step import StepSums, TrainState, init_state, make_train_step
from tinyvgg_jax.train import train_and_evaluate

SMALL = TinyVGG(widths=(4, 8), convs_per_block=1, hidden=8, num_classes=5)
OPTIMIZER = make_optimizer(learning_rate_schedule(0.05, 0.8, 13), 0.9)
# 13 steps of 5 examples, and 2 examples left over.
NUMBER, BATCH_SIZE, STEPS = 67, 5, 13


def make_split() -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(NUMBER, 16, 16, 1)).astype(np.uint8)
    return Split(images, rng.integers(5, size=NUMBER).astype(np.int32))


def step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, StepSums]:
    rotated = partial(augment, rotation_degrees=10.0, horizontal_flip=True)
    return make_train_step(SMALL, OPTIMIZER, rotated)(state, batch, key)


def keys(seed: int = 3) -> Keys:
    return Keys(order=jax.random.key(seed), step=jax.random.key(seed + 2))


def seeing(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, StepSums]:
    """A step whose parameters are the sum of all labels and pixels it saw, weighted by when."""
    seen = batch.labels.sum() + batch.images.astype(jnp.int32).sum()
    params = state.params + (state.step + 1) * seen
    ones = StepSums(jnp.float32(1), jnp.int32(1), jnp.int32(BATCH_SIZE), jnp.int32(0))
    return TrainState(state.step + 1, params, state.opt_state), ones


def beginning(epoch: int = 0) -> tuple[TrainState, StepSums]:
    init = partial(init_state, SMALL, OPTIMIZER, image_shape=(16, 16, 1))
    state = jax.jit(init)(jax.random.key(0))
    return state._replace(step=jnp.int32(epoch * STEPS)), StepSums.zero()


def run(pipeline: Any, state: TrainState, sums: StepSums, epoch: int, first_step: int = 0) -> Any:
    steps = []
    for now in pipeline.epoch(state, sums, epoch, first_step):
        state, sums = now.state, now.sums
        now.done.block_until_ready()
        steps.append(now.step)
    return state, sums, steps


@pytest.mark.parametrize("steps_per_call", [1, 4, 5, 100])
def test_stream_and_device_end_in_the_same_parameters(steps_per_call: int) -> None:
    split = make_split()
    ends = []
    for pipeline in (
        StreamPipeline(step, split, BATCH_SIZE, keys()),
        DevicePipeline(step, split, BATCH_SIZE, keys(), steps_per_call),
    ):
        state, sums = beginning()
        for epoch in (0, 1):
            state, sums, steps = run(pipeline, state, sums, epoch)
            assert steps[-1] == STEPS
        ends.append((state, sums))
    (streamed, streamed_sums), (state, sums) = ends
    assert int(state.step) == int(streamed.step) == 2 * STEPS
    assert int(sums.examples) == int(streamed_sums.examples) == 2 * STEPS * BATCH_SIZE
    assert int(sums.correct) == int(streamed_sums.correct)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), state.params, streamed.params
    )


@pytest.mark.parametrize("steps_per_call", [1, 4, 100])
@pytest.mark.parametrize("first_step", [0, 3, 12])
def test_the_batches_are_the_same_from_any_step_on(steps_per_call: int, first_step: int) -> None:
    """Exactly: the step adds up what it sees as whole numbers."""
    split = make_split()
    epoch = 2
    ends = []
    for pipeline in (
        StreamPipeline(seeing, split, BATCH_SIZE, keys()),
        DevicePipeline(seeing, split, BATCH_SIZE, keys(), steps_per_call),
    ):
        state = TrainState(jnp.int32(epoch * STEPS + first_step), jnp.int32(0), ())
        ends.append(run(pipeline, state, StepSums.zero(), epoch, first_step))
    assert int(ends[0][0].params) == int(ends[1][0].params) != 0
    assert int(ends[1][1].examples) == (STEPS - first_step) * BATCH_SIZE
    assert int(ends[1][0].step) == (epoch + 1) * STEPS


def test_calls_are_of_one_length_and_say_how_far_they_are() -> None:
    pipeline = DevicePipeline(seeing, make_split(), BATCH_SIZE, keys(), 5)
    state = TrainState(jnp.int32(0), jnp.int32(0), ())
    assert run(pipeline, state, StepSums.zero(), 0)[2] == [5, 10, 13]


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_nothing_moves_to_or_from_the_device_inside_an_epoch(steps_per_call: int) -> None:
    """Beyond what was asked for by name: the epoch's number, and where it ends."""
    pipeline = DevicePipeline(step, make_split(), BATCH_SIZE, keys(), steps_per_call)
    state, sums = beginning()
    with jax.transfer_guard("disallow"):
        state, sums, _ = run(pipeline, state, sums, 0)
        calls = pipeline.epoch(state, sums, 1, 0)
        now = next(calls)
        with jax.transfer_guard("disallow_explicit"):
            for now in calls:
                now.done.block_until_ready()
    assert int(now.state.step) == 2 * STEPS


def test_the_guard_of_that_test_does_guard() -> None:
    pipeline = DevicePipeline(step, make_split(), BATCH_SIZE, keys(), 4)
    with pytest.raises(Exception, match="Disallowed"), jax.transfer_guard("disallow_explicit"):
        run(pipeline, *beginning(), epoch=0)


@pytest.mark.parametrize("pipeline", ["stream", "device"])
def test_nothing_is_compiled_after_the_first_step(
    pipeline: str, config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    pipelines: list[Any] = []
    make_pipeline, end_epoch = train.make_pipeline, train.end_epoch

    def keep(*arguments: Any) -> Any:
        pipelines.append(make_pipeline(*arguments))
        return pipelines[-1]

    def spy(*arguments: Any) -> dict[str, Any]:
        sizes.append(pipelines[0]._update._cache_size())
        return end_epoch(*arguments)

    monkeypatch.setattr(train, "make_pipeline", keep)
    monkeypatch.setattr(train, "end_epoch", spy)
    config.data.pipeline = pipeline
    train_and_evaluate(config, tmp_path)
    assert sizes == [1, 1, 1]


def test_auto_takes_the_device_where_the_images_fit(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.data.pipeline, config.num_epochs = "auto", 1
    for fits, kind in ((True, DevicePipeline), (False, StreamPipeline)):
        seen: list[type] = []
        original = kind.epoch

        def spy(self: Any, *arguments: Any, seen: Any = seen, original: Any = original) -> Any:
            seen.append(type(self))
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(train, "fits_on_device", lambda _, fits=fits: fits)
            patch.setattr(kind, "epoch", spy)
            train_and_evaluate(config, tmp_path / str(fits))
        assert seen == [kind]


def test_what_fits_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        limit = 4 * NUMBER * 256 + 1000

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": self.limit, "bytes_in_use": 1000}

    split = make_split()
    assert fits_on_device(split)  # Here, without figures from the device.
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert fits_on_device(split)
    monkeypatch.setattr(Device, "limit", Device.limit - 4)
    assert not fits_on_device(split)


def test_a_profile_is_written_for_perfetto_and_xprof(config: ConfigDict, tmp_path: Path) -> None:
    config.profile, config.num_epochs = True, 1
    train_and_evaluate(config, tmp_path)
    traces = list((tmp_path / "profile").rglob("*.*"))
    assert any(path.name.endswith(".trace.json.gz") for path in traces)
    assert any(path.suffix == ".pb" for path in traces)
    with contextlib.suppress(RuntimeError):  # Nothing is left running.
        jax.profiler.stop_trace()
        pytest.fail("the trace was not stopped")


def test_a_profile_goes_on_over_epochs_of_few_calls(
    config: ConfigDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config.profile, config.batch_size, config.num_epochs = True, 100, 3
    train_and_evaluate(config, tmp_path / "long")
    (trace,) = (tmp_path / "long").rglob("*.trace.json.gz")
    assert gzip.decompress(trace.read_bytes()).count(b"PjitFunction(update)") >= 3
    config.num_epochs = 1
    train_and_evaluate(config, tmp_path / "short")
    assert "There is no trace" in caplog.text
    assert not list((tmp_path / "short").rglob("*.trace.json.gz"))


def test_resident_data_are_the_splits() -> None:
    split = make_split()
    batch = data.on_device(split)
    assert isinstance(batch.images, jax.Array)
    np.testing.assert_array_equal(batch.images, split.images)
    np.testing.assert_array_equal(batch.labels, split.labels)


@pytest.mark.parametrize(("seconds", "waiting"), [(0.03, 1), (0.0, 4)])
def test_calls_wait_in_a_short_queue(seconds: float, waiting: int) -> None:
    """Long ones because of their memory, short ones so that the device never waits."""
    called, ended = [0], [0]

    class Done:
        def block_until_ready(self) -> None:
            time.sleep(seconds)
            ended[0] += 1

    def calls() -> Iterator[CallResult]:
        state, sums = beginning()
        for number in range(20):
            called[0] += 1
            yield CallResult(state, sums, Done(), number)  # type: ignore[arg-type]

    queues = [called[0] - ended[0] for _ in limit_queue(calls())]
    assert queues[0] == 1
    assert queues[-8:] == 8 * [waiting]
