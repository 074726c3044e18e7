"""Random changes of images: pure functions of a key and a batch, on the device."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates

from tinyvgg_jax.keys import named_key


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


def shift(images: Array, offsets: Array) -> Array:
    """Moves each image by whole pixels: a crop of the image padded with black.

    Args:
        images: `[B, H, W, C]`.
        offsets: `[B, 2]` int, downwards and to the right.

    Returns:
        `[B, H, W, C]`.
    """
    _, H, W, _ = images.shape

    def shift_one(image: Array, offset: Array) -> Array:
        rows, columns = jnp.arange(H) - offset[0], jnp.arange(W) - offset[1]
        inside = ((rows >= 0) & (rows < H))[:, None] & ((columns >= 0) & (columns < W))
        moved = image[rows.clip(0, H - 1)][:, columns.clip(0, W - 1)]
        return jnp.where(inside[..., None], moved, 0)

    return jax.vmap(shift_one)(images, offsets)


def cutout(images: Array, centres: Array, size: int) -> Array:
    """Blackens a square of each image (DeVries & Taylor, arXiv:1708.04552).

    Args:
        images: `[B, H, W, C]`.
        centres: `[B, 2]` int, row and column; the square may reach beyond the image.
        size: its side in pixels.

    Returns:
        `[B, H, W, C]`.
    """
    _, H, W, _ = images.shape
    first = centres - size // 2
    rows, columns = jnp.arange(H) - first[:, :1], jnp.arange(W) - first[:, 1:]
    rows, columns = (rows >= 0) & (rows < size), (columns >= 0) & (columns < size)
    inside = rows[:, :, None] & columns[:, None, :]
    return jnp.where(inside[..., None], 0, images)


def mixup(key: Array, images: Array, targets: Array, alpha: float) -> tuple[Array, Array]:
    """Mixes each image and its target with another of the batch (Zhang et al., arXiv:1710.09412).

    Args:
        key: a PRNG key.
        images: `[B, H, W, C]`, floating.
        targets: `[B, num_classes]`, each row a distribution.
        alpha: of the Beta distribution of the shares; small values mix little.

    Returns:
        Images and targets of the same shapes.
    """
    partner_key, share_key = jax.random.split(key)
    B = len(images)
    partner = jax.random.permutation(partner_key, B)
    share = jax.random.beta(share_key, alpha, alpha, (B,))
    of_images = share.astype(images.dtype)[:, None, None, None]
    mixed = of_images * images + (1 - of_images) * images[partner]
    return mixed, share[:, None] * targets + (1 - share[:, None]) * targets[partner]


def alternating_flips(images: Array, epoch: Array | int) -> Array:
    """Which images to mirror, so that each is seen in both ways in any two epochs.

    Which way comes first is a bit of the sum of an image's pixels, so that it is the same for
    an image wherever it stands in a batch (the idea is airbench's, arXiv:2404.00498).

    Args:
        images: `[B, H, W, C]`, floating, in [0, 1], with 256 levels.
        epoch: counted from 0.

    Returns:
        `[B]` bool.
    """
    levels = jnp.round(images.astype(jnp.float32) * 255).astype(jnp.int32)
    return (levels.sum(axis=(1, 2, 3)) + epoch) % 2 == 1


def augment(
    key: Array,
    images: Array,
    epoch: Array | int = 0,
    *,
    rotation_degrees: float,
    horizontal_flip: bool,
    alternating_flip: bool = False,
    shift_pixels: int = 0,
    cutout_size: int = 0,
) -> Array:
    """Changes each image by a draw of its own; what is 0 or False is left out.

    Args:
        key: a PRNG key; the same key gives the same images.
        images: `[B, H, W, C]`, floating.
        epoch: counted from 0; matters to `alternating_flip` only.
        rotation_degrees: angles are uniform in [-rotation_degrees, rotation_degrees].
        horizontal_flip: whether half of the images, at random, are mirrored.
        alternating_flip: whether instead each image is mirrored every other epoch.
        shift_pixels: images move by up to so many pixels, uniformly, in both directions.
        cutout_size: side of a square that is blackened, its centre anywhere.

    Returns:
        `[B, H, W, C]`, the dtype of `images`.
    """
    B, H, W, _ = images.shape
    rotation_key, flip_key = jax.random.split(key)
    flip = alternating_flips(images, epoch) if alternating_flip else None
    if rotation_degrees:
        images = rotate(
            images,
            jax.random.uniform(
                rotation_key, (B,), minval=-rotation_degrees, maxval=rotation_degrees
            ),
        )
    if horizontal_flip and flip is None:
        flip = jax.random.bernoulli(flip_key, shape=(B,))
    if flip is not None:
        images = flip_horizontally(images, flip)
    if shift_pixels:
        shift_key = named_key(key, "shift")
        offsets = jax.random.randint(shift_key, (B, 2), -shift_pixels, shift_pixels + 1)
        images = shift(images, offsets)
    if cutout_size:
        cutout_key = named_key(key, "cutout")
        centres = jax.random.randint(cutout_key, (B, 2), 0, jnp.array([H, W]))
        images = cutout(images, centres, cutout_size)
    return images
