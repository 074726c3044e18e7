import jax.numpy as jnp
import optax
import pytest

from tinyvgg_jax.optimizer import learning_rate_schedule, make_optimizer


def test_the_rate_changes_at_the_borders_of_epochs_and_only_there() -> None:
    schedule = learning_rate_schedule(0.01, 0.5, steps_per_epoch=7)
    rates = [float(schedule(step)) for step in range(21)]
    assert rates == pytest.approx([0.01] * 7 + [0.005] * 7 + [0.0025] * 7)


def test_momentum_is_heavy_ball() -> None:
    optimizer = make_optimizer(learning_rate_schedule(0.1, 1.0, 1), momentum=0.9)
    params, velocity = jnp.array(1.0), 0.0
    expected = 1.0
    state = optimizer.init(params)
    for gradient in (1.0, -2.0, 0.5):
        updates, state = optimizer.update(jnp.array(gradient), state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * velocity
    assert float(params) == pytest.approx(expected, rel=1e-6)
