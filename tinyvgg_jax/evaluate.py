"""Exact loss, accuracy and logits of a network on a split."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding

from tinyvgg_jax.data import (
    Batch,
    Split,
    fits_on_device,
    on_device,
    padded_batches,
)
from tinyvgg_jax.devices import AXIS, REPLICATED, SPLIT, num_devices, on_each, replicate
from tinyvgg_jax.model import TinyVGG, apply, cast_params
from tinyvgg_jax.step import to_float

# A large batch keeps an accelerator busy; on a CPU, a smaller one is as fast and takes less memory.
_BATCH_SIZE, _BATCH_SIZE_ON_CPU = 2000, 500
# Calls are queued without waiting for their results, up to this many, because the images of every
# queued batch stay in memory.
_MAX_QUEUED = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums and logits over a split of N examples, each counted once.

    Attributes:
        loss: sum of the cross-entropies, in nats.
        correct_per_class: `[num_classes]` int, number of correct predictions by true class.
        count_per_class: `[num_classes]` int, number of examples by true class.
        logits: `[N, num_classes]` float32, in the order of the split.
    """

    loss: float
    correct_per_class: np.ndarray
    count_per_class: np.ndarray
    logits: np.ndarray

    @property
    def correct(self) -> int:
        """Number of correct predictions."""
        return int(self.correct_per_class.sum())

    @property
    def count(self) -> int:
        """Number of examples, N."""
        return int(self.count_per_class.sum())

    @property
    def accuracy(self) -> float:
        """Fraction of the predictions that are correct."""
        return self.correct / self.count

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy, in nats."""
        return self.loss / self.count

    @property
    def guessing_loss(self) -> float:
        """Mean cross-entropy of the best prediction that ignores the images, in nats.

        That prediction is the frequencies p of the classes, and its loss is their entropy,
        -sum(p * log(p)); with equal frequencies, log(num_classes).
        """
        frequencies = self.count_per_class[self.count_per_class > 0] / self.count
        return -float(np.sum(frequencies * np.log(frequencies)))

    @property
    def predicted(self) -> np.ndarray:
        """Predicted classes, those of the highest logits: `[N]` int."""
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits: `[N, num_classes]` float64."""
        # Without the highest logit subtracted, large logits would overflow.
        powers = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


# Takes the number of examples that are done.
OnProgress = Callable[[int], None]


def _ignore(_: int) -> None:
    pass


def evaluate(
    model: TinyVGG,
    params: Any,
    split: Split,
    batch_size: int | None = None,
    on_progress: OnProgress = _ignore,
    mesh: Mesh | None = None,
) -> Evaluation:
    """Evaluates a network on all examples of a split.

    Args:
        model: the network.
        params: its parameters.
        split: N examples.
        batch_size: number of examples in a call, by default a number that suits the device. It
            affects the result only by the rounding of the loss.
        on_progress: called with the number of examples that are done, as batches end; on an
            accelerator that holds the whole split, which takes one call, only at the end.
        mesh: the devices that share each batch; None for a single one.

    Returns:
        Exact counts and logits, and the sum of the losses.
    """
    # The C convolutions are safe here, since no gradient is taken.
    model = model.clone(native=True)
    on_cpu = jax.default_backend() == "cpu"
    count = num_devices(mesh)
    size = batch_size or count * (_BATCH_SIZE_ON_CPU if on_cpu else _BATCH_SIZE)
    # Padding lets the devices share any number of examples.
    size = math.ceil(min(size, len(split)) / count) * count
    # One long call gains nothing on a CPU, and a signal could not interrupt it.
    in_one_call = mesh is None and fits_on_device(split) and not on_cpu
    way = _evaluate_on_device if in_one_call else partial(_evaluate_streamed, mesh=mesh)
    params = replicate(cast_params(model, params), mesh)
    losses, correct, counts, logits = way(model, params, split, size, on_progress)
    return Evaluation(
        float(np.sum(losses, dtype=np.float64)),
        np.sum(correct, axis=0),
        np.sum(counts, axis=0),
        np.concatenate(logits)[: len(split)],
    )


