"""Random changes of images: pure functions of a key and a batch, on the device."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.ndimage import map_coordinates

from tinyvgg_jax import photometry
from tinyvgg_jax.devices import AXIS, Share
from tinyvgg_jax.keys import Purpose, named_key


def rotate(images: Array, degrees: Array) -> Array:
    """Rotates each image about its centre by an angle of its own, with bilinear interpolation.

    Pixels that come from outside the image are black.

    Args:
        images: `[B, H, W, C]`, floating.
        degrees: `[B]`, anticlockwise angles.

    Returns:
        `[B, H, W, C]`, the dtype of `images`. Up to rounding, its values lie between the lowest and
        the highest of the image's values and 0.
    """
    return transform(images, degrees)


def transform(
    images: Array, degrees: Array, scale: Array | None = None, shear: Array | None = None
) -> Array:
    """Scales, shears and rotates each image about its centre, with bilinear interpolation.

    An output pixel at (y, x) from the centre comes from

        (y' / h, (x' - tan(shear) * y') / w), where (y', x') = R^-1 (y, x)

    with R the rotation by `degrees`, and h and w the factors of height and width.

    Pixels that come from outside the image are black.

    Args:
        images: `[B, H, W, C]`, floating.
        degrees: `[B]`, anticlockwise angles.
        scale: `[B, 2]`, factors of height and width; None for a rotation alone.
        shear: `[B]`, angles in degrees by which columns lean; None likewise.

    Returns:
        `[B, H, W, C]`, the dtype of `images`.
    """
    _, H, W, _ = images.shape
    y = jnp.arange(H)[:, None] - (H - 1) / 2
    x = jnp.arange(W)[None, :] - (W - 1) / 2

    def transform_one(image: Array, angle: Array, *others: Array) -> Array:
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        # An output pixel comes from the position that the opposite rotation takes it to. The signs
        # are those of a y axis that points down.
        source_y = cos * y + sin * x
        source_x = cos * x - sin * y
        if others:
            factors, lean = others
            source_x = (source_x - jnp.tan(lean) * source_y) / factors[1]
            source_y = source_y / factors[0]
        source_y = source_y + (H - 1) / 2
        source_x = source_x + (W - 1) / 2
        sample = partial(map_coordinates, coordinates=[source_y, source_x], order=1)
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)

    # Rotation alone, which is more frequent, does without them.
    others = () if scale is None or shear is None else (scale, jnp.deg2rad(shear))
    angles = jnp.deg2rad(degrees.astype(jnp.float32))
    return jax.vmap(transform_one)(images, angles, *others).astype(images.dtype)


def flip_horizontally(images: Array, flip: Array) -> Array:
    """Mirrors the images for which `flip` is true, left to right.

    Args:
        images: `[B, H, W, C]`.
        flip: `[B]` bool, whether to mirror each image.

    Returns:
        `[B, H, W, C]`.
    """
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def shift(images: Array, offsets: Array) -> Array:
    """Moves each image by whole pixels and fills the gap with black.

    Args:
        images: `[B, H, W, C]`.
        offsets: `[B, 2]` int, pixels downwards and to the right.

    Returns:
        `[B, H, W, C]`.
    """
    _, H, W, _ = images.shape

    def shift_one(image: Array, offset: Array) -> Array:
        rows, columns = jnp.arange(H) - offset[0], jnp.arange(W) - offset[1]
        inside = ((rows >= 0) & (rows < H))[:, None] & ((columns >= 0) & (columns < W))
        # Indices outside the image are clipped only to be valid; the mask below makes them black.
        moved = image[rows.clip(0, H - 1)][:, columns.clip(0, W - 1)]
        return jnp.where(inside[..., None], moved, 0)

    return jax.vmap(shift_one)(images, offsets)


def cutout(images: Array, centres: Array, size: int) -> Array:
    """Blackens a square of each image (DeVries & Taylor, arXiv:1708.04552).

    Args:
        images: `[B, H, W, C]`.
        centres: `[B, 2]` int, row and column of each square's centre; a square may reach beyond
            its image.
        size: side of the squares in pixels.

    Returns:
        `[B, H, W, C]`.
    """
    return replace_rectangles(images, centres - size // 2, jnp.full_like(centres, size), 0)


def replace_rectangles(images: Array, first: Array, size: Array, values: Array | float) -> Array:
    """Replaces a rectangle of each image by other values.

    Args:
        images: `[B, H, W, C]`.
        first: `[B, 2]` int, the first row and column of each rectangle, which may reach beyond its
            image.
        size: `[B, 2]` int, its height and width; where one is 0, the image stays as it is.
        values: `[B, H, W, C]`, of which those inside the rectangles are taken; or one for all.

    Returns:
        `[B, H, W, C]`, the dtype of `images`.
    """
    _, H, W, _ = images.shape
    end = first + size
    rows, columns = jnp.arange(H), jnp.arange(W)
    rows = (rows >= first[:, :1]) & (rows < end[:, :1])
    columns = (columns >= first[:, 1:]) & (columns < end[:, 1:])
    inside = rows[:, :, None] & columns[:, None, :]
    return jnp.where(inside[..., None], values, images).astype(images.dtype)


def mixup(
    key: Array, images: Array, targets: Array, alpha: float, share: Share | None = None
) -> tuple[Array, Array]:
    """Mixes each image and its target with another of the batch (Zhang et al., arXiv:1710.09412).

    Image i becomes `w * images[i] + (1 - w) * images[j]`, and its target likewise, with a weight w
    drawn from Beta(alpha, alpha) for each i, and j from a random permutation of the batch.

    Args:
        key: a PRNG key.
        images: `[B, H, W, C]`, floating.
        targets: `[B, num_classes]`, each row a probability distribution.
        alpha: parameter of the Beta distribution; with small values most weights are near 0 or 1,
            so that little is mixed.
        share: the part of a larger batch that the images are; None for all of it. Partners are of
            the whole batch, so this is the one change for which devices exchange images.

    Returns:
        The mixed images and targets, of the same shapes.
    """
    partner_key, weight_key = jax.random.split(key)
    B = share.total if share else len(images)
    partner = jax.random.permutation(partner_key, B)
    weight = jax.random.beta(weight_key, alpha, alpha, (B,))
    all_images, all_targets = images, targets
    if share:
        all_images, all_targets = lax.all_gather((images, targets), AXIS, tiled=True)
        partner, weight = share.of(partner), share.of(weight)
    image_weight = weight.astype(images.dtype)[:, None, None, None]
    mixed = image_weight * images + (1 - image_weight) * all_images[partner]
    return mixed, weight[:, None] * targets + (1 - weight[:, None]) * all_targets[partner]


def alternating_flips(images: Array, epoch: Array | int) -> Array:
    """Chooses the images to mirror in an epoch, so that each is mirrored in every other epoch.

    Any two successive epochs then show each image in both ways (the idea is airbench's,
    arXiv:2404.00498). Images whose pixels have an odd sum begin mirrored. So the choice depends on
    the image alone, and not on its place in the batch, which changes from epoch to epoch.

    Args:
        images: `[B, H, W, C]`, floating, in [0, 1], multiples of 1/255.
        epoch: counted from 0.

    Returns:
        `[B]` bool, True for an image to mirror.
    """
    levels = jnp.round(images.astype(jnp.float32) * 255).astype(jnp.int32)
    return (levels.sum(axis=(1, 2, 3)) + epoch) % 2 == 1


def augment(
    key: Array,
    images: Array,
    epoch: Array | int = 0,
    share: Share | None = None,
    *,
    rotation_degrees: float,
    horizontal_flip: bool,
    alternating_flip: bool = False,
    shift_pixels: int = 0,
    cutout_size: int = 0,
    erasing: float = 0.0,
    scale: float = 0.0,
    aspect: float = 0.0,
    shear_degrees: float = 0.0,
    **light: float,
) -> Array:
    """Augments each image by random changes of its own; options left at 0 or False have no effect.

    First the geometry changes: rotation with scale, aspect and shear, mirroring, shift. Then light
    and camera do, see `change_light`. Cutout and random erasing come last.

    Args:
        key: a PRNG key; the same key gives the same images.
        images: `[B, H, W, C]`, floating.
        epoch: counted from 0; used by `alternating_flip` only.
        share: the part of a larger batch that the images are; None for all of it.
        rotation_degrees: largest angle; angles are uniform in [-rotation_degrees,
            rotation_degrees].
        horizontal_flip: whether to mirror each image with probability 1/2.
        alternating_flip: whether to mirror each image in every other epoch instead.
        shift_pixels: largest shift, drawn uniformly for each of the two directions.
        cutout_size: side in pixels of a square to blacken, whose centre is any pixel.
        erasing: fraction of the images from which a rectangle is erased, with noise in its place.
        scale: largest change of size; factors are 2**u with u uniform in [-scale, scale].
        aspect: largest change of the shape; width / height is multiplied by 2**u with u uniform in
            [-aspect, aspect], and the area stays.
        shear_degrees: largest angle by which columns lean, to either side.
        light: options of `change_light`.

    Returns:
        `[B, H, W, C]`, the dtype of `images`.
    """
    draws = Draws(key, share.total if share else len(images), share)
    rotation_key, flip_key = jax.random.split(key)
    # This comes before all changes, because it depends on the sum of the image's own pixels.
    flip = alternating_flips(images, epoch) if alternating_flip else None
    if rotation_degrees or scale or aspect or shear_degrees:
        low, high = -rotation_degrees, rotation_degrees
        degrees = jax.random.uniform(rotation_key, (draws.number,), minval=low, maxval=high)
        others: tuple[Array, ...] = ()
        if scale or aspect or shear_degrees:
            size, half = draws.spread("scale", scale), draws.spread("aspect", aspect) / 2
            factors = 2 ** jnp.stack([size - half, size + half], axis=1)
            others = (factors, draws.spread("shear", shear_degrees))
        images = transform(images, draws.own(degrees), *others)
    if horizontal_flip and flip is None:
        flip = draws.own(jax.random.bernoulli(flip_key, shape=(draws.number,)))
    if flip is not None:
        images = flip_horizontally(images, flip)
    # All others have keys of their own, so that they do not change the draws of one another.
    if shift_pixels:
        images = shift(images, draws.integers("shift", -shift_pixels, shift_pixels + 1))
    images = change_light(draws, images, **light)
    if cutout_size:
        centres = draws.integers("cutout", 0, jnp.array(images.shape[1:3]))
        images = cutout(images, centres, cutout_size)
    if erasing:
        images = replace_rectangles(images, *_erased(draws, erasing, images.shape))
    return images


class Draws(NamedTuple):
    """Random numbers for a batch, of which each device takes those of its own images.

    Attributes:
        key: a PRNG key.
        number: number of images in the whole batch.
        share: the part of it that the images are; None for all of it.
    """

    key: Array
    number: int
    share: Share | None

    def own(self, draws: Array) -> Array:
        """Takes the draws `[number, ...]` that are of this device's images."""
        return self.share.of(draws) if self.share else draws

    def uniform(
        self, purpose: Purpose, low: float, high: float, shape: tuple[int, ...] = ()
    ) -> Array:
        """Draws numbers for each image: `[B, *shape]`."""
        key = named_key(self.key, purpose)
        return self.own(jax.random.uniform(key, (self.number, *shape), minval=low, maxval=high))

    def spread(self, purpose: Purpose, largest: float) -> Array:
        """Draws a number in [-largest, largest] for each image: `[B]`."""
        return self.uniform(purpose, -largest, largest)

    def integers(self, purpose: Purpose, low: int, end: int | Array) -> Array:
        """Draws two whole numbers below `end` for each image: `[B, 2]`."""
        key = named_key(self.key, purpose)
        return self.own(jax.random.randint(key, (self.number, 2), low, end))


def _erased(draws: Draws, erasing: float, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Draws the rectangles of random erasing, and noise for them (Zhong et al., arXiv:1708.04896).

    An area is uniform in [0.02, 0.4] of the image's, the logarithm of height / width in
    [log(0.3), log(1 / 0.3)], ranges as in the paper; a side longer than the image is cut.
    """
    _, H, W, _ = shape
    area = draws.uniform("erased area", 0.02, 0.4) * H * W
    ratio = jnp.exp(draws.spread("erased ratio", -math.log(0.3)))
    sides = jnp.sqrt(jnp.stack([area * ratio, area / ratio], axis=1)).round()
    chosen = draws.uniform("erasing", 0, 1) < erasing
    size = jnp.minimum(sides, jnp.array([H, W])).astype(int) * chosen[:, None]
    corner = draws.uniform("erased corner", 0, 1, (2,))
    first = jnp.floor(corner * (jnp.array([H, W]) - size + 1)).astype(int)
    return first, size, draws.uniform("erased noise", 0, 1, shape[1:])


def change_light(
    draws: Draws,
    images: Array,
    *,
    inverted: float = 0.0,
    gamma: float = 0.0,
    contrast: float = 0.0,
    brightness: float = 0.0,
    background: float = 0.0,
    blur_sigma: float = 0.0,
    noise: float = 0.0,
) -> Array:
    """Changes light and camera; options left at 0 have no effect.

    The garments are changed first, in the order of the options, on the black by which they are
    recognised; then comes the background, then the camera's blur and noise.

    Args:
        draws: random numbers for the images.
        images: `[B, H, W, C]`, floating, in [0, 1].
        inverted: fraction of the images in whose garments light and dark are exchanged.
        gamma: exponents are 2**u with u uniform in [-gamma, gamma].
        contrast: largest change of contrast, a fraction.
        brightness: largest change of brightness, in [0, 1].
        background: highest level of the flat background, uniform in [0, background].
        blur_sigma: largest standard deviation in pixels of a Gaussian blur.
        noise: largest standard deviation of Gaussian noise, for values in [0, 1].

    Returns:
        `[B, H, W, C]`, in [0, 1], the dtype of `images`.
    """
    if not any((inverted, gamma, contrast, brightness, background, blur_sigma, noise)):
        return images
    dtype = images.dtype
    # Interpolation leaves [0, 1] by rounding, and a power of what is below 0 is not a number.
    images = images.clip(0, 1)
    if inverted:
        key = named_key(draws.key, "inversion")
        chosen = jax.random.bernoulli(key, float(inverted), (draws.number,))
        images = photometry.invert_garments(images, draws.own(chosen))
    if gamma:
        images = photometry.change_gamma(images, 2 ** draws.spread("gamma", gamma))
    if contrast:
        images = photometry.change_contrast(images, 1 + draws.spread("contrast", contrast))
    if brightness:
        images = photometry.change_brightness(images, draws.spread("brightness", brightness))
    if background:
        level = draws.uniform("background", 0, background)
        images = photometry.put_on_background(images, level)
    if blur_sigma:
        sigma = draws.uniform("blur", 0, blur_sigma)
        images = photometry.blur(images, sigma, blur_sigma)
    if noise:
        shape = (draws.number, *images.shape[1:])
        normal = draws.own(jax.random.normal(named_key(draws.key, "noise"), shape))
        amount = photometry.per_image(draws.uniform("noise level", 0, noise))
        images = photometry.add_noise(images, amount * normal)
    # The draws are float32.
    return images.astype(dtype)
