"""Learning-rate schedules and optimizers: named choices of Optax's transformations.

To add one, write the function that makes it and enter it in `SCHEDULES` or `OPTIMIZERS`; the
config and the command line then know its name.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax import Array
from optax import contrib

from tinyvgg_jax.muon import muon_directions

# Muon leaves biases and the last layer to Adam, whose learning rate is Muon's times this factor.
# It is smaller because Adam changes each parameter by about its rate, while the elements of Muon's
# orthogonal matrices are far below 1.
_ADAM_RATE_FACTOR = 0.1


class _SchedulePlan(NamedTuple):
    """The numbers that a schedule is made from.

    Attributes:
        learning_rate: the highest learning rate.
        decay: factor of the learning rate from one epoch to the next.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps of the whole run.
        warmup_steps: optimizer steps in which the learning rate rises from 0.
    """

    learning_rate: float
    decay: float
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @property
    def fall_steps(self) -> int:
        """Steps after the warm-up, at least 1, which Optax's schedules need."""
        return max(1, self.total_steps - self.warmup_steps)


def _exponential(plan: _SchedulePlan) -> optax.Schedule:
    """rate(step) = learning_rate * decay**(step // steps_per_epoch) * min(1, step / warmup)."""
    by_epoch = optax.exponential_decay(plan.learning_rate, 1, plan.decay)

    def fall(step: Array | int) -> Array:
        # Optax's staircase divides floats, by which a compiled program can be a step late.
        return by_epoch(step // plan.steps_per_epoch)

    if not plan.warmup_steps:
        return fall
    rise = optax.linear_schedule(0.0, 1.0, plan.warmup_steps)
    return lambda step: fall(step) * rise(step)


def _cosine(plan: _SchedulePlan) -> optax.Schedule:
    """rate(step) = learning_rate * (1 + cos(pi * t)) / 2, t = (step - warmup) / fall_steps."""
    return _after_warmup(plan, optax.cosine_decay_schedule(plan.learning_rate, plan.fall_steps))


def _linear(plan: _SchedulePlan) -> optax.Schedule:
    """rate(step) = learning_rate * (1 - t), t = (step - warmup) / fall_steps."""
    return _after_warmup(plan, optax.linear_schedule(plan.learning_rate, 0.0, plan.fall_steps))


def _after_warmup(plan: _SchedulePlan, fall: optax.Schedule) -> optax.Schedule:
    """Puts a linear rise from 0 before a schedule that starts at the highest learning rate."""
    if not plan.warmup_steps:
        return fall
    rise = optax.linear_schedule(0.0, plan.learning_rate, plan.warmup_steps)
    return optax.join_schedules([rise, fall], [plan.warmup_steps])


class ScheduleKind(NamedTuple):
    """A kind of schedule.

    Attributes:
        make: makes the schedule from a `_SchedulePlan`.
        depends_on_num_epochs: whether the learning rate of a step depends on the length of the run.
            If so, a run of some epochs is not the beginning of a longer one.
    """

    make: Callable[[_SchedulePlan], optax.Schedule]
    depends_on_num_epochs: bool


SCHEDULES = {
    "exponential": ScheduleKind(_exponential, depends_on_num_epochs=False),
    "cosine": ScheduleKind(_cosine, depends_on_num_epochs=True),
    "linear": ScheduleKind(_linear, depends_on_num_epochs=True),
}


def learning_rate_schedule(
    learning_rate: float,
    decay: float,
    steps_per_epoch: int,
    *,
    kind: str = "exponential",
    num_epochs: int = 0,
    warmup_epochs: float = 0.0,
) -> optax.Schedule:
    """Makes a learning rate that decays at the start of each epoch, or falls to 0 over the run.

    With s the step, S the steps in an epoch, w the steps of warm-up, T the steps of the run, and
    t = (s - w) / (T - w):

    - "exponential": `learning_rate * decay**floor(s / S)`, times s / w during the warm-up;
    - "cosine": `learning_rate * (1 + cos(pi * t)) / 2`, after a rise of `learning_rate * s / w`;
    - "linear": `learning_rate * (1 - t)`, after the same rise.

    With a long warm-up the last two make one cycle (Smith & Topin, arXiv:1708.07120).

    Args:
        learning_rate: the highest learning rate.
        decay: factor from one epoch to the next, for "exponential" only.
        steps_per_epoch: optimizer steps in an epoch.
        kind: one of `SCHEDULES`.
        num_epochs: epochs of the whole run, for "cosine" and "linear" only.
        warmup_epochs: length of the warm-up; may be a fraction. "exponential" counts its epochs
            from the beginning of the run all the same.

    Returns:
        A function from the number of steps taken to the learning rate.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown schedule {kind!r}; one of {', '.join(SCHEDULES)}.")
    plan = _SchedulePlan(
        learning_rate=learning_rate,
        decay=decay,
        steps_per_epoch=steps_per_epoch,
        total_steps=num_epochs * steps_per_epoch,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
    )
    return SCHEDULES[kind].make(plan)


def _sgd(
    schedule: optax.Schedule, momentum: float, nesterov: bool, weight_decay: float
) -> list[optax.GradientTransformation]:
    decay = [optax.add_decayed_weights(weight_decay, mask=is_kernel)] if weight_decay else []
    return [*decay, optax.sgd(schedule, momentum=momentum, nesterov=nesterov)]


def _muon(
    schedule: optax.Schedule, momentum: float, nesterov: bool, weight_decay: float
) -> list[optax.GradientTransformation]:
    # The rate is 1 here and the schedule comes last, so that weight decay and schedule act on
    # Muon's and Adam's parameters alike.
    directions = muon_directions(
        momentum,
        nesterov=nesterov,
        adam_learning_rate=_ADAM_RATE_FACTOR,
        matrix_axes=_matrix_axes,
    )
    # The directions are already negative, as updates that are added, so the decay must be, too.
    decay = [optax.add_decayed_weights(-weight_decay, mask=is_kernel)] if weight_decay else []
    return [directions, *decay, optax.scale_by_schedule(schedule)]


# Each function makes the parts of the optimizer of its name, which are chained.
OPTIMIZERS = {"sgd": _sgd, "muon": _muon}


def make_optimizer(
    schedule: optax.Schedule,
    momentum: float,
    *,
    kind: str = "sgd",
    nesterov: bool = False,
    weight_decay: float = 0.0,
    gradient_clipping: float = 0.0,
) -> optax.GradientTransformation:
    """Makes SGD with momentum, or Muon; options left at 0 or False have no effect.

    With the gradient g, the parameters p, the learning rate r and d = `weight_decay`, SGD takes

        v <- momentum * v + (g + d * p)
        p <- p - r * v                                  (heavy-ball momentum)
        p <- p - r * (g + d * p + momentum * v)         (instead, with `nesterov`)

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) averages the gradients of each
    kernel, seen as a matrix [inputs, outputs], and replaces the average by an almost orthogonal
    matrix of the same singular vectors:

        m <- momentum * m + (1 - momentum) * g
        X <- m / |m|, the norm being Frobenius's, and m without the bias of starting at 0
        X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X, with A = X X^T, five times
        p <- p - r * (sqrt(max(1, outputs / inputs)) * X + d * p)

    The iteration (Newton-Schulz) brings all singular values near 1; `muon.py` computes it with less
    arithmetic. With `nesterov`, `momentum * m + (1 - momentum) * g`, each term without its own
    bias, takes the place of m in the second line. Biases and the last layer take Adam's steps
    instead, or NAdam's with `nesterov`, at a tenth of the learning rate.

    Args:
        schedule: from the number of steps taken to the learning rate.
        momentum: decay of v or m, in [0, 1).
        kind: one of `OPTIMIZERS`.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: d above. It applies to kernels, not to biases.
        gradient_clipping: upper bound of the global norm of the gradients.

    Returns:
        The Optax transformation.

    Raises:
        ValueError: if the kind is unknown.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {kind!r}; one of {', '.join(OPTIMIZERS)}.")
    clipping = [optax.clip_by_global_norm(gradient_clipping)] if gradient_clipping else []
    parts = clipping + OPTIMIZERS[kind](schedule, momentum, nesterov, weight_decay)
    # A chain of one part would nest its state, and checkpoints hold the state as it is.
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def freeze(
    optimizer: optax.GradientTransformation, layers: set[str]
) -> optax.GradientTransformation:
    """Lets an optimizer leave layers as they are, and keep no state for them.

    Args:
        optimizer: the transformation for the others.
        layers: names of layers, the first keys in the tree of parameters.
    """
    if not layers:
        return optimizer

    def labels(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if path[0].key in layers else "trained", params
        )

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def is_kernel(params: optax.Params) -> optax.Params:
    """Marks the kernels in a tree of parameters: True for a kernel, False for a bias."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _matrix_axes(params: optax.Params) -> optax.Params:
    """Says which axes of a kernel are the rows and columns of Muon's matrix.

    The last axis holds the outputs, all others the inputs. Biases and the last layer have None,
    which leaves them to Adam.
    """

    def axes(path: tuple[jax.tree_util.DictKey, ...], leaf: Array) -> object:
        if leaf.ndim < 2 or path[0].key == "logits":
            return None
        inputs = tuple(range(leaf.ndim - 1))
        return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)
