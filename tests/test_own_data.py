"""Datasets that are prepared from a folder of pictures, or of IDX files of other classes."""

import errno
import gzip
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT, stored
from ml_collections import ConfigDict
from PIL import Image
from test_data import idx_bytes, write_idx_folder

from tinyvgg_jax import load_predictor
from tinyvgg_jax.config import validated
from tinyvgg_jax.data import Options, find_dataset, load_splits, prepare
from tinyvgg_jax.data.dataset import require_same_source
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.predict import FilePrediction, predict_files
from tinyvgg_jax.runs.folder import read_dataset
from tinyvgg_jax.runs.run import find_data

COLOURS = {"red": (200, 30, 20), "green": (20, 180, 40), "Sky blue": (40, 90, 220)}
WHOLE = {"train": "train", "validation": "validation", "test": "test"}


def paint(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int]) -> None:
    """Writes a picture of a colour, with noise."""
    rng = np.random.default_rng(seed)
    pixels = np.array(colour) + rng.integers(-20, 20, size=(*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def make_folder(folder: Path, number: int = 60, first: int = 0) -> Path:
    for label, (name, colour) in enumerate(COLOURS.items()):
        for i in range(first, first + number):
            size = (20 + i % 7, 30) if i % 2 else (24, 24)
            paint(folder / name / f"{i:03}.png", colour, 1000 * label + i, size)
    return folder


def load(folder: Path, data_dir: Path, name: str = "own", **options: Any) -> Any:
    options = {"image_size": 16, "channels": 3} | options
    dataset = find_dataset(name, str(data_dir), str(folder), Options(**options))
    splits, info = load_splits(name, {s: s for s in dataset.sizes}, str(data_dir))
    return splits, info, dataset


def contents(splits: Any) -> dict[str, set[bytes]]:
    return {name: {image.tobytes() for image in split.images} for name, split in splits.items()}


def test_a_folder_of_pictures_becomes_a_dataset(tmp_path: Path) -> None:
    splits, info, dataset = load(make_folder(tmp_path / "pictures"), tmp_path / "tfds")
    assert info.class_names == ("Sky blue", "green", "red")
    assert info.image_shape == (16, 16, 3)
    sizes = {name: len(split) for name, split in splits.items()}
    assert sum(sizes.values()) == 180 and set(sizes) == set(WHOLE)
    assert 125 <= sizes["train"] <= 160 and sizes["test"] >= 6
    # The brightest channel tells the class.
    for split in splits.values():
        channel = split.images.mean(axis=(1, 2)).argmax(axis=1)
        assert (np.array([2, 1, 0])[split.labels] == channel).all()
        assert len(np.unique(split.labels)) == 3
    assert dataset.default_splits() == WHOLE


def test_another_picture_moves_no_other(tmp_path: Path) -> None:
    before = contents(load(make_folder(tmp_path / "a", 40), tmp_path / "tfds", "before")[0])
    make_folder(tmp_path / "a", 20, first=40)
    after = contents(load(tmp_path / "a", tmp_path / "tfds", "after")[0])
    for split in WHOLE:
        assert before[split] < after[split]


def test_copies_of_a_picture_are_on_one_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "pictures", 12)
    for name in COLOURS:
        for i in range(12):
            (folder / name / f"copy{i}.png").write_bytes(
                (folder / name / f"{i:03}.png").read_bytes()
            )
    (folder / "red" / "other.png").write_bytes((folder / "green" / "000.png").read_bytes())
    splits, _, _ = load(folder, tmp_path / "tfds")
    assert "36 pictures are copies of others and are left out." in caplog.text
    assert "1 pictures are in more than one class." in caplog.text
    own = contents(splits)
    assert not own["train"] & own["test"] and not own["train"] & own["validation"]


def test_a_picture_in_two_classes_is_on_one_side(tmp_path: Path) -> None:
    """In a small class, the picture for the test is chosen class by class."""
    for seed in range(20):
        folder = tmp_path / str(seed)
        for i in range(4):
            paint(folder / "a" / f"{i}.png", COLOURS["red"], 100 * seed + i, (20, 20))
            paint(folder / "b" / f"{i}.png", COLOURS["green"], 100 * seed + 50 + i, (20, 20))
            shutil.copy(folder / "a" / f"{i}.png", folder / "b" / f"copy {i}.png")
        given = contents(load(folder, tmp_path / "tfds", f"own{seed}")[0])
        assert given["train"].isdisjoint(given["test"])


def test_given_splits_are_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "pictures"
    make_folder(folder / "train", 30)
    make_folder(folder / "test", 9, first=100)
    # A picture of the test split that is also in train is only tested on.
    copied = (folder / "test" / "red" / "100.png").read_bytes()
    (folder / "train" / "red" / "copy.png").write_bytes(copied)
    splits, _, _ = load(folder, tmp_path / "tfds")
    assert len(splits["test"]) == 27
    assert len(splits["train"]) + len(splits["validation"]) == 90
    assert 1 <= len(splits["validation"]) < 25
    assert "1 pictures are copies" in caplog.text
    make_folder(folder / "val", 5, first=200)
    splits, _, _ = load(folder, tmp_path / "tfds", "with_val")
    assert len(splits["validation"]) == 15 and len(splits["train"]) == 90


def test_what_cannot_be_read_is_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "pictures", 5)
    for i in range(8):
        (folder / "red" / f"broken{i}.png").write_bytes(b"nothing")
    (folder / "red" / "notes.txt").write_text("no picture")
    splits, _, _ = load(folder, tmp_path / "tfds")
    assert sum(len(split) for split in splits.values()) == 15
    assert "8 of 23 pictures cannot be read." in caplog.text
    assert "broken4.png: not an image" in caplog.text and "broken5.png" not in caplog.text