# Results of n batches: sums of the losses [n]; numbers of correct predictions and of examples by
# class, each [n, num_classes]; logits [n, batch_size, num_classes].
Sums = tuple[Any, Any, Any, Any]


def _evaluate_streamed(
    model: TinyVGG,
    params: Any,
    split: Split,
    batch_size: int,
    on_progress: OnProgress,
    mesh: Mesh | None = None,
) -> Sums:
    """Evaluates batch by batch, with images from the host."""
    sums: list[Any] = []
    for batch, is_real in padded_batches(split, batch_size, mesh):
        sums.append(_evaluate_shared(model, mesh, params, batch, is_real))
        if len(sums) > _MAX_QUEUED:
            jax.block_until_ready(sums[-_MAX_QUEUED])
            on_progress((len(sums) - _MAX_QUEUED + 1) * batch_size)
    losses, correct, counts, logits = zip(*jax.device_get(sums), strict=True)
    on_progress(len(split))
    return losses, correct, counts, logits


def _evaluate_on_device(
    model: TinyVGG, params: Any, split: Split, batch_size: int, on_progress: OnProgress
) -> Sums:
    """Evaluates all batches in one call, with all images on the device."""
    sums: Sums = jax.device_get(_evaluate_all(model, params, on_device(split), batch_size))
    on_progress(len(split))
    return sums


@partial(jax.jit, static_argnums=(0, 3))
def _evaluate_all(model: TinyVGG, params: Any, data: Batch, batch_size: int) -> Sums:
    """Scans over all batches of a split that is on the device."""
    last = len(data.labels) - 1

    def body(_: None, start: Array) -> tuple[None, Sums]:
        # The last batch repeats the last example as padding, which `is_real` masks.
        index = start + jnp.arange(batch_size)
        chosen = jnp.minimum(index, last)
        batch = Batch(data.images[chosen], data.labels[chosen])
        return None, _evaluate_batch(model, params, batch, index <= last)

    return jax.lax.scan(body, None, jnp.arange(0, last + 1, batch_size))[1]


@partial(jax.jit, static_argnums=(0, 1))
def _evaluate_shared(
    model: TinyVGG, mesh: Mesh | None, params: Any, batch: Batch, is_real: Array
) -> Sums:
    """Sums over a padded batch that the devices of a mesh share; every device has the result."""

    def one_device(params: Any, batch: Batch, is_real: Array) -> Sums:
        *sums, logits = _evaluate_batch(model, params, batch, is_real)
        return (*lax.psum(tuple(sums), AXIS), logits)

    if mesh is None:
        return _evaluate_batch(model, params, batch, is_real)
    specs = (REPLICATED, SPLIT, SPLIT)
    *sums, logits = on_each(one_device, mesh, specs, (REPLICATED,) * 3 + (SPLIT,))(
        params, batch, is_real
    )
    # The host, which may hold some of the devices only, needs all logits.
    return (*sums, lax.with_sharding_constraint(logits, NamedSharding(mesh, REPLICATED)))


@partial(jax.jit, static_argnums=0)
def _evaluate_batch(model: TinyVGG, params: Any, batch: Batch, is_real: Array) -> Sums:
    """Sums over a padded batch.

    Args:
        model: the network.
        params: its parameters.
        batch: B examples.
        is_real: `[B]` bool, false for padding.

    Returns:
        Loss, correct predictions by class, examples by class; and the logits, padding included.
    """
    logits = apply(model, params, to_float(batch.images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    correct = is_real & (logits.argmax(axis=-1) == batch.labels)
    one_hot = jax.nn.one_hot(batch.labels, model.num_classes, dtype=jnp.bool)
    return (
        jnp.where(is_real, losses, 0).sum(),
        (one_hot & correct[:, None]).sum(axis=0, dtype=jnp.int32),
        (one_hot & is_real[:, None]).sum(axis=0, dtype=jnp.int32),
        logits,
    )
