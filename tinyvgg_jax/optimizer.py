"""The learning-rate schedule and the optimizer: thin names over Optax."""

import optax


def learning_rate_schedule(
    learning_rate: float, decay: float, steps_per_epoch: int
) -> optax.Schedule:
    """A learning rate that is constant within an epoch and decays at each epoch's start.

    In epoch e, counted from 0, it is `learning_rate * decay**e`.

    Args:
        learning_rate: of the first epoch.
        decay: factor from one epoch to the next.
        steps_per_epoch: optimizer steps in an epoch.

    Returns:
        A function from the number of steps taken to the learning rate.
    """
    return optax.exponential_decay(learning_rate, steps_per_epoch, decay, staircase=True)


def sgd(schedule: optax.Schedule, momentum: float) -> optax.GradientTransformation:
    """Stochastic gradient descent with heavy-ball momentum.

    Args:
        schedule: from the number of steps taken to the learning rate.
        momentum: decay of the velocity, in [0, 1).

    Returns:
        The Optax transformation.
    """
    return optax.sgd(schedule, momentum=momentum)
