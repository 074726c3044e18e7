from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyvgg_jax.optimizer import SCHEDULES, learning_rate_schedule, make_optimizer


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


def test_cosine_and_linear_fall_to_zero_in_the_last_epoch() -> None:
    for kind, halfway in (("cosine", 0.5), ("linear", 0.5)):
        schedule = learning_rate_schedule(0.2, 0.5, 10, kind=kind, num_epochs=4)
        assert float(schedule(0)) == pytest.approx(0.2)
        assert float(schedule(20)) == pytest.approx(0.2 * halfway)
        assert float(schedule(40)) == pytest.approx(0, abs=1e-8)
    cosine, linear = (
        float(learning_rate_schedule(1.0, 0.5, 10, kind=kind, num_epochs=4)(10))
        for kind in ("cosine", "linear")
    )
    assert (cosine, linear) == pytest.approx(((1 + 2**-0.5) / 2, 0.75), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "exponential"])
def test_the_warm_up_is_a_straight_line_to_the_highest_rate(kind: str) -> None:
    schedule = learning_rate_schedule(0.2, 0.5, 10, kind=kind, num_epochs=4, warmup_epochs=0.8)
    assert [float(schedule(step)) for step in (0, 2, 4, 8)] == pytest.approx([0, 0.05, 0.1, 0.2])
    assert float(schedule(12)) < 0.2
    if kind == "exponential":
        assert float(schedule(25)) == pytest.approx(0.05)
    else:
        assert float(schedule(40)) == pytest.approx(0, abs=1e-8)


def test_a_compiled_schedule_decays_at_the_start_of_each_epoch() -> None:
    # For these numbers of steps, step * (1 / steps) in float32 is below the whole number.
    for steps in (41, 61, 107, 214):
        schedule = jax.jit(learning_rate_schedule(0.1, 0.5, steps))
        for epoch in range(1, 9):
            before, after = (float(schedule(epoch * steps + place)) for place in (-1, 0))
            assert before == pytest.approx(0.1 * 0.5 ** (epoch - 1))
            assert after == pytest.approx(0.1 * 0.5**epoch)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5])
def test_a_schedule_tells_the_truth_about_the_number_of_epochs(
    kind: str, warmup_epochs: float
) -> None:
    short, long = (
        learning_rate_schedule(
            0.2, 0.5, 10, kind=kind, num_epochs=num_epochs, warmup_epochs=warmup_epochs
        )
        for num_epochs in (2, 4)
    )
    differs = any(float(short(step)) != float(long(step)) for step in range(20))
    assert differs == SCHEDULES[kind].depends_on_num_epochs


def one_update(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    return optimizer.update(gradients, optimizer.init(params), params)[0]


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_weight_decay_is_of_all_kernels_alike_and_of_no_bias(kind: str) -> None:
    layer = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}
    params = {"dense": layer, "logits": layer}
    nothing = jax.tree.map(jnp.zeros_like, params)
    optimizer = make_optimizer(lambda _: 0.1, 0.9, kind=kind, weight_decay=0.01)
    updates = one_update(optimizer, params, nothing)
    for name in params:
        np.testing.assert_allclose(updates[name]["kernel"], -0.1 * 0.01 * 2, rtol=1e-6)
        np.testing.assert_array_equal(updates[name]["bias"], 0)


def test_nesterov_looks_ahead() -> None:
    params, gradient = jnp.array([1.0]), jnp.array([1.0])
    plain = one_update(make_optimizer(lambda _: 0.1, 0.9), params, gradient)
    ahead = one_update(make_optimizer(lambda _: 0.1, 0.9, nesterov=True), params, gradient)
    assert (float(plain[0]), float(ahead[0])) == pytest.approx((-0.1, -0.19))


def test_gradients_are_clipped_by_their_global_norm() -> None:
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    for bound, length in ((1.0, 1.0), (10.0, 5.0)):
        optimizer = make_optimizer(lambda _: 1.0, 0.0, gradient_clipping=bound)
        updates = one_update(optimizer, params, gradients)
        found = (-float(updates["a"][0]), -float(updates["b"][0]))
        assert found == pytest.approx((0.6 * length, 0.8 * length))


def test_muons_updates_of_kernels_are_nearly_orthogonal() -> None:
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 8), "dense": (20, 8), "logits": (8, 5)}
    params = {
        name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}
        for name, shape in shapes.items()
    }
    gradients = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), "f4"), params)
    optimizer = make_optimizer(lambda step: 0.5 + step, 0.95, kind="muon")
    updates = one_update(optimizer, params, gradients)
    for name in ("conv", "dense"):
        matrix = np.asarray(updates[name]["kernel"]).reshape(-1, 8)
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() / singular.min() < 2
        assert 0.3 < singular.mean() < 0.7
        raw = np.asarray(gradients[name]["kernel"]).reshape(-1, 8)
        raw_singular = np.linalg.svd(raw, compute_uv=False)
        assert singular.max() / singular.min() < raw_singular.max() / raw_singular.min()
    # Adam's first steps have the size of its rate, a tenth, whatever the gradient.
    for leaf in (updates["logits"]["kernel"], updates["conv"]["bias"]):
        np.testing.assert_allclose(np.abs(leaf), 0.05, rtol=1e-2)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'sine'"):
        learning_rate_schedule(0.1, 0.5, 10, kind="sine")
    with pytest.raises(ValueError, match="unknown optimizer 'adam'"):
        make_optimizer(lambda _: 0.1, 0.9, kind="adam")
