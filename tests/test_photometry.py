"""Changes of light, camera and background, and of scale and shear."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from scipy import ndimage

from tinyvgg_jax import photometry
from tinyvgg_jax.augment import augment, rotate, transform

ALL: dict[str, Any] = {
    "scale": 0.3,
    "aspect": 0.4,
    "shear_degrees": 15.0,
    "background": 0.5,
    "gamma": 0.7,
    "contrast": 0.5,
    "brightness": 0.3,
    "blur_sigma": 1.5,
    "noise": 0.1,
    "inverted": 0.5,
}


@pytest.fixture
def images() -> Array:
    """Noise in the middle of black images."""
    rng = np.random.default_rng(0)
    inner = rng.uniform(0.2, 1, size=(8, 12, 10, 3))
    return jnp.asarray(np.pad(inner, ((0, 0), (4, 4), (5, 5), (0, 0))), jnp.float32)


@pytest.mark.parametrize("name", ALL)
def test_each_change_is_pure_and_in_range(images: Array, name: str) -> None:
    def change(key: Array, **options: Any) -> Array:
        return augment(key, images, rotation_degrees=0.0, horizontal_flip=False, **options)

    first, other = (change(jax.random.key(seed), **{name: ALL[name]}) for seed in (0, 1))
    again = jax.jit(lambda key: change(key, **{name: ALL[name]}))(jax.random.key(0))
    np.testing.assert_allclose(first, again, atol=1e-5)
    assert not np.allclose(first, other)
    assert first.shape == images.shape and first.dtype == images.dtype
    assert float(first.min()) >= 0 and float(first.max()) <= 1
    # Without it nothing changes, and images differ in how they change.
    np.testing.assert_array_equal(change(jax.random.key(0)), images)
    same = jnp.broadcast_to(images[:1], images.shape)
    varied = augment(
        jax.random.key(0), same, rotation_degrees=0.0, horizontal_flip=False, **{name: ALL[name]}
    )
    assert not np.allclose(varied, varied[:1])


def test_one_change_leaves_the_draws_of_another_alone(images: Array) -> None:
    options: dict[str, Any] = {"rotation_degrees": 10.0, "horizontal_flip": True}
    plain = augment(jax.random.key(3), images, shift_pixels=2, **options)
    inverted = augment(jax.random.key(3), images, shift_pixels=2, inverted=1.0, **options)
    expected = photometry.invert_garments(plain, jnp.ones(len(images), bool))
    np.testing.assert_allclose(inverted, expected, atol=1e-6)


def test_scale_and_shear_are_those_of_scipy() -> None:
    """Compared in the middle, because the two differ in how they treat the border."""
    image = ndimage.gaussian_filter(np.random.default_rng(1).uniform(size=(21, 21)), 2)
    height, width, lean, centre = 1.3, 1.1, np.deg2rad(20.0), np.array([10.0, 10.0])
    # From an output pixel to its source, in rows and columns.
    matrix = np.array([[1 / height, 0], [-np.tan(lean) / width, 1 / width]])
    expected = ndimage.affine_transform(image, matrix, centre - matrix @ centre, order=1)
    ours = transform(
        jnp.asarray(image, jnp.float32)[None, ..., None],
        jnp.zeros(1),
        jnp.array([[height, width]]),
        jnp.full(1, 20.0),
    )
    np.testing.assert_allclose(ours[0, 4:-4, 4:-4, 0], expected[4:-4, 4:-4], atol=1e-4)


def test_a_transform_without_scale_and_shear_is_a_rotation(images: Array) -> None:
    degrees = jnp.linspace(-40, 40, len(images))
    ones, zeros = jnp.ones((len(images), 2)), jnp.zeros(len(images))
    np.testing.assert_allclose(
        transform(images, degrees, ones, zeros), rotate(images, degrees), atol=1e-4
    )


def test_the_blur_is_a_gaussian() -> None:
    image = np.random.default_rng(2).uniform(size=(20, 20)).astype(np.float32)
    sigma = 1.2
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    expected = ndimage.correlate1d(image, kernel, axis=0, mode="nearest")
    expected = ndimage.correlate1d(expected, kernel, axis=1, mode="nearest")
    ours = photometry.blur(jnp.asarray(image)[None, ..., None], jnp.full(1, sigma), 2.0)
    np.testing.assert_allclose(ours[0, ..., 0], expected, atol=1e-5)
    sharp = photometry.blur(jnp.asarray(image)[None, ..., None], jnp.zeros(1), 2.0)
    np.testing.assert_array_equal(sharp[0, ..., 0], image)


def test_light_changes_as_the_formulas_say() -> None:
    values = jnp.array([0.0, 0.05, 0.5, 1.0]).reshape(1, 2, 2, 1)

    def flat(images: Array) -> list[float]:
        return np.asarray(images, np.float64).ravel().round(4).tolist()

    one = jnp.ones(1)
    assert flat(photometry.put_on_background(values, 0.4 * one)) == [0.4, 0.25, 0.5, 1.0]
    assert flat(photometry.change_gamma(values, 2 * one)) == [0, 0.0025, 0.25, 1]
    # The tone is (0.5 * 0.05 + 0.5 + 1) / (0.5 + 1 + 1) = 0.61.
    assert flat(photometry.change_contrast(values, 0 * one)) == [0, 0.305, 0.61, 0.61]
    assert flat(photometry.change_contrast(values, 2 * one)) == [0, 0, 0.39, 1]
    assert flat(photometry.change_brightness(values, 0.3 * one)) == [0, 0.2, 0.8, 1]
    assert flat(photometry.change_brightness(values, -0.3 * one)) == [0, 0, 0.2, 0.7]
    black = jnp.zeros((1, 2, 2, 1))
    assert flat(photometry.change_contrast(black, 2 * one)) == [0] * 4
    assert flat(photometry.invert_garments(values, one > 0)) == [0, 0.475, 0.5, 0]
    assert flat(photometry.invert_garments(values, one < 0)) == flat(values)


def test_white_pictures_stay_in_range() -> None:
    # Where a program is optimised, interpolated white is above 1 by rounding.
    white = jnp.full((8, 6, 6, 1), np.nextafter(np.float32(1), np.float32(2)))
    changes: list[dict[str, Any]] = [{"inverted": 0.5, "gamma": 0.7}, {"blur_sigma": 1.5}]
    for options in changes:
        changed = augment(
            jax.random.key(0), white, rotation_degrees=0.0, horizontal_flip=False, **options
        )
        assert float(changed.min()) >= 0 and float(changed.max()) <= 1


def test_what_is_the_garment_does_not_depend_on_its_colour() -> None:
    red = jnp.array([0.9, 0.0, 0.05]).reshape(1, 1, 1, 3)
    one = jnp.ones(1)
    assert photometry.garments(red).shape == (1, 1, 1, 1)
    np.testing.assert_allclose(photometry.put_on_background(red, 0.3 * one), red)
    inverted = photometry.invert_garments(red, one > 0)
    np.testing.assert_allclose(inverted.ravel(), [0.1, 1.0, 0.95], rtol=1e-6)
    # The tone is the mean of all channels.
    flat = photometry.change_contrast(red, 0 * one)
    np.testing.assert_allclose(flat.ravel(), [0.95 / 3] * 3, rtol=1e-6)


def test_the_background_is_as_light_as_it_was_drawn(images: Array) -> None:
    def corners(**others: Any) -> Array:
        changed = augment(
            jax.random.key(4),
            images,
            rotation_degrees=0.0,
            horizontal_flip=False,
            background=0.3,
            **others,
        )
        return changed[:, 0, 0]

    changed = corners(contrast=0.5, brightness=0.3, gamma=0.7, inverted=0.5)
    np.testing.assert_array_equal(changed, corners())