@pytest.mark.parametrize("fit", ["crop", "pad", "garment"])
def test_pictures_are_fitted(tmp_path: Path, fit: str) -> None:
    """A light square on the left of a wide, dark picture: cut off, kept, or cut out."""
    pixels = np.full((20, 60), 10, np.uint8)
    pixels[5:15, 2:12] = 250
    for name in ("a", "b"):
        for i in range(3):
            pixels[0, 0] = 10 * i + (name == "b")
            (tmp_path / "p" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "p" / name / f"{i}.png")
    splits, info, _ = load(tmp_path / "p", tmp_path / "tfds", channels=1, fit=fit, image_size=20)
    assert info.image_shape == (20, 20, 1)
    light = (splits["train"].images[0] > 128).mean()
    assert {"crop": light == 0, "pad": 0.01 < light < 0.1, "garment": light > 0.8}[fit]


def faults(folder: Path) -> dict[str, str]:
    """Folders that are not right, and words of the refusal."""
    make_folder(folder / "one", 3)
    for name in ("green", "Sky blue"):
        for path in (folder / "one" / name).iterdir():
            path.unlink()
        (folder / "one" / name).rmdir()
    (folder / "empty").mkdir()
    make_folder(folder / "single", 4)
    for path in sorted((folder / "single" / "red").iterdir())[1:]:
        path.unlink()
    make_folder(folder / "case", 3)
    paint(folder / "case" / "Green" / "1.png", COLOURS["green"], 7, (20, 20))
    make_folder(folder / "half" / "train", 3)
    for case in ("beside", "flat"):
        for split in ("train", "test"):
            make_folder(folder / case / split, 3)
    make_folder(folder / "beside" / "predict", 3)
    make_folder(folder / "hollow", 3)
    for path in (folder / "hollow" / "green").iterdir():
        path.rename(path.with_suffix(".heic_"))
    shutil.rmtree(folder / "flat" / "test")
    paint(folder / "flat" / "test" / "1.png", COLOURS["red"], 1, (20, 20))
    for case, name in (("break", "sky\nblue"), ("blank", " "), ("bytes", os.fsdecode(b"d\xe9j"))):
        make_folder(folder / case, 3)
        (folder / case / "red").rename(folder / case / name)
    return {
        "nothing": "cannot be read: no such file or directory.",
        "empty": "holds no pictures in folders",
        "one": "holds pictures of one class only, 'red'.",
        "single": "class 'red' in",
        "case": "names differ by case only: ['Green', 'green'].",
        "half": "needs both train and test, or neither.",
        "beside": "and beside them 'predict'.",
        "flat": "test holds no folders of classes.",
        "hollow": "green holds no pictures of a format that can be read here.",
        "break": "or bytes that are no text: 'sky\\nblue'.",
        "blank": "bytes that are no text: ''.",
        "bytes": "bytes that are no text: 'd\\udce9j",
    }


def test_folders_that_are_not_right_are_refused(tmp_path: Path) -> None:
    for name, words in faults(tmp_path).items():
        with pytest.raises(UserError) as raised:
            load(tmp_path / name, tmp_path / "tfds")
        message = str(raised.value)
        assert words in message and "\n" not in message, name
        assert not list((tmp_path / "tfds").iterdir()), name
    good = make_folder(tmp_path / "good", 3)
    for name in ("Own", "own-1", "1own", "é", "../x", "x" * 300):
        with pytest.raises(UserError, match="a small letter and then"):
            load(good, tmp_path / "tfds", name)
    with pytest.raises(UserError, match=r"give it a name of its own: --config\.data\.name=NAME"):
        load(good, tmp_path / "tfds", "fashion_mnist")


