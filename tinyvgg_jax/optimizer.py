"""Learning-rate schedules and optimizers: thin names over Optax."""

import jax
import optax
from jax import Array
from optax import contrib

SCHEDULES = ("exponential", "cosine", "linear")
OPTIMIZERS = ("sgd", "muon")
# What Muon leaves to Adam, biases and the last layer, takes steps of this share of its rate.
_ADAM_SHARE = 0.1


def learning_rate_schedule(
    learning_rate: float,
    decay: float,
    steps_per_epoch: int,
    *,
    kind: str = "exponential",
    num_epochs: int = 0,
    warmup_epochs: float = 0.0,
) -> optax.Schedule:
    """A learning rate that decays, at each epoch's start or to zero at the end.

    Args:
        learning_rate: the highest.
        decay: for "exponential", the factor from one epoch to the next: in epoch e, counted from
            0, the rate is `learning_rate * decay**e`.
        steps_per_epoch: optimizer steps in an epoch.
        kind: "exponential"; or "cosine" or "linear", which fall to 0 in `num_epochs`. A long
            warm-up makes one cycle of them (Smith & Topin, arXiv:1708.07120).
        num_epochs: of the whole run.
        warmup_epochs: length of a linear rise from 0 before the decay; "exponential" counts its
            epochs from the beginning all the same.

    Returns:
        A function from the number of steps taken to the learning rate.

    Raises:
        ValueError: if the kind is unknown.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    total = num_epochs * steps_per_epoch
    if kind == "exponential":
        exponential = optax.exponential_decay(learning_rate, steps_per_epoch, decay, staircase=True)
        if not warmup:
            return exponential
        rise = optax.linear_schedule(0.0, 1.0, warmup)
        return lambda step: exponential(step) * rise(step)
    if kind == "cosine":
        fall = optax.cosine_decay_schedule(learning_rate, max(1, total - warmup))
    elif kind == "linear":
        fall = optax.linear_schedule(learning_rate, 0.0, max(1, total - warmup))
    else:
        raise ValueError(f"unknown schedule {kind!r}; one of {', '.join(SCHEDULES)}.")
    rise = optax.linear_schedule(0.0, learning_rate, max(1, warmup))
    return optax.join_schedules([rise, fall], [warmup]) if warmup else fall


def make_optimizer(
    schedule: optax.Schedule,
    momentum: float,
    *,
    kind: str = "sgd",
    nesterov: bool = False,
    weight_decay: float = 0.0,
    gradient_clipping: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum, or Muon; what is 0 or False is left out.

    Args:
        schedule: from the number of steps taken to the learning rate.
        momentum: decay of the velocity, in [0, 1); heavy-ball.
        kind: "sgd", or "muon" (Jordan et al., https://kellerjordan.github.io/posts/muon), which
            makes the updates of kernels orthogonal. Biases and the last layer are Adam's then,
            at a tenth of the rate.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: this times the parameters is added to the gradient of SGD, before momentum
            accumulates it, and to the direction of Muon, after. Not of biases.
        gradient_clipping: upper bound of the global norm of the gradients.

    Returns:
        The Optax transformation.

    Raises:
        ValueError: if the kind is unknown.
    """
    parts = [optax.clip_by_global_norm(gradient_clipping)] if gradient_clipping else []
    if kind == "sgd":
        if weight_decay:
            parts.append(optax.add_decayed_weights(weight_decay, mask=is_kernel))
        parts.append(optax.sgd(schedule, momentum=momentum, nesterov=nesterov))
    elif kind == "muon":
        # Its rate is 1 here, so that what follows is for the last layer and the others alike.
        parts.append(
            contrib.muon(
                1.0,
                beta=momentum,
                nesterov=nesterov,
                adam_learning_rate=_ADAM_SHARE,
                muon_weight_dimension_numbers=_matrices,
            )
        )
        if weight_decay:
            parts.append(optax.add_decayed_weights(-weight_decay, mask=is_kernel))
        parts.append(optax.scale_by_schedule(schedule))
    else:
        raise ValueError(f"unknown optimizer {kind!r}; one of {', '.join(OPTIMIZERS)}.")
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def is_kernel(params: optax.Params) -> optax.Params:
    """A tree of bool: whether each parameter is a kernel, not a bias."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _matrices(params: optax.Params) -> optax.Params:
    """How a kernel is a matrix: its last axis are the outputs. None for what Muon leaves alone."""

    def dimensions(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> object:
        if leaf.ndim < 2 or path[0].key == "logits":
            return None
        inputs = tuple(range(leaf.ndim - 1))
        return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, params)
