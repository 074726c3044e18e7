"""Draws the pictures in tests/pictures: garments as photos at home would show them.

    python tests/make_pictures.py

Dark on white, off centre, larger than 28x28, in colour and grey, in every format; one is turned by
its EXIF tag, one is transparent, one is light on dark. They are drawn with fixed noise, so that the
same pixels come out every time, but for the encoders' own differences.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).parent / "pictures"
Colour = tuple[int, int, int]
Points = list[tuple[float, float]]
_ORIENTATION = 0x0112

# Outlines in a square of 100x100, the left half of what is symmetric.
T_SHIRT: Points = [(40, 8), (28, 12), (8, 30), (18, 46), (29, 38), (29, 96)]
LONG_SLEEVES: Points = [(40, 6), (27, 10), (17, 28), (8, 88), (20, 91), (30, 48), (29, 95)]
COAT: Points = [(42, 3), (28, 7), (17, 24), (9, 76), (20, 79), (29, 42), (24, 98)]
DRESS: Points = [(42, 3), (35, 5), (33, 24), (38, 42), (22, 97)]
TROUSERS: Points = [(34, 3), (28, 97), (44, 97), (50, 32)]
SNEAKER: Points = [
    *[(4, 62), (6, 44), (12, 40), (22, 47), (36, 46), (52, 30)],
    *[(60, 36), (72, 50), (92, 57), (97, 66), (96, 72), (4, 72)],
]
BOOT: Points = [
    *[(20, 4), (54, 4), (55, 50), (68, 60), (90, 68), (95, 78)],
    *[(95, 84), (42, 84), (36, 82), (34, 96), (17, 96), (17, 60)],
]
BAG: Points = [(10, 40), (90, 40), (96, 92), (4, 92)]


def mirrored(left: Points) -> Points:
    """A symmetric outline from its left half."""
    return left + [(100 - x, y) for x, y in reversed(left)]


def photo(
    outline: Points,
    garment: Colour,
    background: Colour,
    size: tuple[int, int] = (300, 400),
    centre: tuple[float, float] = (0.5, 0.5),
    height: float = 0.6,
    details: Callable[[ImageDraw.ImageDraw, Callable[[Points], Points]], None] | None = None,
) -> Image.Image:
    """A garment on a wall: a soft shadow, uneven light, some noise."""
    scale = height * size[1] / 100
    left, top = centre[0] * size[0] - 50 * scale, centre[1] * size[1] - 50 * scale

    def place(points: Points) -> Points:
        return [(left + x * scale, top + y * scale) for x, y in points]

    image = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(image)
    shadow = tuple(int(0.9 * value) for value in background)
    draw.polygon([(x + scale, y + 2 * scale) for x, y in place(outline)], fill=shadow)
    image = image.filter(ImageFilter.GaussianBlur(2 * scale))
    draw = ImageDraw.Draw(image)
    draw.polygon(place(outline), fill=garment)
    if details:
        details(draw, place)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float64)
    rng = np.random.default_rng(0)
    light = np.linspace(1.02, 0.95, size[0])[None, :, None]
    noisy = pixels * light + rng.normal(0, 3, pixels.shape[:2])[..., None]
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def buttons(draw: ImageDraw.ImageDraw, place: Callable[[Points], Points]) -> None:
    draw.line(place([(50, 8), (50, 95)]), fill=(25, 25, 30), width=3)
    for y in range(16, 90, 12):
        (x, y_at) = place([(53, y)])[0]
        draw.ellipse((x - 3, y_at - 3, x + 3, y_at + 3), fill=(235, 230, 220))


def handle(draw: ImageDraw.ImageDraw, place: Callable[[Points], Points]) -> None:
    (left, top), (right, bottom) = place([(30, 12), (70, 70)])
    draw.arc((left, top, right, bottom), 180, 360, fill=(70, 40, 25), width=8)
    draw.line(place([(9, 52), (91, 52)]), fill=(50, 28, 18), width=3)


def sole(draw: ImageDraw.ImageDraw, place: Callable[[Points], Points]) -> None:
    draw.polygon(place([(4, 68), (96, 68), (96, 73), (4, 73)]), fill=(170, 170, 170))
    for x in (40, 46, 52):
        draw.line(place([(x, 44), (x + 6, 36)]), fill=(200, 200, 200), width=3)


def transparent(image: Image.Image, outline: Image.Image) -> Image.Image:
    """Cuts out what is drawn on white in `outline`."""
    grey = np.asarray(outline.convert("L"))
    image = image.convert("RGBA")
    image.putalpha(Image.fromarray(np.where(grey < 170, 255, 0).astype(np.uint8)))
    return image


def pictures() -> dict[str, Image.Image]:
    """The ten pictures by file name, as they look, upright."""
    white = (238, 236, 232)
    top, sleeves, coat = mirrored(T_SHIRT), mirrored(LONG_SLEEVES), mirrored(COAT)
    bag = photo(BAG, (90, 52, 34), white, (120, 108), (0.55, 0.45), 0.7, handle)
    small = (150, 200)
    return {
        "t-shirt.jpg": photo(top, (35, 40, 60), white, centre=(0.42, 0.4)),
        "trousers.png": photo(mirrored(TROUSERS), (40, 60, 110), white, small, (0.6, 0.5), 0.8),
        "pullover.webp": photo(sleeves, (30, 80, 55), white, centre=(0.45, 0.6)),
        "dress.gif": photo(mirrored(DRESS), (130, 25, 35), white, small, (0.4, 0.5), 0.8),
        "coat.bmp": photo(coat, (60, 60, 66), white, (84, 96), (0.5, 0.5), 0.85).convert("L"),
        "shirt.jpeg": photo(sleeves, (70, 95, 150), white, details=buttons),
        "sneaker.jpg": photo(SNEAKER, (45, 45, 50), white, (400, 300), (0.45, 0.6), 0.8, sole),
        "boot turned by EXIF.jpg": photo(BOOT, (75, 45, 30), white, (320, 320), (0.55, 0.5), 0.7),
        "bag, transparent.png": transparent(bag, bag),
        "weißes T-Shirt.jpg": photo(top, (225, 225, 220), (48, 36, 30), (320, 320)),
    }


def save(folder: Path) -> None:
    """Writes the pictures as files."""
    folder.mkdir(exist_ok=True)
    for name, image in pictures().items():
        path = folder / name
        if "EXIF" in name:
            # Stored lying on its side, with the tag that says so.
            exif = Image.Exif()
            exif[_ORIENTATION] = 6
            image.rotate(90, expand=True).save(path, quality=80, exif=exif)
        elif path.suffix == ".gif":
            image.quantize(32).save(path)
        elif path.suffix == ".png":
            image.quantize(64).save(path) if image.mode == "RGB" else image.save(path)
        else:
            image.save(path, quality=80)


if __name__ == "__main__":
    save(FOLDER)
