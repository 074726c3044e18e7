"""How the steps of an epoch are run: on batches from the host, or many in one call on the device.

Both take the same batches in the same order, and yield after every call what the loop may look
at. Only the device knows the figures until somebody fetches them.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tinyvgg_jax.data import Batch, Split, epoch_order, on_device, stream
from tinyvgg_jax.step import StepSums, TrainState
from tinyvgg_jax.system import trim_heap

# Steps in one call where calls cost more than steps: about a tenth of a second's on a GPU.
_STEPS_PER_CALL = 100
# Calls that may wait for their turn on the device, so that it never waits for the host; of short
# calls more, because the host may be late once. Each call that waits has memory of its own.
_WAITING, _WAITING_IF_SHORT, _SHORT_SECONDS = 1, 4, 0.02
# Long calls between two times that their freed memory goes back to the system: else it piles up,
# because each may be served by another thread, for which the C library keeps memory apart.
_CALLS_PER_TRIM = 16

Step = Callable[[TrainState, Batch, Array], tuple[TrainState, StepSums]]


class Keys(NamedTuple):
    """What the randomness of a run's epochs comes from; of K runs at once, `[K]` keys each.

    Attributes:
        order: of the data order.
        step: handed to every step.
    """

    order: Array
    step: Array


class CallResult(NamedTuple):
    """What a pipeline yields after every call.

    Attributes:
        state: after the steps so far; given up to the next call.
        sums: over the epoch so far; given up to the next call.
        done: on the device, there when the call has ended; may be kept.
        step: steps of the epoch so far.
    """

    state: TrainState
    sums: StepSums
    done: Array
    step: int


def limit_queue(calls: Iterator[CallResult]) -> Iterator[CallResult]:
    """The calls at the device's pace: each begins when only few before it are waiting."""
    under_way: deque[Array] = deque()
    waiting, last_end, long_calls = _WAITING, time.perf_counter(), 0
    for now in calls:
        under_way.append(now.done)
        while len(under_way) > waiting:
            under_way.popleft().block_until_ready()
            seconds, last_end = time.perf_counter() - last_end, time.perf_counter()
            waiting = _WAITING_IF_SHORT if seconds < _SHORT_SECONDS else _WAITING
            if seconds >= _SHORT_SECONDS:
                # The first has compiled, which leaves most.
                if long_calls % _CALLS_PER_TRIM == 0:
                    trim_heap()
                long_calls += 1
        yield now


class StreamPipeline:
    """Batches come from the host, one call a step, transferred while the device works."""

    def __init__(self, step: Step, split: Split, batch_size: int, keys: Keys):
        """Args: the pure step, the examples, B, and a run's keys."""
        self._split, self._batch_size, self._order_key = split, batch_size, keys.order

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(
            state: TrainState, sums: StepSums, batch: Batch
        ) -> tuple[TrainState, StepSums, Array]:
            state, metrics = step(state, batch, keys.step)
            return state, sums.plus(metrics), metrics.loss

        self._update = update

    def epoch(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        """Takes the epoch's steps from `first_step` on, both counted from 0."""
        return limit_queue(self._calls(state, sums, epoch, first_step))

    def _calls(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        order = np.asarray(epoch_order(self._order_key, epoch, len(self._split)))
        batches = stream(self._split, order, self._batch_size, first_step)
        for number, batch in enumerate(batches, start=first_step + 1):
            state, sums, done = self._update(state, sums, batch)
            yield CallResult(state, sums, done, number)


class DevicePipeline:
    """The images stay on the device, and many steps run in one call, of many runs if wanted.

    Of K runs, states and sums have a leading axis of K; each has its own keys, and all are at the
    same step.
    """

    def __init__(
        self,
        step: Step,
        split: Split,
        batch_size: int,
        keys: Keys,
        steps_per_call: int | None = None,
    ):
        """Args: as for `StreamPipeline`; and steps in a call, by default what suits the device."""
        self._data = on_device(split)
        self._keys, size = keys, len(split)
        self._steps = steps = len(split) // batch_size
        if steps_per_call is None:
            # A step takes a CPU long, and its loops are not compiled as well.
            steps_per_call = 1 if jax.default_backend() == "cpu" else _STEPS_PER_CALL
        # Calls of one length, so that there is one program.
        self._length = length = math.ceil(steps / math.ceil(steps / steps_per_call))

        def one_step(
            state: TrainState, sums: StepSums, data: Batch, order: Array, end: Array, key: Array
        ) -> tuple[TrainState, StepSums]:
            first = (state.step - (end - steps)) * batch_size
            chosen = lax.dynamic_slice_in_dim(order, first, batch_size)
            state, metrics = step(state, Batch(data.images[chosen], data.labels[chosen]), key)
            return state, sums.plus(metrics)

        def update(
            state: TrainState, sums: StepSums, data: Batch, order: Array, end: Array, key: Array
        ) -> tuple[TrainState, StepSums, Array]:
            def body(
                carry: tuple[TrainState, StepSums], _: None
            ) -> tuple[tuple[TrainState, StepSums], None]:
                new = one_step(*carry, data, order, end, key)
                # The last call may have steps too many: they change nothing.
                wanted = carry[0].step < end
                return jax.tree.map(lambda n, o: jnp.where(wanted, n, o), new, carry), None

            if length == 1:
                state, sums = one_step(state, sums, data, order, end, key)
            else:
                (state, sums), _ = lax.scan(body, (state, sums), length=length)
            return state, sums, sums.examples

        def order(key: Array, epoch: Array) -> Array:
            return epoch_order(key, epoch, size)

        if keys.order.ndim:
            update = jax.vmap(update, in_axes=(0, 0, None, 0, None, 0))
            order = jax.vmap(order, in_axes=(0, None))
        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._order = jax.jit(order)

    def epoch(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        """Takes the epoch's steps from `first_step` on, both counted from 0."""
        return limit_queue(self._calls(state, sums, epoch, first_step))

    def _calls(
        self, state: TrainState, sums: StepSums, epoch: int, first_step: int
    ) -> Iterator[CallResult]:
        order = self._order(self._keys.order, jax.device_put(np.int32(epoch)))
        end = jax.device_put(np.int32((epoch + 1) * self._steps))
        for step in range(first_step, self._steps, self._length):
            state, sums, done = self._update(state, sums, self._data, order, end, self._keys.step)
            yield CallResult(state, sums, done, min(step + self._length, self._steps))
