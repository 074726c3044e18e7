"""The worker of this package's contestants, which `contest` starts as a process.

A case may have the field `network`, with fields of `TinyVGG` that differ from the defaults.
"""

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
from tinyvgg_jax.data import Split, epoch_order, stream
from tinyvgg_jax.devices import find_mesh, num_devices, replicate
from tinyvgg_jax.model import TinyVGG, apply, cast_params
from tinyvgg_jax.optimizer import make_optimizer
from tinyvgg_jax.pipeline import CallResult, DevicePipeline, Keys, StreamPipeline
from tinyvgg_jax.step import Augmentation, StepSums, TrainState, init_state, make_train_step
from tinyvgg_jax.system import enable_compilation_cache

IMAGE_SHAPE = (28, 28, 1)


def prepare(case: dict[str, Any]) -> Prepared:
    """Prepares a case of any kind."""
    kinds = {
        "train": train,
        "epoch": train,
        "scale": train,
        "infer": infer,
        "stream": stream_only,
        "matmul": matmul,
        "copy": copy,
    }
    return kinds[case["kind"]](case)


def synthetic_split(size: int) -> Split:
    """Makes a split of random images and labels; the speed does not depend on their content."""
    rng = np.random.default_rng(0)
    # XLA uses arrays that are aligned to 64 bytes without a copy. A real dataset's decoded file is
    # aligned like that, so the random images are too.
    count, alignment = size * math.prod(IMAGE_SHAPE), 64
    memory = np.empty(count + alignment, np.uint8)
    first = -memory.ctypes.data % alignment
    images = memory[first : first + count].reshape(size, *IMAGE_SHAPE)
    images[:] = rng.integers(256, size=images.shape, dtype=np.uint8)
    return Split(images, rng.integers(10, size=size).astype(np.int32))


def network(case: dict[str, Any]) -> TinyVGG:
    """Builds the network of a case, as training builds it."""
    return TinyVGG(dtype=jnp.dtype(case["dtype"]), native=True, **case.get("network", {}))


def train(case: dict[str, Any]) -> Prepared:
    """Prepares training steps, with augmentation if the kind is "epoch"."""
    model = network(case)
    optimizer = make_optimizer(lambda _: 0.01, 0.9)
    augmentation: Augmentation = lambda _, images, *__: images  # noqa: E731
    if case["kind"] == "epoch":
        augmentation = functools.partial(augment, rotation_degrees=10.0, horizontal_flip=True)
    mesh = find_mesh(case.get("num_devices", 1))
    step = make_train_step(model, optimizer, augmentation, shared=mesh is not None)
    kind = StreamPipeline if case.get("pipeline") == "stream" else DevicePipeline
    split = synthetic_split(case["examples"])
    pipeline = kind(
        step,
        split,
        case["batch_size"],
        Keys(order=jax.random.key(2), step=jax.random.key(1)),
        mesh=mesh,
    )
    init = functools.partial(init_state, model, optimizer, image_shape=IMAGE_SHAPE)
    state, sums = replicate((jax.jit(init)(jax.random.key(0)), StepSums.zero()), mesh)
    calls = endless(pipeline, state, sums)

    def run(steps: int) -> float:
        start, taken = time.perf_counter(), 0
        while taken < steps:
            result, number = next(calls)
            taken += number
        jax.block_until_ready((result.state, result.done))
        # One call may run many steps, so more than the requested number may have been taken.
        return (time.perf_counter() - start) * steps / taken

    run(1)

    return Prepared(run, lambda: device_facts() | {"devices": num_devices(mesh)})


def endless(
    pipeline: DevicePipeline | StreamPipeline, state: TrainState, sums: StepSums
) -> Iterator[tuple[CallResult, int]]:
    """Runs epochs without end; yields the result of each call and its number of steps."""
    for epoch in itertools.count():
        done = 0
        for result in pipeline.epoch(state, sums, epoch, 0):
            state, sums = result.state, result.sums
            yield result, result.step - done
            done = result.step


def infer(case: dict[str, Any]) -> Prepared:
    """Prepares inference: the logits of a batch, one call after the other."""
    model = network(case)
    images = jnp.asarray(synthetic_split(case["batch_size"]).images / np.float32(255))
    # NumPy draws the parameters, because `model.init` would compile a program that users who
    # restore parameters from a file do not need.
    abstract = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    params = jax.device_put(jax.tree.map(lambda a: draw(a.shape) / 20, abstract))
    # As prediction and evaluation do, before their first call.
    params = cast_params(model, params)
    forward = jax.jit(functools.partial(apply, model))

    def run(calls: int) -> float:
        start = time.perf_counter()
        logits = forward(params, images)
        for _ in range(calls - 1):
            # One more call is always queued, so that the device never waits for the host.
            before, logits = logits, forward(params, images)
            before.block_until_ready()
        logits.block_until_ready()
        return time.perf_counter() - start

    run(1)
    return Prepared(run, device_facts)


def stream_only(case: dict[str, Any]) -> Prepared:
    """Prepares batches from the host without a model: the highest rate of the stream pipeline."""
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
    """Prepares products of large square matrices, which run near the device's highest FLOP/s."""
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


def copy(case: dict[str, Any]) -> Prepared:
    """Prepares copies of a large array, which run near the highest rate of the device's memory.

    Reading and writing count: a step moves twice the case's `bytes`.
    """
    array = jnp.zeros(case["bytes"] // 4, jnp.float32)
    # An addition, because XLA could leave out a mere copy; donated, so that two arrays are enough.
    increment = jax.jit(lambda a: a + 1, donate_argnums=0)

    def run(steps: int) -> float:
        nonlocal array
        start = time.perf_counter()
        for _ in range(steps):
            array = increment(array)
        array.block_until_ready()
        return time.perf_counter() - start

    run(1)
    return Prepared(run, device_facts)


def device_facts() -> dict[str, Any]:
    """Reports the device and its peak memory in bytes."""
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
