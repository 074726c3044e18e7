from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvgg_jax.model import TinyVGG, apply


def count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_defaults_have_the_papers_parameters() -> None:
    abstract = jax.eval_shape(TinyVGG().init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert count(abstract["params"]) == 1_736_906
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))


def test_every_field_changes_the_network() -> None:
    model = TinyVGG(widths=(4, 6), convs_per_block=3, hidden=5, num_classes=7)
    images = jnp.zeros((2, 9, 11, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    shapes = {name: layer["kernel"].shape for name, layer in params.items()}
    assert shapes == {
        "conv1_1": (3, 3, 3, 4),
        "conv1_2": (3, 3, 4, 4),
        "conv1_3": (3, 3, 4, 4),
        "conv2_1": (3, 3, 4, 6),
        "conv2_2": (3, 3, 6, 6),
        "conv2_3": (3, 3, 6, 6),
        "dense": (2 * 2 * 6, 5),
        "logits": (5, 7),
    }
    logits = jax.eval_shape(lambda p: apply(model, p, images), params)
    assert logits.shape == (2, 7)


def numpy_forward(params: Any, images: np.ndarray) -> np.ndarray:
    """The network, written anew with loops over pixels of the kernel, in float64."""

    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    x = images.astype(np.float64)
    for block in (1, 2):
        for layer in (1, 2):
            weights = params[f"conv{block}_{layer}"]
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            h, w = x.shape[1:3]
            kernel = np.asarray(weights["kernel"], np.float64)
            x = sum(
                padded[:, i : i + h, j : j + w] @ kernel[i, j] for i in range(3) for j in range(3)
            )
            x = relu(x + np.asarray(weights["bias"], np.float64))
        corners = [x[:, i : h // 2 * 2 : 2, j : w // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]
        x = np.maximum.reduce(corners)
    x = x.reshape(len(x), -1)
    dense, logits = params["dense"], params["logits"]
    x = relu(x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]))
    return x @ np.asarray(logits["kernel"]) + np.asarray(logits["bias"])


run = jax.jit(apply, static_argnums=0)


@pytest.fixture(scope="module")
def small() -> tuple[TinyVGG, Any, jax.Array]:
    model = TinyVGG(widths=(4, 6), hidden=8)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((3, 10, 7, 1)), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    # Biases begin at zero, which would hide a bias that is left out.
    noisy = jax.tree.map(lambda a: a + np.float32(0.1) * rng.standard_normal(a.shape, "f4"), params)
    return model, noisy, images


def test_forward_pass_against_numpy(small: tuple[TinyVGG, Any, jax.Array]) -> None:
    model, params, images = small
    expected = numpy_forward(params, np.asarray(images))
    np.testing.assert_allclose(run(model, params, images), expected, rtol=1e-4, atol=1e-5)


def test_works_with_and_without_jit_and_under_vmap(small: tuple[TinyVGG, Any, jax.Array]) -> None:
    model, params, images = small
    expected = run(model, params, images)
    np.testing.assert_allclose(apply(model, params, images), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(model, params, images[:1]), expected[:1], rtol=1e-5, atol=1e-6)
    one_by_one = jax.jit(jax.vmap(lambda x: apply(model, params, x[None])[0]))(images)
    np.testing.assert_allclose(one_by_one, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_numerical_one(small: tuple[TinyVGG, Any, jax.Array]) -> None:
    """Along one direction, in the reference written in float64."""
    model, params, images = small
    gradient = jax.jit(jax.grad(lambda p: apply(model, p, images).sum()))(params)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)

    def shifted(distance: float) -> float:
        moved = jax.tree.map(
            lambda p, d: np.asarray(p, np.float64) + distance * d, params, direction
        )
        return float(numpy_forward(moved, np.asarray(images)).sum())

    along = sum(
        float((g * d).sum())
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert along == pytest.approx((shifted(1e-6) - shifted(-1e-6)) / 2e-6, rel=1e-3)


def test_bfloat16_computes_in_it_and_keeps_parameters_and_logits_in_float32(
    small: tuple[TinyVGG, Any, jax.Array],
) -> None:
    model, params, images = small
    low = model.clone(dtype=jnp.bfloat16)
    abstract = jax.eval_shape(low.init, jax.random.key(0), images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    logits = run(low, params, images)
    assert logits.dtype == jnp.float32
    exact = run(model, params, images)
    assert 0 < float(jnp.abs(logits - exact).max()) < 0.1 * float(jnp.abs(exact).max())


def test_bad_shapes_are_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, H, W, C\]"):
        TinyVGG().init(jax.random.key(0), jnp.zeros((28, 28, 1)))
    with pytest.raises(ValueError, match="too small for 3 blocks"):
        TinyVGG().init(jax.random.key(0), jnp.zeros((1, 7, 28, 1)))


def test_dropout_leaves_the_mean_of_what_it_drops() -> None:
    model = TinyVGG(widths=(4,), convs_per_block=1, hidden=4000, num_classes=1, dropout=0.25)
    images = jnp.ones((1, 2, 2, 1))
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), images)["params"])
    # Every hidden unit is 1, every logit is the mean of what is left of them.
    params["dense"]["bias"] += 1.0
    params["logits"]["kernel"] += 1 / 4000
    drawn = [float(apply(model, params, images, jax.random.key(seed))[0, 0]) for seed in range(3)]
    assert len(set(drawn)) == 3
    assert all(abs(value - 1) < 0.05 for value in drawn)
    assert float(apply(model, params, images)[0, 0]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("kernel_init", "variance"), [("lecun_normal", 1.0), ("he_normal", 2.0), ("orthogonal", 2.0)]
)
def test_initialisations_have_the_variance_of_their_name(kernel_init: str, variance: float) -> None:
    model = TinyVGG(widths=(64,), convs_per_block=2, hidden=300, kernel_init=kernel_init)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))["params"]
    for name, inputs in (("conv1_2", 9 * 64), ("dense", 4 * 64)):
        kernel = np.asarray(params[name]["kernel"])
        # Orthogonal rows or columns, whichever are fewer, are as long as the gain.
        size = max(kernel[..., 0].size, kernel.shape[-1]) if kernel_init == "orthogonal" else inputs
        assert kernel.var() * size == pytest.approx(variance, rel=0.05)
    # The last layer's logits start small in any case.
    assert np.asarray(params["logits"]["kernel"]).var() * 300 == pytest.approx(1, rel=0.1)
