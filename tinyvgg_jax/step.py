"""The pure train step: state, batch and key in, state and summed metrics out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from tinyvgg_jax.augment import mixup
from tinyvgg_jax.data import Batch
from tinyvgg_jax.devices import AXIS, Share
from tinyvgg_jax.keys import named_key
from tinyvgg_jax.model import TinyVGG, apply


def to_float(images: Array) -> Array:
    """Scales uint8 images to float32 in [0, 1], the input of the model."""
    return images.astype(jnp.float32) / 255


class TrainState(NamedTuple):
    """Everything that a step changes: a checkpoint of it is enough to go on.

    Attributes:
        step: int32 scalar, the number of optimizer steps taken.
        params: tree of float32 arrays.
        opt_state: Optax's state.
        average: exponential moving average of `params`, the same tree; None where none is kept.
    """

    step: Array
    params: Any
    opt_state: Any
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate: the average where one is kept, else `params`."""
        return self.params if self.average is None else self.average


def pack(state: TrainState) -> tuple[Any, Any]:
    """Splits a state into the two items of a checkpoint, which stores the step as its name.

    Returns:
        The parameters to evaluate, which can be restored without the rest; and the rest: the
        optimizer's state, and where an average is evaluated, also the parameters it averages.
    """
    if state.average is None:
        return state.params, state.opt_state
    return state.average, {"opt_state": state.opt_state, "params": state.params}


def unpack(step: int, params: Any, rest: Any) -> TrainState:
    """Builds a state from its step and the two items that `pack` returned."""
    if isinstance(rest, dict) and rest.keys() == {"opt_state", "params"}:
        return TrainState(jnp.int32(step), rest["params"], rest["opt_state"], params)
    return TrainState(jnp.int32(step), params, rest)


class StepSums(NamedTuple):
    """Sums over the examples of some steps, as scalars on the device.

    Attributes:
        loss: float32, the sum of the cross-entropies in nats.
        correct: int32, the number of correct predictions.
        examples: int32, the number of examples.
        diverged_at: int32, the first step whose loss is not finite, counted from 1; 0 if none.
    """

    loss: Array
    correct: Array
    examples: Array
    diverged_at: Array

    @classmethod
    def zero(cls) -> "StepSums":
        """Returns the sums over no steps."""
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))

    def plus(self, other: "StepSums") -> "StepSums":
        """Adds the sums over later steps."""
        diverged_at = jnp.where(self.diverged_at > 0, self.diverged_at, other.diverged_at)
        return StepSums(
            self.loss + other.loss,
            self.correct + other.correct,
            self.examples + other.examples,
            diverged_at,
        )


TrainStep = Callable[[TrainState, Batch, Array], tuple[TrainState, StepSums]]
# (key, images [B, H, W, C] float, optimizer steps taken) -> images; a shared step also passes its
# `Share`.
Augmentation = Callable[..., Array]


