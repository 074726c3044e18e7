from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvgg_jax.augment import (
    alternating_flips,
    augment,
    cutout,
    flip_horizontally,
    mixup,
    replace_rectangles,
    rotate,
    shift,
)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(0), (6, 12, 12, 2))


def test_rotation_by_0_is_the_identity(images: jax.Array) -> None:
    np.testing.assert_array_equal(rotate(images, jnp.zeros(6)), images)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_rotation_by_quarter_turns_is_rot90(images: jax.Array, quarters: int) -> None:
    rotated = rotate(images, jnp.full(6, 90.0 * quarters))
    np.testing.assert_allclose(rotated, jnp.rot90(images, quarters, (1, 2)), atol=1e-5)


def test_rotation_is_bilinear() -> None:
    """A plane stays a plane: the value at a point is that of where it came from."""
    y, x = jnp.meshgrid(jnp.arange(15.0) - 7, jnp.arange(15.0) - 7, indexing="ij")
    plane = (y + 2 * x + 50)[None, :, :, None]
    rotated = rotate(plane, jnp.array([30.0]))[0, :, :, 0]
    sin, cos = np.sin(np.pi / 6), np.cos(np.pi / 6)
    expected = (cos * y + sin * x) + 2 * (cos * x - sin * y) + 50
    inside = y**2 + x**2 < 7**2
    np.testing.assert_allclose(rotated[inside], expected[inside], rtol=1e-5)


def test_what_comes_in_from_outside_is_black() -> None:
    corner = rotate(jnp.ones((1, 12, 12, 1)), jnp.array([45.0]))[0, 0, 0, 0]
    assert corner == 0


def test_each_image_has_its_own_angle(images: jax.Array) -> None:
    degrees = jnp.array([0.0, 90.0, 0.0, 180.0, 0.0, 90.0])
    together = rotate(images, degrees)
    for image, angle, rotated in zip(images, degrees, together, strict=True):
        alone = rotate(image[None], angle[None])[0]
        np.testing.assert_allclose(rotated, alone, atol=1e-6)


def test_flip_mirrors_only_the_chosen_and_twice_is_the_identity(images: jax.Array) -> None:
    flip = jnp.array([True, False, True, False, False, True])
    once = flip_horizontally(images, flip)
    np.testing.assert_array_equal(once[0], images[0, :, ::-1])
    np.testing.assert_array_equal(once[1], images[1])
    np.testing.assert_array_equal(flip_horizontally(once, flip), images)


def test_draws_differ_between_images_keys_and_not_between_calls() -> None:
    same = jnp.tile(jax.random.uniform(jax.random.key(0), (1, 12, 12, 1)), (8, 1, 1, 1))
    rotated = partial(augment, rotation_degrees=20.0, horizontal_flip=False)
    drawn = rotated(jax.random.key(1), same)
    assert len(np.unique(np.asarray(drawn).reshape(8, -1), axis=0)) == 8
    np.testing.assert_array_equal(drawn, rotated(jax.random.key(1), same))
    assert not np.array_equal(drawn, rotated(jax.random.key(2), same))


def test_half_of_the_images_are_flipped() -> None:
    ramp = jnp.tile(jnp.arange(8.0)[None, None, :, None], (1000, 8, 1, 1))
    flipped = augment(jax.random.key(0), ramp, rotation_degrees=0.0, horizontal_flip=True)
    assert 440 < int((flipped[:, 0, 0, 0] == 7).sum()) < 560


def test_angles_fill_the_whole_range_on_both_sides() -> None:
    """A bright spot right of the centre moves up for positive angles and down for negative."""
    spot = jnp.zeros((500, 41, 41, 1)).at[:, 20, 36:].set(1.0)
    turned = np.asarray(
        augment(jax.random.key(0), spot, rotation_degrees=45.0, horizontal_flip=False)
    )
    rows = np.arange(41) - 20
    columns = rows
    mass = turned[..., 0]
    angle = np.degrees(
        np.arctan2(-(mass * rows[:, None]).sum((1, 2)), (mass * columns[None]).sum((1, 2)))
    )
    assert -47 < angle.min() < -42 and 42 < angle.max() < 47
    assert abs(angle.mean()) < 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "option",
    [
        "rotation_degrees",
        "shift_pixels",
        "erasing",
        "background",
        "gamma",
        "contrast",
        "brightness",
        "blur_sigma",
        "noise",
        "inverted",
    ],
)
def test_range_dtype_and_shape_stay(images: jax.Array, dtype: str, option: str) -> None:
    options: dict[str, Any] = {"rotation_degrees": 180.0} | {option: 1}
    drawn = augment(jax.random.key(3), images.astype(dtype), horizontal_flip=True, **options)
    assert drawn.shape == images.shape and drawn.dtype == dtype
    assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1


def test_nothing_asked_for_nothing_done(images: jax.Array) -> None:
    drawn = augment(jax.random.key(0), images, rotation_degrees=0.0, horizontal_flip=False)
    np.testing.assert_array_equal(drawn, images)


def test_shift_moves_whole_pixels_and_black_comes_in(images: jax.Array) -> None:
    offsets = jnp.array([[0, 0], [3, 0], [0, -2], [-1, 4], [12, 0], [0, 1]])
    moved = np.asarray(shift(images, offsets))
    expected = np.zeros_like(moved)
    expected[0] = images[0]
    expected[1, 3:] = images[1, :-3]
    expected[2, :, :-2] = images[2, :, 2:]
    expected[3, :-1, 4:] = images[3, 1:, :-4]
    expected[5, :, 1:] = images[5, :, :-1]
    np.testing.assert_array_equal(moved, expected)


