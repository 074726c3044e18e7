"""Picture files as arrays like FashionMNIST's: a light garment, trimmed and centred, on black."""

import collections
import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import local_path, open_regular

logger = logging.getLogger(__name__)

INVERT = ("auto", "yes", "no")
FITS = ("garment", "crop", "pad")
# Formats that Pillow lists but does not decode itself. It reads only the header of the first four,
# leaves WMF to Windows, and would run Ghostscript, a program, for EPS, also for one within IPTC.
_UNREAD = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC"}
# Larger pictures are refused. A phone's photo has 12 to 50 million pixels.
_MAX_PIXELS = 100_000_000
# Bytes of memory that decoding takes for each pixel, at most. Measured with 25 megapixels in every
# mode and format that Pillow writes: 25 for a JPEG 2000 with transparency, 19 for one without, 16
# for WebP, 12 for AVIF and a PNG of grey with transparency, 8 for one of colour with transparency,
# 9 for CMYK and palettes with transparency, 10 for 32 bits and 8 for 16 bits a value, 5 for the
# rest. A JPEG that is decoded at a fraction of its size may be progressive, and then holds its
# coefficients: 8 for each pixel in the file.
_DECODED_BYTES, _CODED_BYTES = 25, 8
# Values of 16 or 32 bits that are scaled to 8 bits at a time.
_VALUES = 2**20
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


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Hides what Pillow warns of while it reads files; it does so in all threads.

    It warns of large pictures, for which `load_picture` has a limit of its own, and of damage,
    after which it either raises an error or has read the pixels all the same.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@functools.cache
def _formats() -> tuple[str, ...]:
    """Lists the formats that the installed Pillow decodes itself, by Pillow's names."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _UNREAD)


@functools.cache
def suffixes() -> frozenset[str]:
    """Lists the suffixes, like `.jpg`, of the picture files that the installed Pillow can read."""
    # An MPO is several JPEGs in a file, which Pillow opens as JPEG.
    readable = {*_formats(), "MPO"}
    formats = Image.registered_extensions()
    return frozenset(suffix for suffix, name in formats.items() if name in readable)


def find_all(paths: Iterable[str | Path]) -> Iterator[Path | UserError]:
    """Yields the files of several paths, in order; before them, what is wrong with a path."""
    for path in paths:
        try:
            pictures, errors = find_files(local_path(path))
        except UserError as error:
            yield error
        else:
            yield from errors
            yield from pictures


def find_files(path: Path) -> tuple[list[Path], list[UserError]]:
    """Finds the pictures in a folder and its subfolders by their suffixes.

    It logs the number of other files in one line.

    Args:
        path: a folder; or a file, which is returned whatever its suffix.

    Returns:
        The files, sorted; and an error for each folder that cannot be read.

    Raises:
        UserError: if there is no such path, or if the folder holds no picture.
    """
    try:
        if not path.is_dir():
            # This only checks that the file exists; errors of reading show when it is read.
            path.stat()
            return [path], []
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}.") from error
    files, errors = _walk(path)
    pictures = [file for file in files if _is_picture(file)]
    # `Path.is_file` would raise an error for a link to where the user must not look.
    others = [f for f in files if not _is_picture(f) and os.path.isfile(f)]  # noqa: PTH113
    skipped = _skipped(others)
    if not pictures and not errors:
        raise UserError(f"{path}: no picture in this folder{skipped and '; ' + skipped}.")
    if skipped:
        # The line has the form of the command line's errors, among which it is printed.
        logger.warning("tinyvgg_jax: %s", " ".join(f"{path}: {skipped}.".split()))
    return pictures, errors


def list_pictures(folder: Path) -> list[Path]:
    """Lists the pictures in a folder and its subfolders by their suffixes, sorted.

    Raises:
        UserError: if a folder cannot be read.
    """
    files, errors = _walk(folder)
    if errors:
        raise errors[0]
    return [file for file in files if _is_picture(file)]


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in suffixes()


def _walk(folder: Path) -> tuple[list[Path], list[UserError]]:
    """Lists all files that are not hidden, sorted, and an error for each folder it cannot read.

    Links to folders are not followed, since they may be loops; they are listed as files.
    """
    files: list[Path] = []
    errors: list[UserError] = []
    # Folders may lie in one another more deeply than functions may call one another.
    folders = [folder]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    is_folder = entry.is_dir(follow_symlinks=False)
                    (folders if is_folder else files).append(folder / entry.name)
        except OSError as error:
            errors.append(UserError(f"{folder}: {_reason(error)}."))
    return sorted(files), sorted(errors, key=str)


def _skipped(files: list[Path]) -> str:
    """Describes the skipped files: their number and most frequent suffixes; "" for no files."""
    kinds = collections.Counter(file.suffix.lower() or file.name for file in files)
    named = ", ".join(kind for kind, _ in kinds.most_common(5))
    if len(kinds) > 5:
        named += ", ..."
    if len(files) < 2:
        return f"1 file is no picture and was skipped ({named})" if files else ""
    return f"{len(files):,} files are no pictures and were skipped ({named})"


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def load_picture(
    path: str | Path,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    invert: str = "auto",
    reserve: Callable[[int], AbstractContextManager[Any]] = contextlib.nullcontext,
    fit: str = "garment",
) -> Picture:
    """Reads a picture file and normalises it for the network by `normalise`, or only resizes it.

    It applies the orientation that a camera recorded, takes the first frame of an animation, and
    puts a picture with transparent pixels on white or black, whichever contrasts with the rest.

    Args:
        path: a file in PNG, JPEG, WebP, TIFF or another format that Pillow decodes without the help
            of other programs; of any size, in colour or grey.
        image_shape: `(H, W, C)` of the network's images, C being 1 or 3.
        invert: "auto", "yes" or "no", see `normalise`; where nothing is cut out, "auto" means "no".
        reserve: takes the number of bytes that decoding may need, and returns a context that is
            open while they are needed. It may wait, like that of `system.MemoryBudget`, for
            pictures that other threads decode.
        fit: "garment" for `normalise`; "crop" to cut out the middle, or "pad" to keep all of the
            picture and fill the rest with the colour of its border.

    Returns:
        The picture.

    Raises:
        UserError: if the file is not an image or is damaged, if the image is too large or too
            small, or if all its pixels are alike.
    """
    try:
        pixels, background = _read(path, image_shape, reserve)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: too many pixels; at most {_MAX_PIXELS:,} in all.") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image of a format that can be read here.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {_reason(error)}.") from error
    except Exception as error:  # For a damaged file a decoder may raise any exception.
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: cannot be read as an image: {reason}.") from error
    if fit == "crop":
        return _maybe_inverted(_crop(pixels, image_shape), invert)
    if fit == "pad":
        ground = np.median(_border(pixels), axis=0) if background is None else background
        return _maybe_inverted(_fit(pixels, image_shape, ground), invert)
    try:
        return normalise(pixels, image_shape, invert, background)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error


def _maybe_inverted(pixels: np.ndarray, invert: str) -> Picture:
    """Inverts pixels if that is asked for."""
    return Picture(255 - pixels, True) if invert == "yes" else Picture(pixels, False)


def _read(
    path: str | Path,
    image_shape: tuple[int, int, int],
    reserve: Callable[[int], AbstractContextManager[Any]],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Checks the size of a picture file and decodes it; returns what `_decode` does."""
    # A file is opened because Pillow 13, given a path, shears a TIFF that lies on its side.
    with open_regular(path) as file, Image.open(file, formats=_formats()) as image:
        number = image.width * image.height
        if number > _MAX_PIXELS:
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
        decoded = image.width * image.height
        with reserve(max(_DECODED_BYTES * decoded, _CODED_BYTES * number)):
            return _decode(image, "L" if grey else "RGB", side)


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
        image = _with_transparency(_to_uint8(image), image)
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow converts it to nothing else.
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    wanted = "RGBA" if transparent else mode
    if image.mode != wanted:  # Else `convert` would only copy the pixels.
        image = image.convert(wanted)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    background = None
    if transparent:
        image, background = _opaque(image, mode)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1), background


