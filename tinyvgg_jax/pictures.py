"""Picture files as arrays like FashionMNIST's: a light garment, trimmed and centred, on black."""

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
# Formats that Pillow lists but does not decode itself. It reads only the header of the first four,
# leaves WMF to Windows, and would run Ghostscript for EPS, which is a program.
_UNREAD = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
# Larger pictures are refused, because decoding takes up to 12 bytes a pixel. A phone's photo has 12
# to 50 million pixels.
_MAX_PIXELS = 100_000_000
# A picture with fewer pixels on its longer side is refused, because no class could be told from it.
_MIN_SIDE = 8
# A picture is first reduced to this many pixels for each of the network's, along its longer side.
_DETAIL = 16
# The thresholds below are levels, of 255. A pixel that differs from the background by no more than
# this belongs to it. The authors of the dataset took 5 % (arXiv:1708.07747), for studio photos; the
# walls of a home are less even.
_SAME = 25
# If, after noise has been averaged out, no pixel differs by more than this, the picture is empty.
_ALIKE = 8
# A garment whose brightest pixel is below this is brightened until it reaches 255, as nearly every
# image of the dataset does. At half the brightness, a network was right on 6 % fewer images.
_DIM = 128
# If a larger fraction of the pixels is transparent, the garment has been cut out, and what is
# transparent is background. With a smaller one perhaps only the picture's corners are rounded, so
# the background is found as in an opaque picture.
_CUT_OUT = 0.05


class Picture(NamedTuple):
    """A picture, normalised for the network.

    Attributes:
        pixels: `[H, W, C]` uint8, in the network's size.
        inverted: whether the picture was inverted, because its garment was dark.
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
    """Finds the pictures in a folder and its subfolders by their suffixes.

    It logs the number of other files in one line.

    Args:
        path: a folder; or a file, which is returned whatever its suffix.

    Returns:
        The files, sorted.

    Raises:
        UserError: if there is no such path, if it must not be read, or if the folder holds no
            picture.
    """
    try:
        if not path.is_dir():
            # This only checks that the file exists; errors of reading show when it is read.
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
        # The line has the form of the command line's errors, among which it is printed.
        logger.warning("tinyvgg_jax: %s", " ".join(f"{path}: {skipped}.".split()))
    return pictures


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in suffixes()


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all files that are not hidden; it follows no links to folders, which may be loops."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _skipped(files: list[Path]) -> str:
    """Describes the skipped files: their number and most frequent suffixes; "" for no files."""
    kinds = collections.Counter(file.suffix.lower() or file.name for file in files)
    named = ", ".join(kind for kind, _ in kinds.most_common(5))
    if len(kinds) > 5:
        named += ", ..."
    if len(files) < 2:
        return f"1 file is no picture and was skipped ({named})" if files else ""
    return f"{len(files):,} files are no pictures and were skipped ({named})"


def load_picture(
    path: str | Path, image_shape: tuple[int, int, int] = (28, 28, 1), invert: str = "auto"
) -> Picture:
    """Reads a picture file and normalises it for the network by `normalise`.

    It applies the orientation that a camera recorded, takes the first frame of an animation, and
    puts a picture with transparent pixels on white or black, whichever contrasts with the rest.

    Args:
        path: a file in PNG, JPEG, WebP, TIFF or another format that Pillow reads; of any size, in
            colour or grey.
        image_shape: `(H, W, C)` of the network's images, C being 1 or 3.
        invert: "auto", "yes" or "no", see `normalise`.

    Returns:
        The picture.

    Raises:
        UserError: if the file is not an image or is damaged, if the image is too large or too
            small, or if all its pixels are alike.
    """
    try:
        # A file is opened because Pillow 13, given a path, shears a TIFF that lies on its side.
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
                # A JPEG can be decoded at a fraction of its size in a fraction of the time.
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
    except Exception as error:  # For a damaged file a decoder may raise any exception.
        raise UserError(f"{path}: cannot be read as an image: {error}.") from error
    try:
        return normalise(pixels, image_shape, invert, background)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error


def _decode(image: Image.Image, mode: str, side: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes a picture: upright, opaque, and at most `side` pixels long.

    Args:
        image: the opened picture.
        mode: Pillow's mode of the result, "L" or "RGB".
        side: the largest height or width of the result.

    Returns:
        `[H, W, C]` uint8; and the background `[C]` if transparency tells it, else None.
    """
    image.load()
    # This comes first because converted images lose the record of the orientation.
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion would clip values of 16 or 32 bits at 255.
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
    """Scales values to 0 to 255: floating ones from [0, 1], integers from the bits they use."""
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    highest = float(values.max())
    # A file of 16 bits a pixel may hold the 10 or 12 bits of a camera, and does not say so. The
    # highest value shows how many bits are used. For a dark picture that may be too few, and the
    # picture becomes lighter, which does no harm. Floating values may exceed 1 slightly after a
    # resampling, so they count as integers only from 2 on.
    top = 1 if floating and highest < 2 else 2 ** max(8, int(highest).bit_length()) - 1
    values *= 255 / top
    return values.clip(0, 255, out=values).astype(np.uint8)