def test_shifts_reach_as_far_as_they_may_and_no_farther() -> None:
    dots = jnp.zeros((300, 9, 9, 1)).at[:, 4, 4].set(1.0)
    moved = augment(
        jax.random.key(0), dots, rotation_degrees=0.0, horizontal_flip=False, shift_pixels=2
    )
    _, rows, columns, _ = np.nonzero(np.asarray(moved))
    places = {(int(row), int(column)) for row, column in zip(rows, columns, strict=True)}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}


def test_cutout_blackens_a_square_that_may_reach_beyond_the_image() -> None:
    cut = np.asarray(cutout(jnp.ones((2, 8, 8, 3)), jnp.array([[4, 3], [0, 7]]), size=4))
    expected = np.ones((2, 8, 8, 3))
    expected[0, 2:6, 1:5] = 0
    expected[1, :2, 5:] = 0
    np.testing.assert_array_equal(cut, expected)


def test_cutouts_are_anywhere() -> None:
    cut = augment(
        jax.random.key(0),
        jnp.ones((500, 8, 8, 1)),
        rotation_degrees=0.0,
        horizontal_flip=False,
        cutout_size=2,
    )
    share = np.asarray(cut)[..., 0].mean(axis=0)
    assert (share < 1).all() and (share > 0.85).all()
    assert len(np.unique(np.asarray(cut).reshape(500, -1), axis=0)) == 64


def test_a_rectangle_of_each_image_is_replaced() -> None:
    values = jnp.arange(3 * 8 * 8 * 2, dtype=jnp.float32).reshape(3, 8, 8, 2) + 2
    first, size = jnp.array([[4, 3], [0, 0], [2, 2]]), jnp.array([[4, 2], [8, 8], [0, 5]])
    erased = np.asarray(replace_rectangles(jnp.ones((3, 8, 8, 2)), first, size, values))
    expected = np.ones((3, 8, 8, 2))
    expected[0, 4:8, 3:5] = values[0, 4:8, 3:5]
    expected[1] = values[1]
    np.testing.assert_array_equal(erased, expected)


def test_erased_rectangles_are_of_the_papers_sizes_and_anywhere() -> None:
    H, W, B = 40, 60, 4_000
    erased = augment(
        jax.random.key(0),
        jnp.full((B, H, W, 1), 2.0),
        rotation_degrees=0.0,
        horizontal_flip=False,
        erasing=0.25,
    )
    inside = np.asarray(erased)[..., 0] != 2
    chosen = inside.any(axis=(1, 2))
    # Five standard deviations of a binomial distribution.
    assert abs(chosen.mean() - 0.25) < 5 * (0.25 * 0.75 / B) ** 0.5
    height, width = inside.any(axis=2).sum(axis=1)[chosen], inside.any(axis=1).sum(axis=1)[chosen]
    np.testing.assert_array_equal(inside.sum(axis=(1, 2))[chosen], height * width)
    # Sides are rounded, and a side that is longer than the image is cut.
    uncut = (height < H) & (width < W)
    assert ((height - 0.5) * (width - 0.5))[uncut].max() <= 0.4 * H * W
    assert ((height + 0.5) * (width + 0.5)).min() >= 0.02 * H * W
    ratio = height / width
    assert 0.25 < ratio.min() < 0.5 and 2 < ratio[uncut].max() < 4
    # As many are higher than wide as the other way round, and every pixel has its turn.
    assert abs((height > width).mean() - 0.5) < 0.1
    assert inside.any(axis=0).all()
    noise = np.asarray(erased)[..., 0][inside]
    assert noise.min() >= 0 and noise.max() <= 1 and abs(noise.mean() - 0.5) < 0.01


def test_mixup_mixes_images_and_targets_by_the_same_shares() -> None:
    B = 50
    # An image is its number, a target is a distribution with that number in it.
    images = jnp.tile(jnp.arange(float(B))[:, None, None, None], (1, 2, 2, 1))
    mixed, targets = mixup(jax.random.key(0), images, jnp.eye(B), alpha=1.0)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(mixed[:, 1, 1, 0], targets @ jnp.arange(float(B)), rtol=1e-4)
    shares = np.diagonal(np.asarray(targets))
    assert shares.min() < 0.2 and shares.max() > 0.8
    # Small values mix little.
    _, targets = mixup(jax.random.key(0), images, jnp.eye(B), alpha=0.01)
    assert (np.asarray(targets).max(axis=1) > 0.95).mean() > 0.9


def test_alternating_flips_show_each_image_both_ways_in_two_epochs() -> None:
    levels = np.random.default_rng(0).integers(256, size=(400, 6, 6, 1))
    images = jnp.asarray(levels / 255, jnp.float32)
    first, second, third = (np.asarray(alternating_flips(images, epoch)) for epoch in (4, 5, 6))
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    assert 150 < first.sum() < 250
    # An image's turn does not depend on where it stands.
    order = np.random.default_rng(1).permutation(400)
    np.testing.assert_array_equal(alternating_flips(images[order], 4), first[order])
    for epoch, flipped in ((4, first), (5, second)):
        for horizontal_flip in (False, True):
            drawn = augment(
                jax.random.key(0),
                images,
                epoch,
                rotation_degrees=0.0,
                horizontal_flip=horizontal_flip,
                alternating_flip=True,
            )
            np.testing.assert_array_equal(drawn, flip_horizontally(images, jnp.asarray(flipped)))
