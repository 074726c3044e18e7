"""The pooling and its gradient, against the textbook's operations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from tinyvgg_jax.ops.pooling import (
    lean_max_pool_2x2,
    max_pool_2x2,
    maxima_mask,
    scatter_to_maxima,
)

Pooling = Callable[[Array], Array]
both = pytest.mark.parametrize("pool", [max_pool_2x2, lean_max_pool_2x2])


def textbook(x: Array) -> Array:
    return lax.reduce_window(
        x, np.array(-np.inf, x.dtype), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )


def distinct(shape: tuple[int, ...], dtype: Any) -> Array:
    """Values no two of which are equal, in any dtype: small whole numbers."""
    values = np.random.default_rng(0).permutation(int(np.prod(shape)))
    return jnp.asarray(values.reshape(shape) - values.size // 2, dtype)


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 7, 5, 2), (3, 2, 2, 1), (2, 3, 4, 5)])
def test_values_and_gradient_are_those_of_reduce_window(
    shape: tuple[int, int, int, int], dtype: Any, pool: Pooling
) -> None:
    x = distinct(shape, dtype)
    expected, expected_vjp = jax.vjp(textbook, x)
    output, vjp = jax.vjp(pool, x)
    np.testing.assert_array_equal(output, expected)
    gradient = distinct(output.shape, dtype)
    (of_input,) = vjp(gradient)
    assert of_input.dtype == dtype
    np.testing.assert_array_equal(of_input, expected_vjp(gradient)[0])


@both
def test_equal_maxima_share_the_gradient(pool: Pooling) -> None:
    x = jnp.array([[3.0, 3.0, 1.0, 1.0], [3.0, 0.0, 1.0, 1.0]])[None, :, :, None]
    gradient = jax.grad(lambda x: (pool(x) * jnp.array([6.0, 8.0])[:, None]).sum())(x)
    expected = [[2.0, 2.0, 2.0, 2.0], [2.0, 0.0, 2.0, 2.0]]
    np.testing.assert_allclose(gradient[0, :, :, 0], expected)


def test_the_gradient_keeps_nothing_but_input_and_output() -> None:
    x = distinct((1, 8, 8, 4), jnp.float32)
    output, vjp = jax.vjp(lean_max_pool_2x2, x)
    kept = sorted(jax.tree.leaves(vjp), key=lambda leaf: leaf.size)
    assert len(kept) == 2
    np.testing.assert_array_equal(kept[0], output)
    np.testing.assert_array_equal(kept[1], x)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 7, 5, 2)])
def test_bits_tell_the_maxima(shape: tuple[int, int, int, int]) -> None:
    x = distinct(shape, jnp.float32).at[0, :2, :2, 0].set(100)
    output, vjp = jax.vjp(lean_max_pool_2x2, x)
    maxima = maxima_mask(x, output)
    assert maxima.dtype == jnp.uint8
    assert maxima[0, 0, 0, 0] == 0b1111
    gradient = distinct(output.shape, jnp.float32)
    share = gradient / jax.lax.population_count(maxima)
    np.testing.assert_array_equal(scatter_to_maxima(share, maxima, shape[1:3]), vjp(gradient)[0])
