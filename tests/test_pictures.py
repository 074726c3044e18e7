import contextlib
import itertools
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_pictures
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFilter

from tinyvgg_jax import UserError, pictures
from tinyvgg_jax.pictures import find_files, load_picture, normalise, quiet_pillow, suffixes

FOLDER = Path(__file__).parent / "pictures"
SHAPE = (28, 28, 1)


def load(name: str, invert: str = "auto") -> np.ndarray:
    return load_picture(FOLDER / name, SHAPE, invert).pixels


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_photo_becomes_a_light_garment_on_black_that_fills_the_image(path: Path) -> None:
    picture = load_picture(path, SHAPE)
    assert picture.pixels.shape == SHAPE
    assert picture.pixels.dtype == np.uint8
    assert picture.inverted == (path.name != "weißes T-Shirt.jpg")
    seen = picture.pixels[..., 0] > 60
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert max(height, width) >= 27
    # In the centre: as much on the left as on the right, to a pixel.
    assert abs((rows[0] + rows[-1]) - 27) <= 2
    assert abs((columns[0] + columns[-1]) - 27) <= 2
    # The corners are background, but for a boot's shaft and heel.
    corners = np.sort(picture.pixels[[0, 0, -1, -1], [0, -1, 0, -1], 0])
    assert corners[1] < 40


def test_the_pictures_are_what_their_script_draws(tmp_path: Path) -> None:
    make_pictures.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in FOLDER.iterdir()}
    for path in FOLDER.iterdir():
        ours, theirs = (load_picture(p, SHAPE).pixels for p in (path, tmp_path / path.name))
        assert np.abs(ours.astype(int) - theirs).mean() < 3, path.name


def test_cameras_orientation_is_applied(tmp_path: Path) -> None:
    upright = make_pictures.pictures()["boot turned by EXIF.jpg"]
    upright.save(tmp_path / "upright.png")
    expected = load_picture(tmp_path / "upright.png", SHAPE).pixels
    turned = load("boot turned by EXIF.jpg")
    assert np.abs(turned.astype(int) - expected).mean() < 4
    assert np.abs(turned.astype(int) - np.rot90(expected)).mean() > 40


@pytest.mark.parametrize("level", [30, 225])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_what_is_transparent_is_background_whatever_colour_it_hides(
    level: int, mode: str, tmp_path: Path
) -> None:
    pixels = np.full((60, 60, 4), level, np.uint8)
    pixels[..., 3] = 0
    pixels[20:40, 10:50, 3] = 255
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8), "P")
        image.putpalette([level] * 6)
        image.info["transparency"] = 1
    elif mode == "I;16":
        # The garment's values take 12 bits; the value for transparent pixels is the largest of 16.
        wide = np.where(pixels[..., 3] == 0, 0xFFFF, 16 * pixels[..., 0].astype(np.uint16))
        image = Image.fromarray(wide.astype(np.uint16))
        image.info["transparency"] = 0xFFFF
    else:
        image = image.convert(mode)
    image.save(tmp_path / "cut.png")
    seen = load_picture(tmp_path / "cut.png", SHAPE).pixels[..., 0]
    assert (seen[8:20] > 150).all()
    assert (seen[[0, 1, 2, -3, -2, -1]] == 0).all()


def test_the_value_of_transparent_pixels_does_not_count_as_a_tone(tmp_path: Path) -> None:
    seen = []
    for hidden in (4095, 65535):
        wide = np.full((60, 60), hidden, np.uint16)
        wide[20:40, 10:50] = np.linspace(1000, 4000, 40)  # A camera's 12 bits.
        image = Image.fromarray(wide)
        image.info["transparency"] = hidden
        image.save(tmp_path / "cut.png")
        seen.append(load_picture(tmp_path / "cut.png", SHAPE).pixels)
    np.testing.assert_array_equal(seen[0], seen[1])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "LA", "F", "F/255"])
