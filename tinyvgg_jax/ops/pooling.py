"""The 2x2 max pooling of the model: in plain JAX, and with a gradient that needs less memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Of the pixels of a square, [i, 1, j, 1] to be seen beside [B, h, i, w, j, C].
_BITS = np.arange(4, dtype=np.uint8).reshape(2, 1, 2, 1)


def _squares(x: Array) -> Array:
    """`[B, H // 2, 2, W // 2, 2, C]`: an odd last row or column is left out."""
    B, H, W, C = x.shape
    even = x[:, : H // 2 * 2, : W // 2 * 2]
    return even.reshape(B, H // 2, 2, W // 2, 2, C)


def _from_squares(squares: Array, size: tuple[int, ...]) -> Array:
    """`[B, H, W, C]`, with zeros in an odd last row or column."""
    (H, W), (B, h, _, w, _, C) = size, squares.shape
    even = squares.reshape(B, 2 * h, 2 * w, C)
    return jnp.pad(even, ((0, 0), (0, H - 2 * h), (0, W - 2 * w), (0, 0)))


def max_pool_2x2(x: Array) -> Array:
    """Takes the maximum of each 2x2 square; an odd last row or column is left out.

    Differentiable any number of times, forwards and backwards; the gradient is shared out equally
    among equal maxima. Slices and a maximum, not `lax.reduce_window`, whose second derivatives JAX
    does not have, and not a reshape, which explicit mesh axes do not allow.

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

    Reverse-mode differentiable, once. It is a reshape and a maximum, because on a CPU the gradient
    of `lax.reduce_window` is ten times slower.

    Args:
        x: `[B, H, W, C]`.

    Returns:
        `[B, H // 2, W // 2, C]`, the dtype of `x`.
    """
    return _squares(x).max(axis=(2, 4))


def _forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    output = lean_max_pool_2x2(x)
    # Both are there anyway. JAX's own derivative keeps a third array, the places of the maxima,
    # as large as the input.
    return output, (x, output)


def _backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    x, output = residuals
    is_maximum = _squares(x) == output[:, :, None, :, None]
    share = gradient / is_maximum.sum(axis=(2, 4)).astype(gradient.dtype)
    of_squares = jnp.where(is_maximum, share[:, :, None, :, None], 0)
    return (_from_squares(of_squares, x.shape[1:3]),)


lean_max_pool_2x2.defvjp(_forward, _backward)


def maxima_mask(x: Array, pooled: Array) -> Array:
    """Where the maxima of the 2x2 squares are, in a byte each.

    Args:
        x: `[B, H, W, C]`.
        pooled: `lean_max_pool_2x2(x)`.

    Returns:
        `[B, H // 2, W // 2, C]` uint8: the bit 2i + j is set if the pixel i, j is a maximum.
    """
    is_maximum = (_squares(x) == pooled[:, :, None, :, None]).astype(jnp.uint8)
    return (is_maximum << _BITS).sum(axis=(2, 4), dtype=jnp.uint8)


def scatter_to_maxima(share: Array, maxima: Array, size: tuple[int, ...]) -> Array:
    """The gradient of what is pooled, of which each maximum has its square's share.

    Args:
        share: `[B, H // 2, W // 2, C]`.
        maxima: the same shape, from `maxima_mask`.
        size: H and W.

    Returns:
        `[B, H, W, C]`.
    """
    is_maximum = maxima[:, :, None, :, None] >> _BITS & 1
    return _from_squares(jnp.where(is_maximum, share[:, :, None, :, None], 0), size)
