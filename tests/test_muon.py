from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tinyvgg_jax.muon import muon_directions, orthogonalize
from tinyvgg_jax.optimizer import _matrix_axes


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Five iterations of the whole matrix in float64."""
    x = matrix.astype(np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def matrix_of(singular_values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(0)
    rank = len(singular_values)
    left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in shape)
    return ((left * singular_values) @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(9, 64), (64, 9), (288, 32), (32, 32)])
@pytest.mark.parametrize("smallest", [0.5, 1e-2, 1e-4, 1e-8])
def test_the_iterations_are_newtons_and_schulzs(shape: tuple[int, int], smallest: float) -> None:
    matrix = matrix_of(np.geomspace(1, smallest, min(shape)), shape)
    expected = newton_schulz(matrix.T).T if shape[0] > shape[1] else newton_schulz(matrix)
    actual = np.asarray(orthogonalize(jnp.asarray(matrix))) / np.linalg.norm(matrix)
    # The singular values are about 1, so this is an error of 0.3 % of the largest.
    assert np.linalg.norm(actual - expected, 2) < 3e-3


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_matrix_of_low_rank_stays_finite_and_of_low_rank(rank: int) -> None:
    matrix = matrix_of(np.ones(rank), (96, 32))
    values = np.linalg.svd(np.asarray(orthogonalize(jnp.asarray(matrix))), compute_uv=False)
    expected = np.linalg.norm(matrix) * np.ones(rank)
    np.testing.assert_allclose(values[:rank], expected, rtol=0.35)
    np.testing.assert_allclose(values[rank:], 0, atol=3e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e15])
def test_the_scale_of_a_matrix_is_that_of_the_result(scale: float) -> None:
    matrix = jnp.asarray(matrix_of(np.geomspace(1, 0.1, 16), (48, 16)))
    np.testing.assert_allclose(
        orthogonalize(matrix * scale) / scale, orthogonalize(matrix), atol=1e-4
    )


@pytest.mark.parametrize("scale", [1e-15, 1e-25, 1e-40])
def test_a_matrix_of_hardly_anything_gives_hardly_anything(scale: float) -> None:
    matrix = jnp.asarray(matrix_of(np.geomspace(1, 0.1, 16), (48, 16)))
    np.testing.assert_allclose(orthogonalize(matrix * scale), 0, atol=10 * scale)


@pytest.mark.parametrize(
    ("setting", "value"), [("jax_enable_x64", True), ("jax_numpy_dtype_promotion", "strict")]
)
def test_a_matrix_stays_float32_under_other_settings(setting: str, value: Any) -> None:
    matrix = matrix_of(np.geomspace(1, 0.1, 16), (48, 16))
    expected = orthogonalize(jnp.asarray(matrix))
    before = getattr(jax.config, setting)
    jax.config.update(setting, value)
    try:
        actual = orthogonalize(jnp.asarray(matrix))
    finally:
        jax.config.update(setting, before)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_and_state_are_those_of_optax(nesterov: bool) -> None:
    def layer(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}

    params = {"conv": layer(3, 3, 2, 24), "dense": layer(40, 12), "logits": layer(12, 10)}

    ours = muon_directions(0.9, nesterov=nesterov, adam_learning_rate=0.1, matrix_axes=_matrix_axes)
    theirs = contrib.muon(
        1.0,
        beta=0.9,
        nesterov=nesterov,
        adam_learning_rate=0.1,
        muon_weight_dimension_numbers=_matrix_axes,
    )
    states = ours.init(params), theirs.init(params)
    jax.tree.map(np.testing.assert_array_equal, *states)
    for step in range(3):
        keys = optax.tree.split_key_like(jax.random.key(step), params)
        gradients = jax.tree.map(lambda leaf, key: jax.random.normal(key, leaf.shape), params, keys)
        (updates, first), (expected, second) = (
            optimizer.update(gradients, state, params)
            for optimizer, state in zip((ours, theirs), states, strict=True)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), updates, expected)
        jax.tree.map(np.testing.assert_array_equal, first, second)
        states = first, second