def _opaque(image: Image.Image, mode: str) -> tuple[Image.Image, np.ndarray | None]:
    """Puts the opaque part of a picture on white if that part is dark on average, else on black.

    Returns:
        The picture; and its new background `[C]`, or None if so little is transparent that the
        background lies in the opaque part.
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
    """Normalises a photo as the authors of FashionMNIST did with theirs (arXiv:1708.07747).

    For a network of grey images, these steps are taken:

    1. The background is the median of the border.
    2. The garment, which is what differs from the background, is cut out, resized with antialiasing
       so that its longer side fills the image, and put in the centre.
    3. A garment that is darker than its background is inverted.
    4. The background is set to 0, and a garment that is still dim is brightened to 255.

    A picture that already has the network's size is only inverted, if at all; with "auto" its
    corners decide. For a network of colour images, the whole picture is resized, and "auto" means
    "no".

    Args:
        pixels: `[H, W, C]` uint8.
        image_shape: `(H, W, C)` of the network's images.
        invert: whether to invert: "yes", "no", or "auto", if the garment is darker than its
            background.
        background: `[C]` floating, from 0 to 255, if it is known.

    Returns:
        The picture.

    Raises:
        ValueError: if all pixels are alike, or `invert` is none of the three.
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
    """Returns the second darkest of the four corners, `[C]`; if it is light, at
    least three of them are.

    A garment that fills its image reaches the border, but hardly the corners. The corners
    distinguish all 70,000 images of FashionMNIST from their inverted copies; the border fails for
    two.
    """
    return np.sort(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)[1]


def _border(pixels: np.ndarray) -> np.ndarray:
    """Concatenates the outermost rows and columns of `[H, W, ...]`."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _light_on_black(
    pixels: np.ndarray, image_shape: tuple[int, int, int], invert: str, background: np.ndarray
) -> Picture:
    """Normalises a grey photo to a light garment on black, unless `invert` forbids it."""
    differences = _differences(pixels[..., 0], background)
    darker = bool(differences.sum() < 0)
    inverted = darker if invert == "auto" else invert == "yes"
    rows, columns = (_span((differences != 0).mean(axis=axis)) for axis in (1, 0))
    fitted = _fit(pixels[rows, columns], image_shape, background).astype(np.float64)
    if inverted:
        fitted, background = 255 - fitted, 255 - background
    if inverted == darker:
        # The garment is now lighter than the background, which is stretched to black.
        fitted = (fitted - background) * (255 / (255 - background))
        if 0 < fitted.max() < _DIM:
            fitted *= 255 / fitted.max()
    return Picture(fitted.clip(0, 255).round().astype(np.uint8), inverted)


def _differences(grey: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Subtracts the background from `[H, W]` pixels; the result is 0 where they belong to it.

    Raises:
        ValueError: if all pixels belong to the background.
    """
    # Averaging over about the area of one of the network's pixels removes noise and dust.
    r = max(1, max(grey.shape) // 64)
    padded = Image.fromarray(np.pad(grey, r, mode="symmetric"))
    smooth = np.asarray(padded.filter(ImageFilter.BoxBlur(r)))[r:-r, r:-r] - background
    contrasts = np.abs(smooth)
    contrast = contrasts.max()
    if contrast >= 2 * _SAME:
        sharp = grey - background
        return np.where(np.abs(sharp) > _SAME, sharp, 0)
    # The contrast is low: it may be a pale garment or uneven light. Light changes slowly, while a
    # garment has an edge; and light changes along the border, too.
    least = max(_ALIKE, 2 * np.median(_border(contrasts)))
    if contrast <= least or _steepest(smooth, 2 * r + 1) <= _ALIKE:
        raise ValueError("all its pixels are alike")
    return np.where(contrasts > max(least, contrast / 3), smooth, 0)


def _steepest(values: np.ndarray, distance: int) -> float:
    """Finds the largest change over `distance` rows or columns; 0 if there are not as many."""
    down, across = (np.abs(v[distance:] - v[:-distance]) for v in (values, values.T))
    return float(max(down.max(initial=0), across.max(initial=0)))


def _span(shares: np.ndarray) -> slice:
    """Finds the first and last row that the garment reaches, not counting specks of dust.

    Args:
        shares: the fraction of each row's pixels that differ from the background.
    """
    busy = np.flatnonzero(shares > min(0.01, shares.max() / 2))
    return slice(int(busy[0]), int(busy[-1]) + 1)


def _fit(
    pixels: np.ndarray, image_shape: tuple[int, int, int], background: np.ndarray
) -> np.ndarray:
    """Resizes to fit `image_shape`, keeping the aspect ratio, and centres on the background."""
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
    """Yields the files of several paths, in order; for a path without any, the error."""
    for path in paths:
        try:
            yield from find_files(local_path(path))
        except UserError as error:
            yield error