def test_links_to_nothing_are_pictures_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "pictures", 5)
    (folder / "red" / "zz.png").symlink_to("/nowhere/x.png")
    (folder / "red" / "loop.png").symlink_to("loop.png")
    splits, _, dataset = load(folder, tmp_path / "tfds")
    assert sum(map(len, splits.values())) == 15
    assert "2 of 17 pictures cannot be read." in caplog.text
    require_same_source(dataset, str(folder))


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = make_folder(tmp_path / "pictures", 5)
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match=r"cannot prepare own in .*No space left on device"):
            load(folder, tmp_path / "tfds")
    assert not list((tmp_path / "tfds").iterdir())
    # The writer of array_record raises errors of its own.
    with monkeypatch.context() as patched:
        patched.setattr(
            tfds.core.DatasetBuilder,
            "download_and_prepare",
            lambda *_, **__: (_ for _ in ()).throw(RuntimeError("write() failed: No space left")),
        )
        with pytest.raises(UserError, match=r"cannot prepare own in .*: write.. failed: No space"):
            load(folder, tmp_path / "tfds")
    assert not list((tmp_path / "tfds").iterdir())


def test_a_set_of_two_pictures_a_class_has_all_splits(tmp_path: Path) -> None:
    splits, _, dataset = load(make_folder(tmp_path / "pictures", 2), tmp_path / "tfds")
    sizes = {name: dataset.num_examples(text) for name, text in dataset.default_splits().items()}
    assert sum(sizes.values()) == 6 and all(sizes.values()), splits.keys()


def test_a_source_that_is_not_read_again_is_named(
    tmp_path: Path, config: ConfigDict, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "pictures", 5)
    config.data.name, config.data.data_dir = "own", str(tmp_path / "tfds")
    config.data.source_dir, config.data.channels = str(folder), 3
    config.data.train_split = config.data.validation_split = config.data.test_split = None
    find_data(validated(config))
    assert "not read again" not in caplog.text
    with caplog.at_level(logging.INFO):
        found = find_data(validated(config))
    assert f"{folder} is not read again." in caplog.text
    assert found.data.validation_split == "validation"
    # Without the source it is found by its name, whose size and colour need not be repeated.
    config.data.source_dir = config.data.channels = None
    find_data(validated(config))
    config.data.image_size = 32
    with pytest.raises(UserError, match=r"image_size is 32, and the own in .* has 28"):
        find_data(validated(config))
    config.data.image_size, config.data.fit = None, "pad"
    with pytest.raises(UserError, match=r"fit is pad, and the own in .* has crop"):
        find_data(validated(config))
    # A source that is gone is missed by nobody.
    config.data.fit, config.data.source_dir = None, str(tmp_path / "gone")
    find_data(validated(config))
    assert "gone is not there any more; own is used as it was." in caplog.text
    config.data.source_dir = str(folder)
    paint(folder / "red" / "new.png", COLOURS["red"], 99, (20, 20))
    with pytest.raises(UserError, match="was prepared from other content"):
        find_data(validated(config))


