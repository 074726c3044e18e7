"""Random changes of light, camera and background: pure functions of a batch, on the device.

FashionMNIST shows light garments on black. These changes let a network see what photos add to that.
All images are in [0, 1], and stay there.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

# A pixel this bright or brighter belongs to the garment wholly; the background is black.
_GARMENT = 0.1


def per_image(values: Array) -> Array:
    """Reshapes `[B]` to `[B, 1, 1, 1]`, to be combined with images."""
    return values[:, None, None, None]


def garments(images: Array) -> Array:
    """Computes how much of each pixel belongs to the garment: min(v / 0.1, 1) for a value v.

    The value of a pixel in colour is its highest channel's.

    Args:
        images: `[B, H, W, C]`, of garments on black.

    Returns:
        `[B, H, W, 1]`, in [0, 1]. The share rises over some values, so that edges stay smooth.
    """
    return jnp.minimum(images.max(axis=-1, keepdims=True) / _GARMENT, 1)


def put_on_background(images: Array, level: Array) -> Array:
    """Replaces the black around each garment by a flat level.

    With m a pixel's share of the garment (`garments`),

        v <- v + (1 - m) * level

    Args:
        images: `[B, H, W, C]`.
        level: `[B]`, in [0, 1].

    Returns:
        `[B, H, W, C]`.
    """
    return (images + (1 - garments(images)) * per_image(level)).clip(0, 1)


def change_gamma(images: Array, exponent: Array) -> Array:
    """Raises the values of each image to a power: `[B, H, W, C]`, with `exponent` `[B]`."""
    # The gradient of a power is not finite at 0, but none is taken with respect to images.
    return jnp.power(images, per_image(exponent))


def change_contrast(images: Array, factor: Array) -> Array:
    """Scales the differences from each garment's mean tone; what is around it stays black.

    With m a pixel's share of the garment (`garments`), f the factor, and t = sum(m v) / sum(m)
    over all pixels and channels, the mean tone of the image's garment,

        v <- m * (t + f * (v - t))

    A factor of 0 leaves a flat silhouette.

    Args:
        images: `[B, H, W, C]`.
        factor: `[B]`, not negative.

    Returns:
        `[B, H, W, C]`, in [0, 1].
    """
    share = garments(images)
    size = jnp.maximum(images.shape[-1] * share.sum(axis=(1, 2, 3), keepdims=True), 1)
    tone = (share * images).sum(axis=(1, 2, 3), keepdims=True) / size
    return (share * (tone + (images - tone) * per_image(factor))).clip(0, 1)


def change_brightness(images: Array, offset: Array) -> Array:
    """Adds an offset to the garments: `[B, H, W, C]`, with `offset` `[B]`.

    With m a pixel's share of the garment (`garments`), v <- v + m * offset, in [0, 1].
    """
    return (images + garments(images) * per_image(offset)).clip(0, 1)


def blur(images: Array, sigma: Array, largest: float) -> Array:
    """Blurs each image by a Gaussian; the border is repeated outwards.

    Args:
        images: `[B, H, W, C]`.
        sigma: `[B]`, the Gaussians' standard deviations in pixels; 0 leaves an image as it is.
        largest: upper bound of `sigma`, from which the size of the kernels follows.

    Returns:
        `[B, H, W, C]`.
    """
    radius = math.ceil(2 * largest)
    offsets = jnp.arange(-radius, radius + 1)
    # A small number keeps 0 / 0 away; the Gaussian is then 1 in the middle and 0 elsewhere.
    exponents = -0.5 * (offsets / jnp.maximum(sigma[:, None], 1e-3)) ** 2
    weights = jax.nn.softmax(exponents, axis=1)
    for axis in (1, 2):
        widths = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
        padded, size = jnp.pad(images, widths, mode="edge"), images.shape[axis]
        images = sum(
            (
                per_image(weights[:, i]) * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
                for i in range(len(offsets))
            ),
            start=jnp.zeros_like(images),
        )
    # The weights add up to 1 but for rounding.
    return images.clip(0, 1)


def add_noise(images: Array, noise: Array) -> Array:
    """Adds noise of the same shape, `[B, H, W, C]`, and clips."""
    return (images + noise).clip(0, 1)


def invert_garments(images: Array, inverted: Array) -> Array:
    """Exchanges light and dark within the garments; what is around them stays black.

    With m a pixel's share of the garment (`garments`),

        v <- m * (1 - v)

    A dark line on light cloth becomes a light line on dark cloth. Along its edge, where it is dim,
    a garment receives a light outline, like those of drawings.

    Args:
        images: `[B, H, W, C]`.
        inverted: `[B]` bool, the images to change.

    Returns:
        `[B, H, W, C]`.
    """
    return jnp.where(per_image(inverted), garments(images) * (1 - images), images)
