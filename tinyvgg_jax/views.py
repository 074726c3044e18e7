"""Test-time augmentation: a network's answer, averaged over several views of each image."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tinyvgg_jax.augment import transform
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.predict import Classifier, padded
from tinyvgg_jax.step import to_float


class View(NamedTuple):
    """A fixed change of an image's geometry.

    Attributes:
        degrees: angle of a rotation, anticlockwise.
        scale: factor of the size.
        mirrored: whether left and right are exchanged.
    """

    degrees: float
    scale: float
    mirrored: bool


# Angles in degrees and scales, those first that help most, so that the first N are always a good
# choice: a garment in a picture seldom fills it as exactly as in FashionMNIST.
_CHANGES = (
    (0, 1.0),
    (0, 0.7),
    (0, 0.8),
    (0, 0.6),
    (7, 0.85),
    (-7, 0.85),
    (15, 0.7),
    (-15, 0.7),
)


def choose_views(number: int, mirror: bool = True) -> list[View]:
    """Chooses views: the image itself, smaller, mirrored, mirrored and smaller, then others.

    Args:
        number: how many, from 1 to 16, or to 8 without mirror images.
        mirror: whether each change is also taken of the mirror image. A network that never saw
            mirror images in training, like one for digits, must not be asked about them.

    Returns:
        The views.

    Raises:
        UserError: if there are not as many.
    """
    sides = (False, True) if mirror else (False,)
    views = [
        View(*change, side)
        for first in range(0, len(_CHANGES), 2)
        for side in sides
        for change in _CHANGES[first : first + 2]
    ]
    if not 1 <= number <= len(views):
        reason = "" if mirror else ", since the network was trained without mirror images"
        raise UserError(f"--views must be from 1 to {len(views)}{reason}, not {number}.")
    return views[:number]


def saw_mirror_images(config: object) -> bool:
    """Tells whether a network was trained on mirror images, too.

    Args:
        config: the config of its run; or what an exported file says it was, which may be anything.
    """
    augment = config.get("augment") if isinstance(config, Mapping) else None
    return isinstance(augment, Mapping) and any(
        augment.get(field) is True for field in ("horizontal_flip", "alternating_flip")
    )


class Averaged(NamedTuple):
    """A classifier that answers with the mean of the probabilities over several views.

    Attributes:
        classifier: the network.
        views: the views.
    """

    classifier: Classifier
    views: Sequence[View]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)` of the network's images."""
        return self.classifier.image_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return self.classifier.class_names

    @property
    def fit(self) -> str:
        """How the network's images were made of pictures."""
        return self.classifier.fit

    def probabilities(self, batch: np.ndarray, size: int) -> np.ndarray:
        """Computes the mean probabilities of images `[B, H, W, C]` uint8: `[B, num_classes]`.

        Args:
            batch: the images.
            size: number of images in a call of the network.
        """
        answers = [
            self.classifier.probabilities(show(batch, view, size), size) for view in self.views
        ]
        return np.stack(answers).mean(axis=0)


def show(batch: np.ndarray, view: View, size: int) -> np.ndarray:
    """Shows images in a view.

    Args:
        batch: `[B, H, W, C]` uint8.
        view: the view.
        size: number of images in a compiled call; the last call is padded.

    Returns:
        `[B, H, W, C]` uint8; what comes from outside an image is black.
    """
    if view.mirrored:
        batch = batch[:, :, ::-1]
    if view.degrees == 0 and view.scale == 1:
        return batch
    shown = [batch[:0]]
    for start in range(0, len(batch), size):
        chunk = batch[start : start + size]
        changed = np.asarray(_changed(padded(chunk, size), view.degrees, view.scale))
        shown.append(changed[: len(chunk)])
    return np.concatenate(shown)


@jax.jit
def _changed(images: Array, degrees: Array, scale: Array) -> Array:
    number = len(images)
    changed = transform(
        to_float(images),
        jnp.full(number, degrees),
        jnp.full((number, 2), scale),
        jnp.zeros(number),
    )
    return jnp.round(changed * 255).astype(jnp.uint8)
