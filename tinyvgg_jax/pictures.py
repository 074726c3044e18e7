"""Picture files to arrays like the dataset's: a light garment on black, trimmed, in the centre."""

import collections
import functools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import local_path

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
# Of 255; where nothing differs more after noise has been averaged out, nothing is there.
_ALIKE = 8
# Of 255; a garment that is nowhere as bright is stretched until it reaches 255, as nearly every
# image of the dataset does. At half their brightness, a network is right on 6 % fewer images.
_DIM = 128
# If a larger share of the pixels is transparent, the garment has been cut out; if a smaller one is,
# then perhaps only the picture's corners are rounded, and its background is still to be found.
_CUT_OUT = 0.05


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
        UserError: if it is no image, damaged, of a size that is out of reason, or all alike.
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
            pixels, background = _decode(image, "L" if grey else "RGB", side)
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
        return normalise(pixels, image_shape, invert, background)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error


def _decode(image: Image.Image, mode: str, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes a picture, upright, opaque, and no longer than so many pixels.

    Returns:
        `[H, W, C]` uint8 in the mode, and `[C]`, the background, if its transparency tells it.
    """
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
    background = None
    if transparent:
        image, background = _opaque(image, mode)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), background


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


def _opaque(image: Image.Image, mode: str) -> tuple[Image.Image, np.ndarray | None]:
    """Puts what is seen on white if it is rather dark, else on black.

    Returns:
        The picture, and `[C]`, its background; None if so little is transparent that this is none.
    """
    pixels = np.asarray(image.convert("LA"), np.float64)
    weight = pixels[..., 1].sum()
    mean = (pixels[..., 0] * pixels[..., 1]).sum() / weight if weight else 0.0
    level = 255 if mean < 128 else 0
    ground = Image.new("RGBA", image.size, (level, level, level))
    flat = Image.alpha_composite(ground, image).convert(mode)
    cut_out = (pixels[..., 1] < 16).mean() > _CUT_OUT
    return flat, np.full(len(flat.getbands()), float(level)) if cut_out else None


def normalise(
    pixels: np.ndarray,
    image_shape: tuple[int, int, int],
    invert: str,
    background: np.ndarray | None = None,
) -> Picture:
    """Makes of a photo what FashionMNIST's makers made of theirs (arXiv:1708.07747).

    The background is the median of the border. What differs from it is cut out, resized with
    antialiasing so that its longer side fills the image, and put in the centre; a garment darker
    than its background is turned into a lighter one, with the background at 0, and what stays dim
    is stretched to 255. A picture that has the network's size already is left as it is, or
    inverted; "auto" means that its corners decide. For a network that takes colour images, no
    background is cut away, and "auto" means "no".

    Args:
        pixels: `[H, W, C]` uint8.
        image_shape: `(H, W, C)` of the network's images.
        invert: "yes", "no", or "auto": whether the garment is darker than its background.
        background: `[C]` floating, from 0 to 255, where it is known; else it is sought.

    Returns:
        The picture.

    Raises:
        ValueError: if all pixels are alike.
    """
    if invert not in INVERT:
        raise ValueError(f"invert must be one of {', '.join(INVERT)}, not {invert!r}")
    grey, ready = image_shape[2] == 1, pixels.shape == image_shape
    if background is None:
        background = _corner(pixels) if ready else np.median(_border(pixels), axis=0)
    if grey and not ready:
        return _light_on_black(pixels, image_shape, invert, background)
    inverted = invert == "yes" or (invert == "auto" and grey and bool(background.mean() > 127))
    fitted = pixels if ready else _fit(pixels, image_shape, background)
    return Picture(255 - fitted if inverted else fitted, inverted)


def _corner(pixels: np.ndarray) -> np.ndarray:
    """The second darkest of the four corners, `[C]`: if it is light, so are three of them.

    A garment that fills an image reaches its border, but hardly its corners: by these, all 70,000
    images of FashionMNIST are told from their inverted selves; by the border, all but two.
    """
    return np.sort(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)[1]


def _border(pixels: np.ndarray) -> np.ndarray:
    """The outermost rows and columns of `[H, W, ...]`, end to end."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _light_on_black(
    pixels: np.ndarray, image_shape: tuple[int, int, int], invert: str, background: np.ndarray
) -> Picture:
    """A grey photo as a light garment on black, as far as `invert` lets it."""
    differences = _differences(pixels[..., 0], background)
    darker = bool(differences.sum() < 0)
    inverted = darker if invert == "auto" else invert == "yes"
    rows, columns = (_span((differences != 0).mean(axis=axis)) for axis in (1, 0))
    fitted = _fit(pixels[rows, columns], image_shape, background).astype(np.float64)
    if inverted:
        fitted, background = 255 - fitted, 255 - background
    if inverted == darker:
        # The garment is the lighter now.
        fitted = (fitted - background) * (255 / (255 - background))
        if 0 < fitted.max() < _DIM:
            fitted *= 255 / fitted.max()
    return Picture(fitted.clip(0, 255).round().astype(np.uint8), inverted)


def _differences(grey: np.ndarray, background: np.ndarray) -> np.ndarray:
    """By how much `[H, W]` pixels are lighter than the background; 0 where they belong to it.

    Raises:
        ValueError: if all of them do.
    """
    # Averaging over about what becomes one of the network's pixels takes away noise and dust.
    r = max(1, max(grey.shape) // 64)
    padded = Image.fromarray(np.pad(grey, r, mode="symmetric"))
    smooth = np.asarray(padded.filter(ImageFilter.BoxBlur(r)))[r:-r, r:-r] - background
    contrasts = np.abs(smooth)
    contrast = contrasts.max()
    if contrast >= 2 * _SAME:
        sharp = grey - background
        return np.where(np.abs(sharp) > _SAME, sharp, 0)
    # Uneven light changes slowly where a garment has an edge, and it shows along the border, too.
    least = max(_ALIKE, 2 * np.median(_border(contrasts)))
    if contrast <= least or _steepest(smooth, 2 * r + 1) <= _ALIKE:
        raise ValueError("all its pixels are alike")
    return np.where(contrasts > max(least, contrast / 3), smooth, 0)


def _steepest(values: np.ndarray, distance: int) -> float:
    """The largest change over so many rows or columns; 0 if there are not as many."""
    down, across = (np.abs(v[distance:] - v[:-distance]) for v in (values, values.T))
    return float(max(down.max(initial=0), across.max(initial=0)))


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
            yield from find_files(local_path(path))
        except UserError as error:
            yield error
