"""Exact metrics of parameters on a split."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from tinyvgg_jax.data import (
    Batch,
    Split,
    fits_on_device,
    on_device,
    padded_batches,
)
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.step import to_float

# Examples at a time: enough to keep an accelerator busy; fewer keep a CPU busy in less memory.
_BATCH_SIZE, _BATCH_SIZE_ON_CPU = 2000, 500
# Batches that may be under way at a time, so that their images do not fill the memory.
_RUN_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What parameters make of a split, every example counted once.

    Attributes:
        loss: sum of the cross-entropies, in nats.
        correct_per_class: `[num_classes]` int, of the examples of each class.
        count_per_class: `[num_classes]` int.
        logits: `[N, num_classes]` float32, in the order of the split.
    """

    loss: float
    correct_per_class: np.ndarray
    count_per_class: np.ndarray
    logits: np.ndarray

    @property
    def correct(self) -> int:
        return int(self.correct_per_class.sum())

    @property
    def count(self) -> int:
        return int(self.count_per_class.sum())

    @property
    def accuracy(self) -> float:
        """A fraction."""
        return self.correct / self.count

    @property
    def mean_loss(self) -> float:
        """In nats."""
        return self.loss / self.count

    @property
    def predicted(self) -> np.ndarray:
        """`[N]` int, the class of the highest logit of each example."""
        return self.logits.argmax(axis=1)

    @property
    def probabilities(self) -> np.ndarray:
        """`[N, num_classes]` float64, each row summing to 1."""
        powers = np.exp(self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)


def evaluate(
    model: TinyVGG, params: Any, split: Split, batch_size: int | None = None
) -> Evaluation:
    """Evaluates parameters on all examples of a split.

    Args:
        model: the network.
        params: its parameters.
        split: N examples.
        batch_size: examples at a time, by default what suits the device; the result does not
            depend on it, but for the rounding of the loss.

    Returns:
        The sums.
    """
    # No gradient is taken here.
    model = model.clone(native=True)
    on_cpu = jax.default_backend() == "cpu"
    size = min(batch_size or (_BATCH_SIZE_ON_CPU if on_cpu else _BATCH_SIZE), len(split))
    # A CPU gains nothing from one long call, which a signal could not stop.
    if on_cpu or not fits_on_device(split):
        losses, correct, counts, logits = _evaluate_streamed(model, params, split, size)
    else:
        losses, correct, counts, logits = _evaluate_on_device(model, params, split, size)
    return Evaluation(
        float(np.sum(losses, dtype=np.float64)),
        np.sum(correct, axis=0),
        np.sum(counts, axis=0),
        np.concatenate(logits)[: len(split)],
    )


# Of n batches: losses [n], correct and counts of the classes [n, num_classes], logits
# [n, batch_size, num_classes].
Sums = tuple[Any, Any, Any, Any]


def _evaluate_streamed(model: TinyVGG, params: Any, split: Split, batch_size: int) -> Sums:
    sums: list[Any] = []
    for batch, count in padded_batches(split, batch_size):
        sums.append(_evaluate_batch(model, params, batch, np.arange(batch_size) < count))
        if len(sums) > _RUN_AHEAD:
            jax.block_until_ready(sums[-_RUN_AHEAD])
    losses, correct, counts, logits = zip(*jax.device_get(sums), strict=True)
    return losses, correct, counts, logits


def _evaluate_on_device(model: TinyVGG, params: Any, split: Split, batch_size: int) -> Sums:
    sums: Sums = jax.device_get(_evaluate_all(model, params, on_device(split), batch_size))
    return sums


@partial(jax.jit, static_argnums=(0, 3))
def _evaluate_all(model: TinyVGG, params: Any, data: Batch, batch_size: int) -> Sums:
    """All batches in one call."""
    last = len(data.labels) - 1

    def body(_: None, start: Array) -> tuple[None, Sums]:
        index = start + jnp.arange(batch_size)
        chosen = jnp.minimum(index, last)
        batch = Batch(data.images[chosen], data.labels[chosen])
        return None, _evaluate_batch(model, params, batch, index <= last)

    return jax.lax.scan(body, None, jnp.arange(0, last + 1, batch_size))[1]


@partial(jax.jit, static_argnums=0)
def _evaluate_batch(model: TinyVGG, params: Any, batch: Batch, real: Array) -> Sums:
    """The sums over the examples of a batch that are real, not padding; and all logits."""
    logits = apply(model, params, to_float(batch.images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    right = real & (logits.argmax(axis=-1) == batch.labels)
    of_class = jax.nn.one_hot(batch.labels, model.num_classes, dtype=jnp.int32)
    return (
        jnp.where(real, losses, 0).sum(),
        (of_class * right[:, None]).sum(axis=0),
        (of_class * real[:, None]).sum(axis=0),
        logits,
    )
