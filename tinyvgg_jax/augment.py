"""Random rotation and horizontal flip: pure functions of a key and a batch, on the device."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates


def rotate(images: Array, degrees: Array) -> Array:
    """Rotates each image about its centre by an angle of its own, bilinearly.

    What comes in from outside the image is black.

    Args:
        images: `[B, H, W, C]`, floating.
        degrees: `[B]`, anticlockwise.

    Returns:
        `[B, H, W, C]`, the dtype of `images`, in the range of the images and 0.
    """
    _, H, W, _ = images.shape
    y = jnp.arange(H)[:, None] - (H - 1) / 2
    x = jnp.arange(W)[None, :] - (W - 1) / 2

    def rotate_one(image: Array, angle: Array) -> Array:
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        # Where each output pixel comes from: the rotation by minus the angle (y points down).
        source_y = cos * y + sin * x + (H - 1) / 2
        source_x = cos * x - sin * y + (W - 1) / 2
        sample = partial(map_coordinates, coordinates=[source_y, source_x], order=1)
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    rotated = jax.vmap(rotate_one)(images, jnp.deg2rad(degrees.astype(jnp.float32)))
    return rotated.astype(images.dtype)


def flip_horizontally(images: Array, flip: Array) -> Array:
    """Mirrors left and right in the images for which `flip` is true.

    Args:
        images: `[B, H, W, C]`.
        flip: `[B]` bool.

    Returns:
        `[B, H, W, C]`.
    """
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def augment(key: Array, images: Array, *, rotation_degrees: float, horizontal_flip: bool) -> Array:
    """Rotates and mirrors each image by a draw of its own.

    Args:
        key: a PRNG key; the same key gives the same images.
        images: `[B, H, W, C]`, floating.
        rotation_degrees: angles are uniform in [-rotation_degrees, rotation_degrees].
        horizontal_flip: whether half of the images, at random, are mirrored.

    Returns:
        `[B, H, W, C]`, the dtype of `images`.
    """
    B = images.shape[0]
    rotation_key, flip_key = jax.random.split(key)
    if rotation_degrees:
        images = rotate(
            images,
            jax.random.uniform(
                rotation_key, (B,), minval=-rotation_degrees, maxval=rotation_degrees
            ),
        )
    if horizontal_flip:
        images = flip_horizontally(images, jax.random.bernoulli(flip_key, shape=(B,)))
    return images
