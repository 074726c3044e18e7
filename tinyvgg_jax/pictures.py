"""Picture files to arrays like the dataset's: a light garment on black, trimmed, in the centre."""

import collections
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tinyvgg_jax.errors import UserError

logger = logging.getLogger(__name__)

INVERT = ("auto", "yes", "no")
# Formats whose pixels Pillow does not read itself: of the first four it knows only the head, WMF is
# drawn by Windows, and EPS is a program, which Ghostscript would run.
_UNREAD = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
# Refused beyond this: it takes up to 12 bytes a pixel. A phone's photo has 12 to 50 million.
_MAX_PIXELS = 100_000_000
# Fewer pixels on the longer side show nothing that could be told apart.
_MIN_SIDE = 8
# Pixels on the longer side of what a picture is first reduced to, for each of the network's.
_DETAIL = 16
# Of 255; a pixel that differs less from the background is background. The dataset's makers took
# 5 % (arXiv:1708.07747), for photos of a studio; a home's walls are less even.
_SAME = 25


class Picture(NamedTuple):
    """A picture as the network gets to see it.

    Attributes:
        pixels: `[H, W, C]` uint8, in the network's size.
        inverted: whether dark was made light.
    """

    pixels: np.ndarray
    inverted: bool


@functools.cache
def suffixes() -> frozenset[str]:
    """Lists the suffixes, like `.jpg`, of the picture files that the installed Pillow can read."""
    # This fills `Image.OPEN` too.
    formats = Image.registered_extensions()
    # An MPO is several JPEGs in a file, which Pillow opens as JPEG.
    readable = {*Image.OPEN, "MPO"} - _UNREAD
    return frozenset(suffix for suffix, name in formats.items() if name in readable)


def find_files(path: Path) -> list[Path]:
    """Finds the pictures in a folder and in its subfolders, by name; a file is itself.

    It logs in a line how many other files the folder holds.

    Raises:
        UserError: if there is nothing, or it may not be read.
    """
    try:
        if not path.is_dir():
            # Whether it can be read is found out when it is.
            path.stat()
            return [path]
        files = sorted(_walk(path))
        pictures = [file for file in files if _is_picture(file)]
        skipped = _skipped([file for file in files if not _is_picture(file) and file.is_file()])
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{where}: {(error.strerror or str(error)).lower()}.") from error
    if not pictures:
        raise UserError(f"{path}: no picture in this folder{skipped and '; ' + skipped}.")
    if skipped:
        # It stands among what the command line says of files that cannot be read, and looks alike.
        logger.warning("tinyvgg_jax: %s", " ".join(f"{path}: {skipped}.".split()))
    return pictures


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in suffixes()


