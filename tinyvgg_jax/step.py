"""The pure train step: state, batch and key in, state and summed metrics out."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tinyvgg_jax.data import Batch
from tinyvgg_jax.model import TinyVGG, apply


def to_float(images: Array) -> Array:
    """Scales uint8 images to float32 in [0, 1], the input of the model."""
    return images.astype(jnp.float32) / 255


class TrainState(NamedTuple):
    """All that a step changes.

    Attributes:
        step: int32 scalar, optimizer steps taken.
        params: tree of float32 arrays.
        opt_state: Optax's state.
    """

    step: Array
    params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Sums over the examples of some steps, as scalars.

    Attributes:
        loss: float32, of the cross-entropies in nats.
        correct: int32, of the correct predictions.
        examples: int32, their number.
        diverged_at: int32, the first step with a loss that is not finite, counted from 1; or 0.
    """

    loss: Array
    correct: Array
    examples: Array
    diverged_at: Array

    @classmethod
    def zero(cls) -> "Metrics":
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))

    def plus(self, other: "Metrics") -> "Metrics":
        """The sums over both, `self` being the earlier."""
        diverged_at = jnp.where(self.diverged_at > 0, self.diverged_at, other.diverged_at)
        return Metrics(
            self.loss + other.loss,
            self.correct + other.correct,
            self.examples + other.examples,
            diverged_at,
        )


TrainStep = Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]
Augmentation = Callable[[Array, Array], Array]


def named_key(key: Array, name: str) -> Array:
    """The key for one purpose: `key` with a hash of the purpose's name folded in."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def make_train_step(
    model: TinyVGG, optimizer: optax.GradientTransformation, augmentation: Augmentation
) -> TrainStep:
    """Makes the pure function that takes one optimizer step.

    Args:
        model: the network.
        optimizer: updates its parameters.
        augmentation: `(key, images [B, H, W, C] float) -> images`.

    Returns:
        `(state, batch, key) -> (state, metrics)`, to be jitted. The augmentation's key is
        `key` with the step's number folded in.
    """

    def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        images = augmentation(jax.random.fold_in(key, state.step), to_float(batch.images))

        def mean_loss(params: Any) -> tuple[Array, Array]:
            logits = apply(model, params, images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return losses.mean(), logits

        (loss, logits), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        metrics = Metrics(
            loss=loss * len(batch.labels),
            correct=(logits.argmax(axis=-1) == batch.labels).sum(dtype=jnp.int32),
            examples=jnp.int32(len(batch.labels)),
            diverged_at=jnp.where(jnp.isfinite(loss), 0, step),
        )
        return TrainState(step, params, opt_state), metrics

    return train_step


def init_state(
    model: TinyVGG,
    optimizer: optax.GradientTransformation,
    key: Array,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """The state before the first step; pure, so that it also works under `jax.eval_shape`."""
    params = model.init(key, jnp.zeros((1, *image_shape)))["params"]
    return TrainState(jnp.int32(0), params, optimizer.init(params))