def _to_uint8(image: Image.Image) -> Image.Image:
    """Scales values to 0 to 255: floating ones from [0, 1], integers from the bits they use.

    A value that stands for transparent pixels does not count.
    """
    hidden = image.info.get("transparency")
    highest = max(float(rows.max(where=rows != hidden, initial=0)) for rows in _rows(image))
    # A file of 16 bits a pixel may hold the 10 or 12 bits of a camera, and does not say so. The
    # highest value shows how many bits are used. For a dark picture that may be too few, and the
    # picture becomes lighter, which does no harm. Floating values may exceed 1 slightly after a
    # resampling, so they count as integers only from 2 on.
    is_fraction = image.mode == "F" and highest < 2
    top = 1 if is_fraction else 2 ** max(8, int(highest).bit_length()) - 1
    scaled = [(rows * (255 / top)).clip(0, 255).astype(np.uint8) for rows in _rows(image)]
    return Image.fromarray(np.concatenate(scaled))


def _with_transparency(image: Image.Image, original: Image.Image) -> Image.Image:
    """Gives a grey picture an alpha channel, if one value of its original is transparent."""
    value = original.info.get("transparency")
    if value is None:
        return image
    alpha = [np.where(rows == value, 0, 255).astype(np.uint8) for rows in _rows(original)]
    return Image.merge("LA", (image, Image.fromarray(np.concatenate(alpha))))


def _rows(image: Image.Image) -> Iterator[np.ndarray]:
    """Yields a picture's values some rows at a time, `[rows, W]` float32; 0 if not finite.

    All rows at once would take four times the memory that the picture takes itself.
    """
    number = max(1, _VALUES // image.width)
    for top in range(0, image.height, number):
        box = (0, top, image.width, min(top + number, image.height))
        values = np.array(image.crop(box), np.float32)
        yield np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


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


def _crop(pixels: np.ndarray, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Cuts out the middle, of the shape of the network's images, and resizes it."""
    (h, w), (H, W, C) = pixels.shape[:2], image_shape
    scale = min(h / H, w / W)
    new_h, new_w = max(1, round(H * scale)), max(1, round(W * scale))
    top, left = (h - new_h) // 2, (w - new_w) // 2
    middle = pixels[top : top + new_h, left : left + new_w]
    source = Image.fromarray(middle[..., 0] if C == 1 else middle)
    return np.asarray(source.resize((W, H), Image.Resampling.LANCZOS)).reshape(image_shape)


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