def test_every_kind_of_pixel_gives_the_same_picture(mode: str, tmp_path: Path) -> None:
    grey = np.full((90, 70), 255, np.uint8)
    grey[30:80, 20:40] = 0
    image = Image.fromarray(grey)
    if mode.startswith("F"):
        values = grey.astype(np.float32) / (255 if mode == "F/255" else 1)
        values[40:43, 25:28] = [np.nan, np.inf, -np.inf]
        image = Image.fromarray(values)
    elif mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = image.convert("RGB").convert(mode) if mode == "CMYK" else image.convert(mode)
    image.save(tmp_path / ("picture.tiff" if mode[0] in "CF" else "picture.png"))
    (path,) = tmp_path.iterdir()
    expected = np.zeros(SHAPE, np.uint8)
    expected[:, 8:19] = 255
    seen = load_picture(path, SHAPE).pixels
    assert np.abs(seen.astype(int) - expected).max() <= 3


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.eye(28, k=k, dtype=np.uint8) * 255) for k in (0, 9)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    seen = load_picture(tmp_path / "a.gif", SHAPE).pixels[..., 0]
    np.testing.assert_array_equal(seen > 127, np.eye(28, dtype=bool))


def test_a_picture_of_the_networks_own_size_is_inverted_if_its_corners_are_light() -> None:
    # A bag that fills the image: its border is mostly light, and its corners are dark but for one.
    bag = np.random.default_rng(0).integers(200, 256, SHAPE).astype(np.uint8)
    bag[[0, 0, -1], [0, -1, 0]] = [[0], [30], [60]]
    for image in (bag, load("t-shirt.jpg")):
        for pixels, inverted in ((image, False), (255 - image, True)):
            picture = normalise(pixels, SHAPE, "auto")
            np.testing.assert_array_equal(picture.pixels, image)
            assert picture.inverted == inverted


def test_a_picture_of_the_networks_own_size_is_else_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(200, 256, SHAPE).astype(np.uint8)
    picture = normalise(pixels, SHAPE, "no")
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert not picture.inverted
    picture = normalise(255 - pixels, SHAPE, "yes")
    np.testing.assert_array_equal(picture.pixels, pixels)
    assert picture.inverted
    # For a network that takes colour images, "auto" inverts nothing.
    colour = np.repeat(pixels, 3, axis=2)
    picture = normalise(colour, (28, 28, 3), "auto")
    np.testing.assert_array_equal(picture.pixels, colour)
    assert not picture.inverted


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "F"])
def test_a_picture_may_use_only_some_of_its_bits(bits: int, kind: str, tmp_path: Path) -> None:
    grey = np.full((90, 70), 0.9)
    grey[30:80, 20:40] = 0.1
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}[kind]
    Image.fromarray((grey * (2**bits - 1)).astype(dtype)).save(tmp_path / "picture.tif")
    picture = load_picture(tmp_path / "picture.tif", SHAPE)
    assert picture.inverted
    assert (np.abs(picture.pixels[1:-1, 9:18].astype(int) - 227) < 4).all()
    assert (picture.pixels[:, [0, 1, 2, -3, -2, -1]] == 0).all()


def test_floating_values_may_go_slightly_beyond_one(tmp_path: Path) -> None:
    # So they do after a picture has been resized with overshoot.
    grey = np.full((90, 70), 1.04, np.float32)
    grey[30:80, 20:40] = -0.04
    Image.fromarray(grey).save(tmp_path / "picture.tif")
    assert (load_picture(tmp_path / "picture.tif", SHAPE).pixels[1:-1, 9:18] > 250).all()


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize(("garment", "wall"), [(120, 135), (135, 120), (150, 135), (100, 115)])
def test_little_contrast_is_found_and_stretched(garment: int, wall: int, noise: float) -> None:
    pixels = np.full((200, 300, 1), wall, np.float64)
    pixels[40:160, 90:150] = garment
    # The garment is striped, and lies on the wall in uneven light.
    pixels[:, ::2] += np.sign(garment - wall)
    pixels += np.linspace(-2, 2, 300)[:, None]
    pixels += np.random.default_rng(0).normal(0, noise, pixels.shape)
    picture = normalise(pixels.round().astype(np.uint8), SHAPE, "auto")
    assert picture.inverted == (garment < wall)
    seen = picture.pixels[..., 0].astype(int)
    assert (seen[2:-2, 9:19] >= 128).all()
    assert (seen[:, [0, 1, 2, 3, 4, -5, -4, -3, -2, -1]] < 20).all()


@pytest.mark.parametrize(("garment", "wall"), [(240, 140), (150, 128), (20, 100), (30, 60)])
def test_a_garment_is_made_light_whatever_its_background(garment: int, wall: int) -> None:
    pixels = np.full((90, 70, 1), wall, np.uint8)
    pixels[30:80, 20:40] = garment
    picture = normalise(pixels, SHAPE, "auto")
    assert picture.inverted == (garment < wall)
    assert (picture.pixels[1:-1, 10:17] >= 120).all()
    assert (picture.pixels[:, [0, 1, 2, -3, -2, -1]] == 0).all()


