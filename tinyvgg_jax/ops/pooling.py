"""2x2 max pooling: in plain JAX, and with a gradient that needs less time and memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Bit number 2i + j of pixel (i, j), shaped to broadcast against [B, h, 2, w, 2, C].
_BITS = np.arange(4, dtype=np.uint8).reshape(1, 1, 2, 1, 2, 1)


def _squares(x: Array) -> Array:
    """Reshapes to `[B, H // 2, 2, W // 2, 2, C]`, without an odd last row or column."""
    B, H, W, C = x.shape
    even = x[:, : H // 2 * 2, : W // 2 * 2]
    return even.reshape(B, H // 2, 2, W // 2, 2, C)


def _from_squares(squares: Array, size: tuple[int, ...]) -> Array:
    """Undoes `_squares`: `[B, H, W, C]`, with zeros in an odd last row or column."""
    (H, W), (B, h, _, w, _, C) = size, squares.shape
    even = squares.reshape(B, 2 * h, 2 * w, C)
    return jnp.pad(even, ((0, 0), (0, H - 2 * h), (0, W - 2 * w), (0, 0)))


def max_pool_2x2(x: Array) -> Array:
    """Takes the maximum of each 2x2 square; an odd last row or column is left out.

    It works under every JAX transformation and is differentiable any number of times, forwards and
    backwards; equal maxima receive equal parts of the gradient. It takes slices and their maximum
    because JAX has no second derivative of `lax.reduce_window`, and because explicit mesh axes do
    not allow the reshape of `lean_max_pool_2x2`.

    Args:
        x: `[B, H, W, C]`.

    Returns:
        `[B, H // 2, W // 2, C]`, the dtype of `x`.
    """
    _, H, W, _ = x.shape
    corners = [x[:, i : H // 2 * 2 : 2, j : W // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]
    return jnp.stack(corners).max(axis=0)


@jax.custom_vjp
def lean_max_pool_2x2(x: Array) -> Array:
    """Computes `max_pool_2x2` with a gradient that needs less time and memory.

    It is differentiable in reverse mode only, and only once. It takes a reshape and a maximum
    because on a CPU the gradient of `lax.reduce_window` is ten times slower.

    Args:
        x: `[B, H, W, C]`.

    Returns:
        `[B, H // 2, W // 2, C]`, the dtype of `x`.
    """
    return _squares(x).max(axis=(2, 4))


def _forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    output = lean_max_pool_2x2(x)
    # Input and output are in memory anyway. JAX's own derivative would keep a third array, the
    # places of the maxima, as large as the input.
    return output, (x, output)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    x, output = residuals
    is_maximum = _squares(x) == output[:, :, None, :, None]
    gradient_share = gradient / is_maximum.sum(axis=(2, 4)).astype(gradient.dtype)
    of_squares = jnp.where(is_maximum, gradient_share[:, :, None, :, None], 0)
    return (_from_squares(of_squares, x.shape[1:3]),)


lean_max_pool_2x2.defvjp(_forward, _backward)


def maxima_mask(x: Array, pooled: Array) -> Array:
    """Marks the maxima of each 2x2 square by the bits of one byte.

    Args:
        x: `[B, H, W, C]`.
        pooled: `lean_max_pool_2x2(x)`.

    Returns:
        `[B, H // 2, W // 2, C]` uint8: bit 2i + j is set if pixel (i, j) is a maximum.
    """
    is_maximum = (_squares(x) == pooled[:, :, None, :, None]).astype(jnp.uint8)
    return (is_maximum << _BITS).sum(axis=(2, 4), dtype=jnp.uint8)


def scatter_to_maxima(gradient_share: Array, maxima: Array, size: tuple[int, ...]) -> Array:
    """Computes the gradient of the pooling's input, which is zero except at the maxima.

    Args:
        gradient_share: `[B, H // 2, W // 2, C]`, the gradient of each square's maximum divided by
            the number of pixels that have it.
        maxima: `[B, H // 2, W // 2, C]` uint8, from `maxima_mask`.
        size: H and W.

    Returns:
        `[B, H, W, C]`, the dtype of `gradient_share`.
    """
    is_maximum = maxima[:, :, None, :, None] >> _BITS & 1
    return _from_squares(jnp.where(is_maximum, gradient_share[:, :, None, :, None], 0), size)
