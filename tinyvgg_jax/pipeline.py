"""Two ways to run the steps of an epoch: on batches from the host, or on images on the device.

`StreamPipeline` transfers each batch and makes one compiled call a step. `DevicePipeline` keeps all
images in the device's memory and runs many steps in one compiled call. Both take the same batches
in the same order, so that they end in the same parameters.

JAX calls return before the device has computed anything. So the loop only lines up calls, and the
device never waits for Python. After every call the loop gets a `CallResult`, whose figures stay on
the device until somebody reads them, which waits for the call to end.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding

from tinyvgg_jax.data import Batch, Split, epoch_order, on_device, stream
from tinyvgg_jax.devices import (
    REPLICATED,
    SPLIT,
    Share,
    num_devices,
    on_each,
    put,
    replicate,
)
from tinyvgg_jax.step import StepSums, TrainState, TrainStep
from tinyvgg_jax.system import trim_heap

# Steps in one call on an accelerator, where a small network's step is shorter than the time that
# Python needs for a call. A hundred take about a tenth of a second on a GPU, which is soon enough
# for the progress bar and for a signal to stop.
_STEPS_PER_CALL = 100
# Calls that may wait in the device's queue while it works on another. One is enough for the device
# to go on at once. Calls shorter than _SHORT_SECONDS need more, because Python may be late for one
# of them. There should be no more than that: each waiting call holds memory for its results and its
# batch, and a signal to stop takes effect only after those in the queue.
_WAITING, _WAITING_IF_SHORT, _SHORT_SECONDS = 1, 4, 0.02
# Calls, of those that are not short, after which freed memory goes back to the system. Without it
# memory piles up, because each call may run on another thread, and the C library keeps freed memory
# for each thread apart.
_CALLS_PER_TRIM = 16


class Keys(NamedTuple):
    """The PRNG keys of a run's epochs; for K runs at once, arrays of K keys.

    Attributes:
        order: the key of the data order, into which the epoch is folded.
        step: the key of the steps, into which each step folds its number.
    """

    order: Array
    step: Array


class CallResult(NamedTuple):
    """The result of one call, which a pipeline yields.

    `state` and `sums` are donated to the next call: it writes its results into their memory, so
    that the device holds one state and not two. Whoever wants to keep them must copy them before
    asking the pipeline for the next result.

    Attributes:
        state: the state after the steps so far.
        sums: the sums over the epoch so far, or since the sums that the epoch was given.
        done: an array of this call that is not donated, so that it can be waited for at any time.
        step: the number of steps of the epoch so far.
    """

    state: TrainState
    sums: StepSums
    done: Array
    step: int


def limit_queue(calls: Iterator[CallResult]) -> Iterator[CallResult]:
    """Yields the results of calls, and waits so that only a few calls are in the queue.

    A compiled call returns at once and is queued. Nothing else holds Python back, so without a
    limit it would queue a whole epoch, with memory for every call.
    """
    under_way: deque[Array] = deque()
    waiting, last_end, long_calls = _WAITING, time.perf_counter(), 0
    for result in calls:
        under_way.append(result.done)
        while len(under_way) > waiting:
            # `done` is waited for and not `state`, which a later call has been given already.
            under_way.popleft().block_until_ready()
            # The queue was not empty, so the time between two ends is the length of a call.
            seconds, last_end = time.perf_counter() - last_end, time.perf_counter()
            waiting = _WAITING_IF_SHORT if seconds < _SHORT_SECONDS else _WAITING
            if seconds >= _SHORT_SECONDS:
                # This includes the first call, which has compiled the program and left more freed
                # memory than any other.
                if long_calls % _CALLS_PER_TRIM == 0:
                    trim_heap()
                long_calls += 1
        yield result


@jax.jit
def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def stack(trees: list[Any], mesh: Mesh | None = None) -> Any:
    """Stacks several runs' arrays along a new leading axis, in one program.

    Args:
        trees: one for each of K runs, of the same structure and shapes.
        mesh: the devices over which the runs are spread. The last run is repeated until each
            device has the same number of them.

    Returns:
        A tree of `[K, ...]` arrays, which the pipelines take as K runs.
    """
    stacked = _stacked([*trees, *trees[-1:] * (-len(trees) % num_devices(mesh))])
    return stacked if mesh is None else jax.device_put(stacked, NamedSharding(mesh, SPLIT))


@partial(jax.jit, static_argnums=1)
def unstack(tree: Any, count: int) -> list[Any]:
    """Slices a tree that `stack` made from `count` trees into these trees."""
    return [jax.tree.map(lambda leaf, index=index: leaf[index], tree) for index in range(count)]


class StreamPipeline:
    """Runs one step a call, on batches that are transferred while the device works.

    It suits datasets that are larger than the device's memory.
    """

    def __init__(
        self,
        step: TrainStep,
        split: Split,
        batch_size: int,
        keys: Keys,
        mesh: Mesh | None = None,
    ):
        """Prepares the pipeline; the first call compiles the step.

        Args:
            step: the pure train step; with a mesh, of a device's share.
            split: the examples.
            batch_size: B, over all devices.
            keys: the keys of one run.
            mesh: the devices that share each batch; None for a single one.
        """
        self._split, self._batch_size, self._order_key = split, batch_size, keys.order
        self._mesh, self._step_key = mesh, replicate(keys.step, mesh)

        def update(
            state: TrainState, sums: StepSums, batch: Batch, key: Array
        ) -> tuple[TrainState, StepSums, Array]:
            state, new_sums = step(state, batch, key)
            # The third result is not donated to the next call, so it can still be waited for.
            return state, sums.plus(new_sums), new_sums.loss

        update = on_each(update, mesh, (REPLICATED, REPLICATED, SPLIT, REPLICATED))
        # Donating state and sums lets the step write their new values over the old ones.
        self._update = jax.jit(update, donate_argnums=(0, 1))

    def epoch(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        """Runs the steps of an epoch from `first_step` on.

        Args:
            state: the state after the steps before; donated to the first call.
            sums: the sums to add to; donated to the first call.
            epoch: counted from 0.
            first_step: counted from 0 within the epoch.

        Yields:
            The result of each call; see `CallResult` for how long its arrays may be used.
        """
        return limit_queue(self._calls(state, sums, epoch, first_step))

    def _calls(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        order = np.asarray(epoch_order(self._order_key, epoch, len(self._split)))
        batches = stream(self._split, order, self._batch_size, first_step, self._mesh)
        for steps_so_far, batch in enumerate(batches, start=first_step + 1):
            state, sums, done = self._update(state, sums, batch, self._step_key)
            yield CallResult(state, sums, done, steps_so_far)


class DevicePipeline:
    """Runs many steps in one call, on images that stay on the device; also of several runs at once.

    Within a call no step waits for Python or for a transfer: the program selects each batch from
    the images by itself, and returns only the state and the sums.

    With K runs, states, sums and keys have a leading axis of K, and all runs are at the same step.
    Several devices then share the runs, while they share each batch of a single run.
    """

    def __init__(
        self,
        step: TrainStep,
        split: Split,
        batch_size: int,
        keys: Keys,
        steps_per_call: int | None = None,
        mesh: Mesh | None = None,
    ):
        """Moves the images to the device; the first call compiles.

        Args:
            step: the pure train step; with a mesh and a single run, of a device's share.
            split: the examples.
            batch_size: B, over all devices.
            keys: the keys of one run, or arrays of K keys for K runs.
            steps_per_call: most steps in one call; None for a number that suits the device.
            mesh: the devices; None for a single one.
        """
        self._mesh, self._data = mesh, on_device(split, mesh)
        self._steps = len(split) // batch_size
        if steps_per_call is None:
            # On a CPU a step takes much longer than a call, so nothing is gained by joining steps,
            # and XLA compiles the body of a loop into slower code there.
            steps_per_call = 1 if jax.default_backend() == "cpu" else _STEPS_PER_CALL
        # The number of steps is part of the program, so all calls have the same length: a shorter
        # last call would be compiled for itself. The length is that of the fewest calls that cover
        # the epoch; 250 steps in calls of at most 100, for example, are three calls of 84, with 2
        # steps more than the epoch has.
        self._length = math.ceil(self._steps / math.ceil(self._steps / steps_per_call))

        several = bool(keys.order.ndim)
        update = self._steps_of_a_call(step, batch_size, mesh is not None and not several)
        order = partial(epoch_order, num_examples=len(split))
        own = REPLICATED
        if several:
            # Several runs share images and position, and differ in state, order and keys.
            update = _each_run(update, in_axes=(0, 0, None, 0, None, 0))
            order = jax.vmap(order, in_axes=(0, None))
            own = SPLIT
        # The images are an argument and not a constant of the program, which would be a second copy
        # of them. They are not donated, because every call reads them.
        shared = (own, own, REPLICATED, own, REPLICATED, own)
        self._update = jax.jit(on_each(update, mesh, shared, own), donate_argnums=(0, 1))
        self._order = jax.jit(on_each(order, mesh, (own, REPLICATED), own))
        self._keys = keys if several else replicate(keys, mesh)

    def _steps_of_a_call(
        self, step: TrainStep, batch_size: int, shares_batches: bool
    ) -> Callable[..., tuple[TrainState, StepSums, Array]]:
        """Makes the function that takes the steps of a call, of one run.

        Args:
            step: the pure train step.
            batch_size: B, over all devices.
            shares_batches: whether the function runs on every device, with a share of each batch.
        """
        steps, length, count = self._steps, self._length, num_devices(self._mesh)

        def one_step(
            state: TrainState, sums: StepSums, data: Batch, order: Array, end: Array, key: Array
        ) -> tuple[TrainState, StepSums]:
            # The position in the epoch follows from the state's step, so that a call needs no
            # other counter, and a run that goes on within an epoch begins at the right batch.
            # `end` is the number of the run's steps at the end of this epoch.
            first = (state.step - (end - steps)) * batch_size
            chosen = lax.dynamic_slice_in_dim(order, first, batch_size)
            if shares_batches:
                chosen = Share.of_device(batch_size // count).of(chosen)
            state, new_sums = step(state, Batch(data.images[chosen], data.labels[chosen]), key)
            return state, sums.plus(new_sums)

        def update(
            state: TrainState, sums: StepSums, data: Batch, order: Array, end: Array, key: Array
        ) -> tuple[TrainState, StepSums, Array]:
            def body(
                carry: tuple[TrainState, StepSums], _: None
            ) -> tuple[tuple[TrainState, StepSums], None]:
                new = one_step(*carry, data, order, end, key)
                # The last call may have more steps than are left in the epoch. Such a step is
                # computed (`dynamic_slice` clamps its batch to the end of the order), but the old
                # state and sums are kept, the step number included. So the next surplus step is not
                # wanted either, and the epoch ends exactly at `end`.
                wanted = carry[0].step < end
                return jax.tree.map(lambda n, o: jnp.where(wanted, n, o), new, carry), None

            # With one step a call there is no surplus, and a loop would slow a CPU down.
            if length == 1:
                state, sums = one_step(state, sums, data, order, end, key)
            else:
                (state, sums), _ = lax.scan(body, (state, sums), length=length)
            # `sums` is donated to the next call. An array that is returned twice gets two buffers,
            # so the third result can still be waited for.
            return state, sums, sums.examples

        return update

    def epoch(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        """Runs the steps of an epoch; see `StreamPipeline.epoch`."""
        return limit_queue(self._calls(state, sums, epoch, first_step))

    def _calls(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        # These are the epoch's only transfers to the device. They are explicit, so that under
        # `jax.transfer_guard("disallow")` any other, made by mistake, is an error.
        order = self._order(self._keys.order, put(np.int32(epoch), self._mesh))
        end = put(np.int32((epoch + 1) * self._steps), self._mesh)
        for step in range(first_step, self._steps, self._length):
            state, sums, done = self._update(state, sums, self._data, order, end, self._keys.step)
            yield CallResult(state, sums, done, min(step + self._length, self._steps))


def _each_run(function: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """Maps a function of one run over several runs of a device, as `jax.vmap` does.

    On a CPU it is called once for each run, because convolutions with a kernel for each image of a
    batch are slow there.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function, in_axes=in_axes)

    def each(*arguments: Any) -> Any:
        def of_run(index: int) -> list[Any]:
            return [
                argument if axis is None else jax.tree.map(lambda leaf: leaf[index], argument)
                for argument, axis in zip(arguments, in_axes, strict=True)
            ]

        count = len(jax.tree.leaves(arguments[0])[0])
        results = [function(*of_run(index)) for index in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    return each