def test_the_command_line_trains_on_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures", 30)
    argv = ["--config", "quick", "--workdir", str(tmp_path / "run"), "--config.num_epochs=3"]
    argv += ["--config.data.name=colours", f"--config.data.source_dir={folder}"]
    argv += [f"--config.data.data_dir={tmp_path / 'tfds'}", "--config.data.channels=3"]
    argv += ["--config.data.image_size=16", "--config.batch_size=8", "--config.model.widths=(8,8)"]
    command = [sys.executable, "-m", "tinyvgg_jax.main", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = stored(tmp_path / "run" / "summary.json")
    assert summary["test_accuracy"] > 0.9
    assert stored(tmp_path / "run" / "config.json")["data"]["validation_split"] == "validation"
    red = Image.new("RGB", (40, 40), COLOURS["red"])
    red.putpixel((3, 3), (0, 0, 0))
    predictor = load_predictor(tmp_path / "run")
    pixels = np.asarray(red.resize((16, 16)))
    assert predictor.class_names[predictor(pixels).labels[0]] == "red"
    # Pictures are predicted as they were prepared for training: cropped, and nothing cut out.
    assert predictor.fit == "crop" and read_dataset(tmp_path / "run").fit == "crop"
    wide = np.full((20, 140, 3), COLOURS["green"], np.uint8)
    wide[:, 60:80] = COLOURS["red"]
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (answer,) = predict_files(predictor, [tmp_path / "wide.png"])
    assert isinstance(answer, FilePrediction) and not answer.inverted
    assert predictor.class_names[answer.probabilities.argmax()] == "red"
    assert answer.probabilities.max() > 0.9


def test_odd_names_of_classes_are_kept_and_shown_safely(tmp_path: Path) -> None:
    """Text that runs from right to left, HTML, quotes, spaces around, and another script."""
    names = ("\u202egnp.txt", "<b>x", " spaced ", "日本", 'it\'s "q"')
    for k, name in enumerate(names):
        for i in range(12):
            paint(
                tmp_path / "pictures" / name / f"{i}.png", (50 * k, 200 - 40 * k, 90), i, (20, 20)
            )
    argv = ["--config", "quick", "--config.num_epochs=1", "--config.model.widths=(8,8)"]
    argv += ["--config.data.name=odd", f"--config.data.source_dir={tmp_path / 'pictures'}"]
    argv += [f"--config.data.data_dir={tmp_path / 'tfds'}", "--config.batch_size=8"]
    run = f"--workdir={tmp_path / 'run'}"
    command = [sys.executable, "-m", "tinyvgg_jax.main"]
    for arguments in (argv, ["--mode=eval"], ["--mode=predict", str(tmp_path / "pictures")]):
        done = subprocess.run(
            [*command, run, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "\u202e" not in done.stdout + done.stderr
    assert load_predictor(tmp_path / "run").class_names == tuple(sorted(n.strip() for n in names))
    page = (tmp_path / "run" / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "<b>x" not in page and "&lt;b&gt;x" in page


# IDX files


def write_letters(folder: Path, first_label: int, names: str | None = None) -> Path:
    """Writes four files with dotted names, some compressed, with five classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, size in (("train", 40), ("t10k", 10)):
        labels = (np.arange(size) % 5 + first_label).astype(np.uint8)
        images = rng.integers(256, size=(size, 12, 12)).astype(np.uint8)
        (folder / f"letters-{prefix}-images.idx3-ubyte").write_bytes(idx_bytes(images))
        content = gzip.compress(idx_bytes(labels))
        (folder / f"letters-{prefix}-labels.idx1-ubyte.gz").write_bytes(content)
    if names is not None:
        (folder / "classes.txt").write_text(names)
    return folder


def test_idx_files_of_letters_are_prepared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        splits, info, dataset = load(write_letters(tmp_path / "l", 1), tmp_path / "tfds", "letters")
    assert "begin at 1; they are counted from 0." in caplog.text
    assert info.class_names == ("1", "2", "3", "4", "5")
    assert info.image_shape == (12, 12, 1)
    assert sorted(np.unique(splits["train"].labels)) == [0, 1, 2, 3, 4]
    assert dataset.default_splits()["validation"] == "train[90%:]"
    named = write_letters(tmp_path / "named", 0, "a\nb\nc\nd\ne\n")
    assert load(named, tmp_path / "tfds", "named")[1].class_names == ("a", "b", "c", "d", "e")
    few = write_letters(tmp_path / "few", 0, "a\nb\n")
    with pytest.raises(UserError, match="has 2 names, and the labels 5 classes"):
        load(few, tmp_path / "tfds", "few")


def test_what_idx_files_cannot_be_is_said(tmp_path: Path, config: ConfigDict) -> None:
    folder = write_letters(tmp_path / "idx", 1, "\ufeffa\nb\nc\nd\ne\n")
    config.data.name, config.data.data_dir = "letters", str(tmp_path / "tfds")
    config.data.source_dir, config.data.channels = str(folder), 3
    config.data.train_split = config.data.validation_split = config.data.test_split = None
    for _ in range(2):  # When it is prepared, and later.
        with pytest.raises(UserError, match=r"channels is 3, and the letters in .* has 1"):
            find_data(validated(config))
    config.data.channels = None
    find_data(validated(config))
    # The byte order mark of an editor is no part of a name, and other names are another content.
    assert find_dataset("letters", str(tmp_path / "tfds")).info.class_names == tuple("abcde")
    (folder / "classes.txt").write_text("v\nw\nx\ny\nz\n")
    with pytest.raises(UserError, match="was prepared from other content"):
        find_data(validated(config))


def test_fashion_mnist_has_the_papers_splits(tmp_path: Path) -> None:
    prepare.prepare_fashion_mnist(tmp_path / "tfds", write_idx_folder(tmp_path / "idx"))
    dataset = find_dataset("fashion_mnist", str(tmp_path / "tfds"))
    assert dataset.default_splits() == {
        "train": "train[:55000]",
        "validation": "train[55000:]",
        "test": "test",
    }
