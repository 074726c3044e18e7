"""The card of an exported network: what its file says about it, in JSON."""

import hashlib
import io
import json
import zipfile
import zlib
from typing import Any

from tinyvgg_jax import __version__
from tinyvgg_jax.runs.folder import dataset_info

# The name of the card: a key of a format's own metadata, or a file in an archive at its end.
KEY = "tinyvgg_jax"
_ENTRY = f"{KEY}.json"
_DIGEST = "sha256"

Card = dict[str, Any]


def make_card(
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    fit: str = "garment",
    **facts: Any,
) -> Card:
    """Makes a network's card.

    Args:
        image_shape: `(H, W, C)` of its images.
        class_names: the names of its classes, in the order of the labels.
        fit: how its images were made of pictures, as in `pictures.load_picture`.
        facts: what else is known: a run's `config`, `step`, `test_accuracy`, and so on.

    Returns:
        The card, JSON-serialisable.
    """
    return {
        "image_shape": list(image_shape),
        "class_names": list(class_names),
        "fit": fit,
        "scaling": "float32 inputs are pixels / 255, uint8 inputs pixels, int8 inputs pixels - 128",
        "package": f"tinyvgg_jax {__version__}",
        **facts,
    }


def to_text(card: Card, artifact: bytes) -> str:
    """Formats a card with the digest of what it describes, for the metadata of a file."""
    return json.dumps({**card, _DIGEST: _digest(card, artifact)}, sort_keys=True)


def _digest(card: Card, artifact: bytes) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode() + artifact).hexdigest()


def from_text(text: str | bytes, artifact: bytes) -> Card:
    """Reads a card, and checks it and what it describes.

    Args:
        text: as from `to_text`.
        artifact: the bytes that `to_text` was given.

    Returns:
        The card.

    Raises:
        ValueError: if the text is no card, or the artifact differs from what it describes.
    """
    try:
        card = json.loads(text)
    except RecursionError as error:
        raise ValueError("its card is nested too deep") from error
    if not isinstance(card, dict):
        raise ValueError("its card is no JSON object")
    if dataset_info(card) is None:
        raise ValueError("its card names no image_shape or class_names")
    if card.pop(_DIGEST, None) != _digest(card, artifact):
        raise ValueError(f"its content does not match its {_DIGEST}")
    return card


def append_card(artifact: bytes, card: Card) -> bytes:
    """Appends a card to an artifact whose format has no place for one, as a zip archive.

    What reads the artifact from its beginning does not see it, and programs for zip archives read
    them from the end: `unzip -p FILE` prints the card.

    Args:
        artifact: a serialised network.
        card: as from `make_card`.

    Returns:
        The bytes of the file.
    """
    buffer = io.BytesIO(artifact)
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
        # An entry without a time of its own, so that the same network makes the same file.
        archive.writestr(zipfile.ZipInfo(_ENTRY), to_text(card, artifact))
    return buffer.getvalue()


def read_appended(content: bytes) -> tuple[bytes, Card]:
    """Splits what `append_card` has made.

    Args:
        content: the bytes of the file.

    Returns:
        The artifact and its card.

    Raises:
        ValueError: if there is no card, or it or the artifact is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            artifact = content[: archive.getinfo(_ENTRY).header_offset]
            return artifact, from_text(archive.read(_ENTRY), artifact)
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise ValueError(f"it has no card of a network ({error})") from error