def test_a_thin_outline_is_found() -> None:
    pixels = np.full((400, 400, 1), 255, np.uint8)
    pixels[100:300, 100:300] = 60
    pixels[101:299, 101:299] = 255
    seen = normalise(pixels, SHAPE, "auto").pixels
    assert (seen[:2, 2:26].max(axis=0) > 100).all()
    assert (seen[8:20, 8:20] < 10).all()


@pytest.mark.parametrize("lit_from", ["left", "ahead"])
@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("size", [(60, 80), (100, 100), (448, 300), (1000, 1400)])
def test_a_bare_wall_is_refused_in_spite_of_noise_and_uneven_light(
    lit_from: str, noise: float, size: tuple[int, int], tmp_path: Path
) -> None:
    y, x = np.linspace(-1, 1, size[0])[:, None], np.linspace(-1, 1, size[1])
    wall = 200 * (1 - 0.04 * x) if lit_from == "left" else 200 * (1 - 0.07 * (x * x + y * y))
    wall = wall + np.zeros((size[0], 1))
    wall += np.random.default_rng(0).normal(0, noise, size)
    if min(size) >= 300:
        # A speck of dust is smaller than what becomes a pixel of the network's.
        wall[size[0] // 3, size[1] // 3] = 100
    for name in ("wall.png", "wall.jpg"):
        Image.fromarray(wall.round().astype(np.uint8)).save(tmp_path / name)
        with pytest.raises(UserError, match="all its pixels are alike"):
            load_picture(tmp_path / name, SHAPE)


@pytest.mark.parametrize("level", [0, 40, 90, 127, 128, 200, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("fills", [False, True])
def test_a_garment_that_was_cut_out_is_light_on_black(
    level: int, mode: str, fills: bool, tmp_path: Path
) -> None:
    # The garment has soft edges, and where `fills` it reaches most of the picture's border.
    alpha = Image.new("L", (120, 140), 255 if fills else 0)
    box = (72, 70, 120, 140) if fills else (30, 20, 80, 130)
    alpha.paste(0 if fills else 255, box)
    alpha = alpha.filter(ImageFilter.GaussianBlur(3))
    image = Image.merge("LA", (Image.new("L", alpha.size, level), alpha))
    if mode == "P":
        image = Image.fromarray(np.asarray(alpha), "P")
        image.putpalette([level] * 3 * 256)
        image.save(tmp_path / "cut.png", transparency=bytes(range(256)))
    else:
        image.convert(mode).save(tmp_path / "cut.png")
    picture = load_picture(tmp_path / "cut.png", SHAPE)
    assert picture.inverted == (level < 128)
    seen = np.sort(picture.pixels, axis=None)
    assert (seen[-len(seen) // 20 :] >= 128).all()
    assert (seen[: len(seen) // 10] == 0).all()
    if fills:
        assert picture.pixels[2, 8] > 120
        assert picture.pixels[-3, 20] < 5


def test_a_garment_that_is_hardly_opaque_is_seen(tmp_path: Path) -> None:
    pixels = np.zeros((80, 60, 4), np.uint8)
    pixels[20:60, 15:45, 3] = 60
    Image.fromarray(pixels).save(tmp_path / "ghost.png")
    assert (load_picture(tmp_path / "ghost.png", SHAPE).pixels[4:-4, 6:-6] > 200).all()


def test_a_photo_with_rounded_corners_keeps_its_own_background(tmp_path: Path) -> None:
    pixels = np.full((80, 60, 4), 240, np.uint8)
    pixels[20:60, 15:45] = 30
    pixels[..., 3] = 255
    pixels[:4, :4, 3] = pixels[-4:, -4:, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    picture = load_picture(tmp_path / "photo.png", SHAPE)
    assert picture.inverted
    assert picture.pixels[14, 14] > 200


@pytest.mark.parametrize("name", ["8 bits.tif", "16 bits.tif", "16 bits.png"])
def test_orientation_is_applied_to_pictures_of_any_depth(name: str, tmp_path: Path) -> None:
    lying = np.full((90, 140), 60000, np.uint16)
    lying[20:70, 20:60] = lying[20:40, 60:120] = 5000
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.rot90(lying, -1)
    for pixels, path, tag in ((lying, tmp_path / name, exif), (upright, tmp_path / "up.png", None)):
        shown = pixels if name.startswith("16") else (pixels // 257).astype(np.uint8)
        Image.fromarray(shown).save(path, exif=tag or Image.Exif())
    seen, expected = (load_picture(p, SHAPE).pixels for p in (tmp_path / name, tmp_path / "up.png"))
    np.testing.assert_allclose(seen, expected, atol=2)


def test_inversion_can_be_decided_by_the_user() -> None:
    auto, yes, no = (load("t-shirt.jpg", invert) for invert in ("auto", "yes", "no"))
    np.testing.assert_array_equal(auto, yes)
    assert no[0, 0] > 200 > 60 > no[14, 14]
    np.testing.assert_array_equal(load("weißes T-Shirt.jpg"), load("weißes T-Shirt.jpg", "no"))
    with pytest.raises(UserError, match="invert must be one of"):
        load("t-shirt.jpg", "maybe")


def test_resizing_takes_all_pixels_into_account() -> None:
    # A fine chequerboard would come out as black or white if pixels were only picked.
    pixels = np.zeros((448, 448, 1), np.uint8)
    pixels[100:350, 100:350] = 255
    pixels[100:350:2, 100:350:2] = pixels[101:350:2, 101:350:2] = 0
    seen = normalise(pixels, SHAPE, "auto").pixels
    assert (np.abs(seen[4:24, 4:24].astype(int) - 127) < 20).all()


def test_a_network_for_colour_gets_colour(tmp_path: Path) -> None:
    pixels = np.full((40, 80, 3), (250, 240, 230), np.uint8)
    pixels[10:30, 20:60] = (200, 20, 40)
    picture = normalise(pixels, (32, 32, 3), "auto")
    assert not picture.inverted
    np.testing.assert_allclose(picture.pixels[16, 16], (200, 20, 40), atol=2)
    np.testing.assert_allclose(picture.pixels[0, 0], (250, 240, 230), atol=2)


def test_folders_are_searched_for_pictures(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt", "sub folder/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(p.relative_to(tmp_path)) for p in find_files(tmp_path)[0]] == [
        "a.jpg",
        "b.PNG",
        "sub folder/c.webp",
    ]
    assert find_files(tmp_path / "notes.txt") == ([tmp_path / "notes.txt"], [])


def test_a_picture_of_any_format_that_pillow_reads_is_found(tmp_path: Path) -> None:
    pixels = np.full((40, 60, 3), 240, np.uint8)
    pixels[10:30, 20:50] = 30
    image = Image.fromarray(pixels)
    suffixes_by_format = {
        "JPEG": (".jpe", ".jfif", ".JPG"),
        "JPEG2000": (".jp2", ".j2k"),
        "TIFF": (".tif", ".tiff"),
        "PPM": (".ppm", ".pgm", ".pnm"),
        **{name: (f".{name.lower()}",) for name in ("MPO", "AVIF", "TGA", "ICO", "DIB", "PCX")},
    }
    Image.init()
    # An old Pillow does not know all of them.
    kinds = [kinds for name, kinds in suffixes_by_format.items() if name in Image.SAVE]
    written = list(itertools.chain(*kinds))
    for suffix in written:
        image.save(tmp_path / f"picture{suffix}")
    found, _ = find_files(tmp_path)
    assert sorted(path.suffix for path in found) == sorted(written)
    for path in found:
        assert load_picture(path, SHAPE).pixels.max() > 200, path.name
    # Pillow reads no pixels from these formats, or leaves them to another program.
    assert not suffixes() & {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".wmf", ".emf", ".grib"}


def test_how_many_files_are_no_pictures_is_logged_in_a_line_a_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "two\nlines"
    for name in (
        "a.png",
        "b.HEIC",
        "c.heic",
        "in/Makefile",
        ".hidden",
        ".d/x.txt",
        "nothing.txt/e.png",
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    (folder / "link.txt").symlink_to(tmp_path)
    assert [path.name for path in find_files(folder)[0]] == ["a.png", "e.png"]
    said = "3 files are no pictures and were skipped (.heic, Makefile)."
    assert caplog.messages == [f"tinyvgg_jax: {tmp_path}/two lines: {said}"]
    caplog.clear()
    (folder / "only").mkdir()
    (folder / "only/story.txt").touch()
    with pytest.raises(UserError, match=r"no picture in this folder; 1 file is no picture and was"):
        find_files(folder / "only")
    (folder / "only/story.txt").rename(folder / "only/story.jpg")
    find_files(folder / "only")
    assert not caplog.messages


def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    photo = (FOLDER / "t-shirt.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(photo[: len(photo) // 2])
    png = bytearray((FOLDER / "trousers.png").read_bytes())
    png[len(png) // 2 :] = bytes(len(png) // 2)
    (tmp_path / "broken.png").write_bytes(png)
    Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    Image.new("L", (300, 200), 255).save(tmp_path / "blank.png")
    for name, said in {
        "text.png": "not an image",
        "half.jpg": "cannot be read: image file is truncated",
        "broken.png": "cannot be read",
        "dot.png": "1x1 pixels are too few",
        "blank.png": "all its pixels are alike",
        "missing.png": "no such file",
    }.items():
        with pytest.raises(UserError, match=said) as raised:
            load_picture(tmp_path / name, SHAPE)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)
    (tmp_path / "empty").mkdir()
    for name, said in {"empty": "no picture in this folder", "nowhere": "no such file"}.items():
        with pytest.raises(UserError, match=said):
            find_files(tmp_path / name)


@pytest.mark.parametrize("side", [10_500, 20_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_would_eat_the_memory_is_refused_unread(side: int, tmp_path: Path) -> None:
    # Only the head is there: whoever decodes it would complain of that.
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    whole = (tmp_path / "huge.png").read_bytes()
    (tmp_path / "huge.png").write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"pixels are too many|too many pixels"):
        load_picture(tmp_path / "huge.png", SHAPE)


def test_a_fifo_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    os.mkfifo(path)
    assert find_files(path) == ([path], [])
    assert find_files(tmp_path) == ([path], [])
    with pytest.raises(UserError, match=r"x\.png: cannot be read: not a regular file\."):
        load_picture(path, SHAPE)


def test_what_only_another_program_could_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise AssertionError("Ghostscript is run")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    Image.new("L", (60, 40)).save(tmp_path / "page.eps")
    eps = (tmp_path / "page.eps").read_bytes()
    (tmp_path / "page.png").write_bytes(eps)
    # A picture in IPTC's own container may be a file of any format.
    fields = {
        (3, 20): struct.pack(">I", 60),
        (3, 30): struct.pack(">I", 40),
        (3, 60): b"\x01\x00",
        (3, 120): b"\x01",
        (8, 10): eps,
    }
    parts = [
        b"\x1c" + bytes(key) + (struct.pack(">H", len(v)) if len(v) < 2**15 else b"") + v
        for key, v in fields.items()
    ]
    (tmp_path / "page.jpg").write_bytes(b"".join(parts))
    for name in ("page.eps", "page.png", "page.jpg"):
        with pytest.raises(UserError, match="not an image of a format that can be read here"):
            load_picture(tmp_path / name, SHAPE)


def test_a_file_is_known_by_its_content_not_by_its_suffix(tmp_path: Path) -> None:
    for name, other in (("trousers.png", "a.jpg"), ("t-shirt.jpg", "b.png"), ("dress.gif", "c")):
        (tmp_path / other).write_bytes((FOLDER / name).read_bytes())
        np.testing.assert_array_equal(load_picture(tmp_path / other, SHAPE).pixels, load(name))


def test_pillows_warnings_are_hidden_and_no_others(tmp_path: Path) -> None:
    photo = Image.open(FOLDER / "t-shirt.jpg")
    # The tag of the orientation ends before its value.
    photo.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0")
    with pytest.warns(UserWarning, match="EXIF"):
        load_picture(tmp_path / "a.jpg", SHAPE)
    with quiet_pillow():
        load_picture(tmp_path / "a.jpg", SHAPE)
        with pytest.raises(RuntimeWarning, match="mine"):
            warnings.warn("mine", RuntimeWarning, stacklevel=1)


def test_memory_is_reserved_while_a_picture_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, held = [], threading.Event()
    decode = pictures._decode

    @contextlib.contextmanager
    def reserve(size: int) -> Iterator[None]:
        asked.append(size)
        held.set()
        yield
        held.clear()

    def checked(*arguments: Any) -> Any:
        assert held.is_set()
        return decode(*arguments)

    monkeypatch.setattr(pictures, "_decode", checked)
    image = Image.open(FOLDER / "t-shirt.jpg").resize((2000, 3000))
    for name in ("a.png", "b.jpg"):
        image.save(tmp_path / name)
        load_picture(tmp_path / name, SHAPE, reserve=reserve)
        assert not held.is_set()
    # Most of the JPEG is never decoded.
    assert asked == [25 * 6_000_000, 8 * 6_000_000]


@pytest.mark.parametrize("kind", ["<u2", "<i4", "<f4"])
def test_values_are_scaled_alike_some_rows_at_a_time(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The highest value, which decides about the scale, is in the last row.
    values = np.random.default_rng(0).integers(900, size=(90, 70))
    values[-1, -1] = 4000
    Image.fromarray(values.astype(kind)).save(tmp_path / "picture.tif")
    expected = load_picture(tmp_path / "picture.tif", SHAPE).pixels
    for number in (1, 70, 700):
        monkeypatch.setattr(pictures, "_VALUES", number)
        seen = load_picture(tmp_path / "picture.tif", SHAPE).pixels
        np.testing.assert_array_equal(seen, expected)


def test_colours_in_the_lab_space_are_read(tmp_path: Path) -> None:
    Image.open(FOLDER / "t-shirt.jpg").save(tmp_path / "rgb.tif")
    Image.open(tmp_path / "rgb.tif").convert("LAB").save(tmp_path / "lab.tif")
    seen, expected = (load_picture(tmp_path / n, SHAPE).pixels for n in ("lab.tif", "rgb.tif"))
    assert np.abs(seen.astype(int) - expected).mean() < 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_said(tmp_path: Path) -> None:
    for name in ("closed", "listed only"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    (tmp_path / "b.png").touch()
    (tmp_path / "closed").chmod(0)
    (tmp_path / "listed only").chmod(0o400)
    files, errors = find_files(tmp_path)
    assert files == [tmp_path / "b.png", tmp_path / "listed only/a.png"]
    assert list(map(str, errors)) == [f"{tmp_path}/closed: permission denied."]


def test_a_subfolder_that_cannot_be_read_hides_no_other_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b", "c/d"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").touch()
    scandir = os.scandir

    def refuse(folder: Path) -> Any:
        if folder.name in ("a", "d"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    files, errors = find_files(tmp_path)
    assert files == [tmp_path / "b/x.png"]
    assert list(map(str, errors)) == [f"{tmp_path / f}: permission denied." for f in ("a", "c/d")]
    # That there is no picture cannot be said then.
    files, errors = find_files(tmp_path / "c")
    assert not files
    assert list(map(str, errors)) == [f"{tmp_path}/c/d: permission denied."]
    assert list(pictures.find_all([tmp_path / "a", tmp_path / "b"]))[1] == tmp_path / "b/x.png"


def test_links_may_be_loops_or_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    for name, target in {
        "folder/loop": "..",
        "self.png": "self.png",
        "self.txt": "self.txt",
        "broken.png": "nowhere",
        "there.txt": "closed",
    }.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "picture.png").touch()

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    # A link may lead to where the user must not look.
    monkeypatch.setattr(Path, "is_file", refuse)
    files, errors = find_files(tmp_path)
    assert [file.name for file in files] == ["broken.png", "picture.png", "self.png"]
    assert not errors
    for file, said in ((files[0], "no such file"), (files[2], "symbolic links")):
        with pytest.raises(UserError, match=said):
            load_picture(file, SHAPE)


def test_folders_may_be_nested_deeply(tmp_path: Path) -> None:
    names = ["d"] * 1200
    with contextlib.chdir(tmp_path):
        for name in names:
            Path(name).mkdir()
            os.chdir(name)
        Path("x.png").touch()
        try:
            found, errors = find_files(tmp_path)
        finally:
            # Python itself cannot remove folders that are nested so deeply.
            Path("x.png").unlink()
            for name in names:
                os.chdir("..")
                Path(name).rmdir()
    assert found == [tmp_path.joinpath(*names, "x.png")]
    assert not errors


def test_a_name_that_is_no_text_is_a_name(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"lat\xe9.png")
    try:
        file.write_bytes((FOLDER / "trousers.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes no such name")
    (tmp_path / os.fsdecode(b"folder\xe9")).mkdir()
    assert find_files(tmp_path) == ([file], [])
    np.testing.assert_array_equal(load_picture(file, SHAPE).pixels, load("trousers.png"))