def make_train_step(
    model: TinyVGG,
    optimizer: optax.GradientTransformation,
    augmentation: Augmentation,
    *,
    label_smoothing: float = 0.0,
    mixup_alpha: float = 0.0,
    ema_decay: float = 0.0,
    shared: bool = False,
) -> TrainStep:
    """Makes the pure function that takes one optimizer step.

    Args:
        model: the network.
        optimizer: updates its parameters.
        augmentation: `(key, images [B, H, W, C] float, steps taken) -> images`; with `shared` it
            has a fourth argument, the `Share` of the batch that the images are.
        label_smoothing: fraction of each target that is spread evenly over all classes.
        mixup_alpha: see `augment.mixup`; 0 mixes nothing.
        ema_decay: see `update_average`; 0 leaves `TrainState.average` as it is.
        shared: whether the step runs on several devices, within `devices.on_each`, each with its
            share of the batch and all of the state. They all end in the same state.

    Returns:
        `(state, batch, key) -> (state, sums)`, to be jitted. All randomness of the step comes from
        `key` with the number of steps taken folded in. The sums are over the examples as they were
        trained on, so they include augmentation, mixup, dropout and label smoothing.
    """

    def train_step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, StepSums]:
        # The randomness is a function of the key and the step, so that a run that was interrupted
        # goes on with the same draws.
        key = jax.random.fold_in(key, state.step)
        share = Share.of_device(len(batch.labels)) if shared else None
        total = share.total if share else len(batch.labels)
        arguments = (key, to_float(batch.images), state.step)
        images = augmentation(*arguments, share) if shared else augmentation(*arguments)
        # Targets are one-hot only where they must be mixed: plain labels take less memory and time.
        targets = None
        if label_smoothing or mixup_alpha:
            targets = jax.nn.one_hot(batch.labels, model.num_classes)
            targets = optax.smooth_labels(targets, label_smoothing)
        if mixup_alpha:
            assert targets is not None
            images, targets = mixup(named_key(key, "mixup"), images, targets, mixup_alpha, share)
        dropout_key = named_key(key, "dropout") if model.dropout else None

        def mean_loss(params: Any) -> tuple[Array, Array]:
            logits = apply(model, params, images, dropout_key, share)
            if targets is None:
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            else:
                losses = optax.softmax_cross_entropy(logits, targets)
            return losses.sum() / total, logits

        params = state.params
        if shared:
            # These gradients are then of the device's own examples, and are added up below.
            params = lax.pcast(params, AXIS, to="varying")
        (loss, logits), gradients = jax.value_and_grad(mean_loss, has_aux=True)(params)
        correct = (logits.argmax(axis=-1) == batch.labels).sum(dtype=jnp.int32)
        if shared:
            loss, correct, gradients = lax.psum((loss, correct, gradients), AXIS)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        sums = StepSums(
            # A sum, because a mean over batches of different sizes would not be exact.
            loss=loss * total,
            correct=correct,
            examples=jnp.int32(total),
            diverged_at=jnp.where(jnp.isfinite(loss), 0, step),
        )
        average = state.average
        if ema_decay:
            average = update_average(average, params, step, ema_decay)
        return TrainState(step, params, opt_state, average), sums

    return train_step


def update_average(average: Any, params: Any, step: Array, ema_decay: float) -> Any:
    """Updates the exponential moving average of the parameters after step t, counted from 1:

        decay <- min(ema_decay, (1 + t) / (10 + t))
        average <- average + (1 - decay) * (params - average)

    The second bound lets early averages forget the initial parameters sooner. With `ema_decay` =
    0.999 it is the smaller one for about the first 9,000 steps. Written with the difference, the
    average of a frozen layer stays what it is, where `decay * average + (1 - decay) * params` may
    be off by a rounding error.

    Args:
        average: tree of float32 arrays.
        params: the same tree.
        step: t.
        ema_decay: upper bound of the decay, in (0, 1).
    """
    # Without float32, the average would be float64 where JAX_ENABLE_X64 is set.
    decay = jnp.minimum(ema_decay, (1 + step) / jnp.float32(10 + step))
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)


def init_state(
    model: TinyVGG,
    optimizer: optax.GradientTransformation,
    key: Array,
    image_shape: tuple[int, int, int],
    average: bool = False,
) -> TrainState:
    """Makes the state before the first step; pure, so that it also works under `jax.eval_shape`.

    Args:
        model: the network.
        optimizer: the optimizer of its parameters.
        key: a PRNG key for the initial parameters.
        image_shape: `(H, W, C)` of the images.
        average: whether to keep an exponential moving average of the parameters.

    Returns:
        The state, with `step` 0.
    """
    params = model.init(key, jnp.zeros((1, *image_shape)))["params"]
    # The average needs buffers of its own, because the first step is given (donated) the whole
    # state, and a buffer can be donated only once.
    copy = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), copy)
