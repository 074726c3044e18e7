"""The contestant tinyvgg_jax: `python -m tinyvgg_jax.benchmark.jax_worker`, led by `contest`."""

import functools
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyvgg_jax.augment import augment
from tinyvgg_jax.benchmark.worker import Prepared, serve
from tinyvgg_jax.data import Split, epoch_order, on_device, stream
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.optimizer import make_optimizer
from tinyvgg_jax.pipeline import CallResult, DevicePipeline, Keys, StreamPipeline
from tinyvgg_jax.step import Augmentation, StepSums, TrainState, init_state, make_train_step
from tinyvgg_jax.system import enable_compilation_cache

IMAGE_SHAPE = (28, 28, 1)


def prepare(case: dict[str, Any]) -> Prepared:
    """Makes a case ready: its `kind` is the name of a function below."""
    kinds = {"train": train, "epoch": train, "infer": infer, "stream": stream_only}
    kinds |= {"matmul": matmul}
    return kinds[case["kind"]](case)


def synthetic_split(size: int) -> Split:
    """Images of noise, and labels: what they show does not change what they cost."""
    rng = np.random.default_rng(0)
    # They begin where XLA wants arrays to, as a dataset's decoded file does: it does not copy them.
    count, alignment = size * math.prod(IMAGE_SHAPE), 64
    memory = np.empty(count + alignment, np.uint8)
    first = -memory.ctypes.data % alignment
    images = memory[first : first + count].reshape(size, *IMAGE_SHAPE)
    images[:] = rng.integers(256, size=images.shape, dtype=np.uint8)
    return Split(images, rng.integers(10, size=size).astype(np.int32))


def train(case: dict[str, Any]) -> Prepared:
    """Training steps: bare ones for "train", with augmentation and data order for "epoch"."""
    model, optimizer = (
        TinyVGG(dtype=jnp.dtype(case["dtype"]), native=True),
        make_optimizer(lambda _: 0.01, 0.9),
    )
    augmentation: Augmentation = lambda _, images, step: images  # noqa: E731
    if case["kind"] == "epoch":
        augmentation = functools.partial(augment, rotation_degrees=10.0, horizontal_flip=True)
    step = make_train_step(model, optimizer, augmentation)
    kind = StreamPipeline if case.get("pipeline") == "stream" else DevicePipeline
    split = synthetic_split(case["examples"])
    pipeline = kind(
        step,
        split,
        case["batch_size"],
        Keys(order=jax.random.key(2), step=jax.random.key(1)),
    )
    init = functools.partial(init_state, model, optimizer, image_shape=IMAGE_SHAPE)
    calls = endless(pipeline, jax.jit(init)(jax.random.key(0)))

    def run(steps: int) -> float:
        start, taken = time.perf_counter(), 0
        while taken < steps:
            now, number = next(calls)
            taken += number
        jax.block_until_ready((now.state, now.done))
        # A call may have taken more steps than were asked for.
        return (time.perf_counter() - start) * steps / taken

    run(1)
    return Prepared(run, lambda: device_facts() | {"counted_flops": counted(step, case)})


def endless(
    pipeline: DevicePipeline | StreamPipeline, state: TrainState
) -> Iterator[tuple[CallResult, int]]:
    """Epoch after epoch, what the pipeline yields, and how many steps each call took."""
    sums = StepSums.zero()
    for epoch in itertools.count():
        done = 0
        for now in pipeline.epoch(state, sums, epoch, 0):
            state, sums = now.state, now.sums
            yield now, now.step - done
            done = now.step


def counted(step: Any, case: dict[str, Any]) -> float | None:
    """Floating-point operations of a step as XLA counts them, without what C code computes."""
    model, optimizer = (
        TinyVGG(dtype=jnp.dtype(case["dtype"]), native=True),
        make_optimizer(lambda _: 0.01, 0.9),
    )
    init = functools.partial(init_state, model, optimizer, image_shape=IMAGE_SHAPE)
    state: TrainState = jax.eval_shape(init, jax.random.key(0))
    batch = on_device(synthetic_split(case["batch_size"]))
    compiled = jax.jit(step).lower(state, batch, jax.random.key(0)).compile()
    analysis = compiled.cost_analysis()
    return None if analysis is None else analysis.get("flops")


def infer(case: dict[str, Any]) -> Prepared:
    """Logits of a batch, one call after the other."""
    model = TinyVGG(dtype=jnp.dtype(case["dtype"]), native=True)
    images = jnp.asarray(synthetic_split(case["batch_size"]).images / np.float32(255))
    # Drawn without a program of their own: who infers has them from a file.
    abstract = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    params = jax.device_put(jax.tree.map(lambda a: draw(a.shape) / 20, abstract))
    forward = jax.jit(functools.partial(apply, model))

    def run(calls: int) -> float:
        start = time.perf_counter()
        logits = forward(params, images)
        for _ in range(calls - 1):
            # One call waits for its turn, so that the device never waits for the host.
            before, logits = logits, forward(params, images)
            before.block_until_ready()
        logits.block_until_ready()
        return time.perf_counter() - start

    run(1)
    return Prepared(run, device_facts)


def stream_only(case: dict[str, Any]) -> Prepared:
    """What the host gives in batches, and nobody uses."""
    split = synthetic_split(case["examples"])
    order = np.asarray(epoch_order(jax.random.key(0), 0, len(split)))
    batches = [stream(split, order, case["batch_size"], 0)]

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            batch = next(batches[0], None)
            if batch is None:
                batches[0] = stream(split, order, case["batch_size"], 0)
                batch = next(batches[0])
            batch.images.block_until_ready()
        return time.perf_counter() - start

    run(1)
    return Prepared(run, device_facts)


def matmul(case: dict[str, Any]) -> Prepared:
    """Square matrix products: what the device can do at best."""
    n = case["size"]
    a = jax.random.normal(jax.random.key(0), (n, n), case["dtype"])
    multiply = jax.jit(lambda a, b: a @ b)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            product = multiply(a, a)
        product.block_until_ready()
        return time.perf_counter() - start

    run(1)
    return Prepared(run, device_facts)


def device_facts() -> dict[str, Any]:
    """The device, its name, and the most memory that was in use on it."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "peak_device_bytes": stats.get("peak_bytes_in_use"),
        "version": jax.__version__,
    }


if __name__ == "__main__":
    enable_compilation_cache()
    serve(prepare)