def _walk(folder: Path) -> Iterator[Path]:
    """All files that are not hidden."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _skipped(files: list[Path]) -> str:
    """Says how many files are no pictures, and of what kinds most are; of no files, nothing."""
    kinds = collections.Counter(file.suffix.lower() or file.name for file in files)
    named = ", ".join(kind for kind, _ in kinds.most_common(5)) + ", ..." * (len(kinds) > 5)
    if len(files) < 2:
        return f"1 file is no picture and was skipped ({named})" if files else ""
    return f"{len(files):,} files are no pictures and were skipped ({named})"


def load_picture(
    path: str | Path, image_shape: tuple[int, int, int] = (28, 28, 1), invert: str = "auto"
) -> Picture:
    """Reads a picture file and makes of it what `normalise` says.

    The orientation that a camera noted is applied, of an animation the first frame is taken, and
    what is transparent becomes a background that the rest stands out from.

    Args:
        path: PNG, JPEG, WebP, TIFF, or what else Pillow reads; any size, colour or grey.
        image_shape: `(H, W, C)` of the network's images, C being 1 or 3.
        invert: "auto", "yes" or "no", see `normalise`.

    Returns:
        The picture.

    Raises:
        UserError: if it is no image, damaged, or of a size that is out of reason.
    """
    try:
        # Given the path instead, Pillow 13 shears a TIFF that lies on its side.
        with Path(path).open("rb") as file, Image.open(file) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width:,}x{image.height:,} pixels are too many; at most "
                    f"{_MAX_PIXELS:,} in all."
                )
            if max(image.size) < _MIN_SIDE:
                raise UserError(
                    f"{path}: {image.width}x{image.height} pixels are too few to show anything."
                )
            grey = image_shape[2] == 1
            side = _DETAIL * max(image_shape[:2])
            if max(image.size) > side:
                # A JPEG can be decoded at a fraction of its size, in a fraction of the time.
                image.draft("L" if grey and image.mode == "L" else "RGB", (side, side))
            pixels = _decode(image, "L" if grey else "RGB", side)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too many pixels; at most {_MAX_PIXELS:,} in all.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that Pillow knows.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read: {reason.lower()}.") from error
    except Exception as error:  # A damaged file brings out anything in a decoder.
        raise UserError(f"{path}: cannot be read as an image: {error}.") from error
    try:
        return normalise(pixels, image_shape, invert)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error


def _decode(image: Image.Image, mode: str, side: int) -> np.ndarray:
    """`[H, W, C]` uint8 in a mode, upright, opaque, and no longer than so many pixels."""
    image.load()
    # This comes first because images made from this one do not know how it was turned.
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        # 16 bits a pixel, which Pillow would cut off at 255.
        image = Image.fromarray(_to_uint8(np.array(image, np.float32), image.mode == "F"))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    image = image.convert("RGBA" if transparent else mode)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    pixels = np.asarray(_opaque(image).convert(mode) if transparent else image)
    return pixels.reshape(*pixels.shape[:2], -1)


def _to_uint8(values: np.ndarray, floating: bool) -> np.ndarray:
    """Scales values that go up to 1, or to the highest of 8 bits or more, to 255; in place."""
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(values.max())
    # A file of 16 bits a pixel may hold a camera's 10 or 12, and does not say so. The highest value
    # tells how many are used; if it tells too few, the picture is a dark one and becomes lighter,
    # which does no harm. Floating values go to 1, and slightly beyond after a resampling.
    top = 1 if floating and highest < 2 else 2 ** max(8, int(highest).bit_length()) - 1
    values *= 255 / top
    return values.clip(0, 255, out=values).astype(np.uint8)


def _opaque(image: Image.Image) -> Image.Image:
    """On white if what is seen is rather dark, else on black."""
    pixels = np.asarray(image.convert("LA"), np.float64)
    weight = pixels[..., 1].sum()
    mean = (pixels[..., 0] * pixels[..., 1]).sum() / weight if weight else 0.0
    background = "white" if mean < 128 else "black"
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image)


def normalise(pixels: np.ndarray, image_shape: tuple[int, int, int], invert: str) -> Picture:
    """Makes of a photo what FashionMNIST's makers made of theirs (arXiv:1708.07747).

    The background is the median of the border. What differs from it is cut out, resized with
    antialiasing so that its longer side fills the image, and put in the centre; dark on light is
    turned into light on dark, with the background at 0. A picture that has the network's size
    already is left as it is, or inverted; "auto" means that its corners decide. Of a network for
    colour images, no background is sought, and "auto" means "no".

    Args:
        pixels: `[H, W, C]` uint8.
        image_shape: `(H, W, C)` of the network's images.
        invert: "yes", "no", or "auto": whether the border is rather light than dark.

    Returns:
        The picture.

    Raises:
        ValueError: if all pixels are alike.
    """
    if invert not in INVERT:
        raise ValueError(f"invert must be one of {', '.join(INVERT)}, not {invert!r}")
    grey = image_shape[2] == 1
    if pixels.shape == image_shape:
        light_corner = bool(_corner(pixels).mean() > 127)
        inverted = invert == "yes" or (invert == "auto" and grey and light_corner)
        return Picture(255 - pixels if inverted else pixels, inverted)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    light = bool(background.mean() > 127)
    inverted = invert == "yes" or (invert == "auto" and grey and light)
    if grey:
        pixels = _trimmed(pixels, background)
    fitted = _fit(pixels, image_shape, background).astype(np.float64)
    if inverted:
        fitted, background = 255 - fitted, 255 - background
    if grey and background.mean() <= 127:
        fitted = (fitted - background) * (255 / (255 - background))
    return Picture(fitted.clip(0, 255).round().astype(np.uint8), inverted)


def _corner(pixels: np.ndarray) -> np.ndarray:
    """The second darkest of the four corners, `[C]`: if it is light, so are three of them.

    A garment that fills an image reaches its border, but hardly its corners: by these, all 70,000
    images of FashionMNIST are told from their inverted selves; by the border, all but two.
    """
    return np.sort(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)[1]


def _trimmed(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The box of what differs from the background."""
    differs = np.abs(pixels.astype(np.int16) - background).max(axis=2) > _SAME
    if not differs.any():
        raise ValueError("all its pixels are alike")
    rows, columns = (_span(differs.mean(axis=axis)) for axis in (1, 0))
    return pixels[rows, columns]


def _span(shares: np.ndarray) -> slice:
    """From the first to the last row in which more differs than a speck of dust."""
    busy = np.flatnonzero(shares > min(0.01, shares.max() / 2))
    return slice(int(busy[0]), int(busy[-1]) + 1)


def _fit(
    pixels: np.ndarray, image_shape: tuple[int, int, int], background: np.ndarray
) -> np.ndarray:
    """Resized to fit, keeping the aspect ratio, in the centre of the background."""
    (h, w), (H, W, C) = pixels.shape[:2], image_shape
    scale = min(H / h, W / w)
    new_h, new_w = max(1, min(H, round(h * scale))), max(1, min(W, round(w * scale)))
    source = Image.fromarray(pixels[..., 0] if C == 1 else pixels)
    small = np.asarray(source.resize((new_w, new_h), Image.Resampling.LANCZOS))
    canvas = np.empty(image_shape, np.uint8)
    canvas[:] = background.round().astype(np.uint8)
    top, left = (H - new_h) // 2, (W - new_w) // 2
    canvas[top : top + new_h, left : left + new_w] = small.reshape(new_h, new_w, C)
    return canvas


def find_all(paths: Iterable[str | Path]) -> Iterator[Path | UserError]:
    """The files of several paths, in order; for a path without any, what is wrong with it."""
    for path in paths:
        try:
            yield from find_files(Path(path).expanduser())
        except UserError as error:
            yield error
