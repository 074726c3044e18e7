import gzip
import hashlib
import http.client
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import CLASSES, TEST_SIZE, TRAIN_SIZE, in_its_place, synthetic_arrays

from tinyvgg_jax.data import (
    Dataset,
    DatasetInfo,
    Split,
    epoch_order,
    fetch,
    find_dataset,
    idx,
    is_prepared,
    load_splits,
    padded_batches,
    prepare,
    progress,
    splits,
    stream,
)
from tinyvgg_jax.data.folder import Options
from tinyvgg_jax.errors import InterruptedRunError, UserError


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_folder(folder: Path, compress: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for split, (images, labels) in synthetic_arrays().items():
        prefix = {"train": "train", "test": "t10k"}[split]
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
    return folder


# IDX files


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files_are_read_as_they_were_written(tmp_path: Path, compress: bool) -> None:
    read = idx.read_folder(write_idx_folder(tmp_path / "idx", compress))
    for split, arrays in synthetic_arrays().items():
        for ours, theirs in zip(read[split], arrays, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "cannot be read"),
        (lambda raw: raw[:60] + bytes([raw[60] ^ 255]) + raw[61:], "cannot be read"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "is damaged"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "is damaged"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:6]), "is truncated"),
        (lambda raw: gzip.compress(b"\0\0\x0d" + gzip.decompress(raw)[3:]), "not an IDX file"),
        (lambda raw: b"not gzip at all", "cannot be read"),
        (lambda raw: gzip.compress(idx_bytes(np.zeros((3, 4)))), "has 2 dimensions where 3"),
        (lambda raw: gzip.compress(idx_bytes(np.zeros((3, 4, 4)))), "3 train images, 330 labels"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_idx_folder(tmp_path / "idx")
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_splits("fashion_mnist", {"a": "train"}, str(tmp_path / "tfds"), str(folder))
    # Nothing half-made stays behind.
    assert list((tmp_path / "tfds").iterdir()) == []


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match="neither t10k-labels-idx1-ubyte"):
        idx.read_folder(folder)


def test_a_changed_file_among_fashion_mnists_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx_folder(tmp_path / "idx", compress=False)
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in idx.FILE_NAMES
    }
    monkeypatch.setattr(idx, "FASHION_MNIST_SHA256", digests)
    flip(folder / "t10k-labels-idx1-ubyte", -1)
    with pytest.raises(UserError, match=r"idx is damaged: its t10k-labels-idx1-ubyte"):
        load_splits("fashion_mnist", {"a": "train"}, str(tmp_path / "tfds"), str(folder))
    assert list((tmp_path / "tfds").iterdir()) == []


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir()], ids=["fifo", "folder"])
def test_idx_files_that_are_no_files_are_refused(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = write_idx_folder(tmp_path / "idx", compress=False)
    (folder / "train-images-idx3-ubyte").unlink()
    make(folder / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match=r"idx holds neither train-images-idx3-ubyte\.gz nor"):
        load_splits("fashion_mnist", {"a": "train"}, str(tmp_path / "tfds"), str(folder))


# Preparing


def test_prepared_sets_hold_every_image_with_its_label(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    wanted = {"train": "train", "test": "test"}
    loaded, info = load_splits("fashion_mnist", wanted, str(tmp_path / "tfds"), str(folder))
    assert info == DatasetInfo((16, 16, 1), prepare.CLASS_NAMES)
    for split, (images, labels) in synthetic_arrays().items():
        ours = sorted(
            (image.tobytes(), int(label))
            for image, label in zip(loaded[split].images, loaded[split].labels, strict=True)
        )
        theirs = sorted(
            (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
        )
        assert ours == theirs
    # tfds itself reads it, by its name.
    import tensorflow_datasets as tfds

    source = tfds.data_source(
        "fashion_mnist", split="test", data_dir=str(tmp_path / "tfds"), download=False
    )
    assert len(source) == TEST_SIZE and source[0]["image"].shape == (16, 16, 1)


def test_preparing_leaves_nothing_behind_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    load_splits("fashion_mnist", {"a": "test"}, str(tmp_path / "tfds"), str(folder))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_programs_that_fetch_a_set_are_given_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx_folder(tmp_path / "idx")

    def fetched(scratch: Path) -> Path:
        # They run in another current folder.
        assert scratch.is_absolute()
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "fetch_fashion_mnist", fetched)
    loaded, _ = load_splits("fashion_mnist", {"a": "test"}, "relative/tfds")
    assert len(loaded["a"]) == TEST_SIZE
    assert (tmp_path / "relative" / "tfds" / "fashion_mnist").is_dir()


def _prepare(data_dir: Path, source: Path) -> None:
    prepare.prepare_fashion_mnist(data_dir, source)


def test_two_at_once_prepare_one_whole_set(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    data_dir = tmp_path / "tfds"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_prepare, args=(data_dir, folder)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in data_dir.iterdir()] == ["fashion_mnist"]
    loaded, _ = load_splits("fashion_mnist", {"a": "train"}, str(data_dir))
    assert len(loaded["a"]) == TRAIN_SIZE


def test_killed_half_way_leaves_nothing_that_looks_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    arrays = idx.read_folder(folder)
    scratch = tmp_path / "tfds" / ".scratch"
    scratch.mkdir(parents=True)
    # A kill -9 leaves this behind: the builder has run, and its folder was not moved into place.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: None)
        prepare.write_dataset(
            arrays, "fashion_mnist", prepare.CLASS_NAMES, scratch, tmp_path / "tfds"
        )
    loaded, _ = load_splits("fashion_mnist", {"a": "train"}, str(tmp_path / "tfds"), str(folder))
    assert len(loaded["a"]) == TRAIN_SIZE


def test_a_signal_to_end_leaves_no_scratch_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(InterruptedRunError, match=r"^interrupted by SIGTERM; nothing was prepared"),
        prepare._scratch("bars", tmp_path) as scratch,
    ):
        assert scratch.is_dir()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except InterruptedRunError as error:
            error.args = ("Failed to encode example",)  # As tfds does.
            raise
    assert list(tmp_path.iterdir()) == []


# Fetching


def test_without_any_source_the_message_has_the_three_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(fetch, "OFFICIAL_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError) as caught:
        load_splits("fashion_mnist", {"a": "train"}, str(tmp_path / "tfds"))
    message = str(caught.value)
    for remedy in ("connect to the internet", "apt-get install", "--config.data.source_dir"):
        assert remedy in message
    assert "\n" not in message


def test_the_sources_are_asked_in_order_and_a_wrong_content_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, good = write_idx_folder(tmp_path / "installed"), tmp_path / "good"
    asked = []

    def answer(name: str, folder: Path) -> Path:
        asked.append(name)
        return folder

    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", installed)
    monkeypatch.setattr(fetch, "_download", lambda _: answer("download", installed))
    write_idx_folder(good)
    monkeypatch.setattr(fetch, "_unpack_debian_package", lambda _: answer("apt", good))
    unlike = {installed: list(idx.FILE_NAMES), good: []}
    monkeypatch.setattr(idx, "unlike_fashion_mnist", lambda folder: unlike[folder])
    assert fetch.fetch_fashion_mnist(tmp_path) == good
    assert asked == ["download", "apt"]

    # A captive portal answers with what is no HTTP.
    def no_http(_: Path) -> Path:
        raise http.client.BadStatusLine("login")

    monkeypatch.setattr(fetch, "_download", no_http)
    assert fetch.fetch_fashion_mnist(tmp_path) == good
    unlike[installed] = []
    assert fetch.fetch_fashion_mnist(tmp_path) == installed
    assert asked == ["download", "apt", "apt"]


def test_the_package_is_fetched_with_private_folders_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], cwd: Path) -> None:
        commands.append(command)
        if "download" in command:
            (cwd / f"{fetch.DEBIAN_PACKAGE}_1_all.deb").touch()

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(fetch, "_run", run)
    folder = fetch._unpack_debian_package(tmp_path)
    assert folder == tmp_path / "debian/unpacked/usr/share/datasets/fashion-mnist"
    assert [command[-1] for command in commands[:2]] == ["update", fetch.DEBIAN_PACKAGE]
    for command in commands[:2]:
        for place in ("Dir::State::Lists", "Dir::Cache"):
            assert any(option.startswith(f"-o{place}={tmp_path}") for option in command)
    assert commands[2][:2] == ["dpkg-deb", "-x"]


def test_a_failing_command_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"sh: two$"):
        fetch._run(["sh", "-c", "echo one >&2; echo two >&2; exit 3"], tmp_path)


# Splits


def test_splits_are_slices_of_one_order(data_dir: Path) -> None:
    wanted = {"all": "train", "a": "train[:250]", "b": "train[250:]", "two": "train[:5]+test[:5]"}
    loaded, info = load_splits("bars", wanted, str(data_dir))
    assert info == DatasetInfo((16, 16, 1), CLASSES)
    together = np.concatenate([loaded["a"].images, loaded["b"].images])
    np.testing.assert_array_equal(together, loaded["all"].images)
    assert [len(loaded[key]) for key in wanted] == [TRAIN_SIZE, 250, TRAIN_SIZE - 250, 10]
    assert loaded["all"].images.dtype == np.uint8 and loaded["all"].labels.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("bars", "tset", "unknown split 'tset' of bars: .*/bars/3.0.1 has train"),
        ("bars", "train[:x]", "unknown split"),
        ("bars", "train[5:5]", "is empty"),
        ("bars", "train[9:5]", "is empty"),
        ("bras", "train", "no prepared dataset 'bras'"),
        ("bras", "train", "with TensorFlow, run `tfds build bras --file_format=array_record"),
    ],
)
def test_what_is_not_there_is_said(data_dir: Path, name: str, split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_splits(name, {"a": split}, str(data_dir))


def test_images_are_decoded_once_and_again_when_the_files_change(
    data_dir: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home / "once"))
    decode, calls = splits._decode, []

    def count(dataset: Dataset, split: str) -> Split:
        calls.append(split)
        return decode(dataset, split)

    monkeypatch.setattr(splits, "_decode", count)
    for _ in range(2):
        loaded, _ = load_splits("bars", {"a": "test"}, str(data_dir))
        assert len(loaded["a"]) == TEST_SIZE
    assert calls == ["test"]
    os.utime(next((data_dir / "bars" / "3.0.1").glob("bars-test*")), (1, 1))
    load_splits("bars", {"a": "test"}, str(data_dir))
    assert calls == ["test", "test"]


def flip(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def former_folder(path: Path) -> None:
    """Earlier versions kept two files in a folder of this name, without a digest."""
    path.unlink()
    path.mkdir()
    np.save(path / "images.npy", np.zeros((TEST_SIZE, 16, 16, 1), np.uint8))
    np.save(path / "labels.npy", np.zeros(TEST_SIZE, np.int32))


@pytest.mark.parametrize(
    ("damage", "warnings"),
    [
        (lambda path: path.unlink(), 0),
        (lambda path: os.truncate(path, 0), 1),
        (lambda path: os.truncate(path, 150), 1),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), 1),
        (lambda path: flip(path, 1000), 1),  # A pixel.
        (lambda path: flip(path, -40), 1),  # A label.
        (lambda path: flip(path, -1), 1),  # The digest.
        (former_folder, 0),
    ],
    ids=["missing", "empty", "cut", "zeros", "pixel", "label", "digest", "of an earlier version"],
)
def test_a_damaged_cache_is_made_anew(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    warnings: int,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = load_splits("bars", {"a": "test"}, str(data_dir))[0]["a"]
    (path,) = tmp_path.glob("tinyvgg_jax/decoded/*")
    raw, before = path.read_bytes(), Split(before.images.copy(), before.labels)
    damage(path)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tinyvgg_jax"):
        loaded = load_splits("bars", {"a": "test"}, str(data_dir))[0]["a"]
    np.testing.assert_array_equal(loaded.labels, before.labels)
    np.testing.assert_array_equal(loaded.images, before.images)
    assert path.read_bytes() == raw
    assert ["is damaged" in record.getMessage() for record in caplog.records] == [True] * warnings


def test_the_intact_images_of_another_set_are_not_taken(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "scratch").mkdir()
    prepare.write_dataset(synthetic_arrays(1), "bars", CLASSES, tmp_path / "scratch", tmp_path)
    ours, theirs = (
        load_splits("bars", {"a": "test"}, str(folder))[0]["a"].images.copy()
        for folder in (data_dir, tmp_path)
    )
    assert ours.shape == theirs.shape and not np.array_equal(ours, theirs)
    one, two = (tmp_path / "cache" / "tinyvgg_jax" / "decoded").iterdir()
    swapped = one.read_bytes(), two.read_bytes()
    two.write_bytes(swapped[0])
    one.write_bytes(swapped[1])
    loaded = load_splits("bars", {"a": "test"}, str(data_dir))[0]["a"].images
    np.testing.assert_array_equal(loaded, ours)


@pytest.fixture
def bars(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `bars` to be damaged, which has not been decoded; its folder of files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(data_dir / "bars" / "3.0.1", tmp_path / "tfds" / "bars" / "3.0.1")


def load(files: Path) -> tuple[dict[str, Split], DatasetInfo]:
    """Loads both splits of the dataset in a folder of files, NAME/VERSION."""
    wanted = {"train": "train", "test": "test"}
    return load_splits(files.parent.name, wanted, str(files.parent.parent))


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Changes a file but not its time, so that the cache is used if its size is the same."""
    before, raw = path.stat(), path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


FILES = (
    "dataset_info.json",
    "features.json",
    "bars-train.array_record-00000-of-00001",
    "bars-test.array_record-00000-of-00001",
)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b'{"a": [1, {"b": 2}]}'),
        lambda path: path.write_bytes(b"\xff\xfe"),
        in_its_place(lambda path: path.mkdir()),
        in_its_place(os.mkfifo),
        in_its_place(lambda path: path.symlink_to(path)),
    ],
    ids=["missing", "half", "zeros", "list", "object", "bytes", "folder", "fifo", "endless link"],
)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_set_is_one_clear_error(
    bars: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(bars / file)
    with pytest.raises(UserError) as caught:
        load(bars)
    message = str(caught.value)
    assert str(bars.parent.parent) in message and "\n" not in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 29 GiB"), "there is too little memory for the split"),
        (PermissionError(13, "Permission denied"), "cannot be read: .*If it is damaged, remove"),
        (UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates"), "this path is no UTF-8 text"),
    ],
)
def test_an_intact_set_is_not_called_damaged(
    bars: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(splits, "_source", fail)
    with pytest.raises(UserError, match=message):
        load(bars)


def test_a_file_that_is_closed_to_this_user_is_no_damage(
    bars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(path: str) -> Any:  # Root may read every file.
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(splits, "open_regular", closed)
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied.*array_record"):
        load(bars)


def test_a_set_without_a_train_split_has_the_splits_that_are_asked_for(bars: Path) -> None:
    info = bars / "dataset_info.json"
    content = json.loads(info.read_text())
    content["splits"] = [split for split in content["splits"] if split["name"] == "test"]
    info.write_text(json.dumps(content))
    dataset = find_dataset("bars", str(bars.parent.parent))
    assert dataset.num_examples("test[:60%]") == 42
    with pytest.raises(UserError, match=r"unknown split 'train\[:90%\]'"):
        dataset.ranges(dataset.default_splits()["train"])


@pytest.mark.parametrize("function", ["stat", "iterdir"])
def test_a_source_that_may_not_be_entered_is_one_line(
    bars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def refuse(path: Path, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, function, refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Permission denied"):
        prepare.check_name("fashion_mnist", tmp_path)
    if function == "iterdir":
        with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Permission denied"):
            prepare.describe_source(tmp_path, Options())
        with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Permission denied"):
            prepare.prepare_own("mine", tmp_path / "tfds", tmp_path, Options())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("dataset_info.json", b'"330"', b'"320"', "is damaged .*330"),
        ("dataset_info.json", b'"330"', b'"332"', "is damaged .*330"),
        ("features.json", b'"16"', b'"14"', "is damaged .*16"),
        ("dataset_info.json", b'"name": "bars"', b'"name": "cars"', "names it 'cars'"),
        ("features.json", b'"5"', b'"6"', "label.labels.txt has 5 names of 6 classes"),
        ("label.labels.txt", b"upper\n", b"upper ", "label.labels.txt has 4 names of 5 classes"),
        ("label.labels.txt", b"upper", b"up\xffer", "label.labels.txt: .*decode"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    bars: Path, file: str, old: bytes, new: bytes, message: str, cached: bool
) -> None:
    if cached:
        load(bars)
    edit(bars / file, old, new)
    with pytest.raises(UserError, match=message):
        load(bars)


@pytest.mark.parametrize("cached", [False, True])
def test_labels_without_a_class_are_refused(bars: Path, cached: bool) -> None:
    if cached:
        load(bars)
    edit(bars / "features.json", b'"5"', b'"4"')
    edit(bars / "label.labels.txt", b"upper\n", b"upper ")
    with pytest.raises(
        UserError, match=r"labels of its split 'te.*0 to 4, its 4 classes are 0 to 3"
    ):
        load(bars)


def test_a_folder_in_the_place_of_the_names_is_refused(bars: Path) -> None:
    (bars / "label.labels.txt").unlink()
    (bars / "label.labels.txt").mkdir()
    with pytest.raises(UserError, match=r"label\.labels\.txt: .*directory"):
        load(bars)


def test_classes_without_names_are_numbered(bars: Path) -> None:
    (bars / "label.labels.txt").unlink()
    assert load(bars)[1].class_names == ("0", "1", "2", "3", "4")


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare_fashion_mnist(folder / "tfds", write_idx_folder(folder / "idx"))
    return folder / "tfds" / "fashion_mnist" / "3.0.1"


@pytest.fixture
def fashion_mnist(prepared_once: Path, tmp_path: Path) -> Path:
    """A copy of a prepared FashionMNIST to be damaged; its folder of files."""
    return shutil.copytree(prepared_once, tmp_path / "tfds" / "fashion_mnist" / "3.0.1")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("label.labels.txt", lambda path: path.unlink()),
        ("label.labels.txt", lambda path: os.truncate(path, path.stat().st_size // 2)),
        ("label.labels.txt", lambda path: flip(path, 3)),
        ("label.labels.txt", lambda path: path.write_text("\n".join("abcdefghij"))),
        ("features.json", lambda path: edit(path, b'"1"\n', b'"3"\n')),
    ],
    ids=["missing", "half", "flipped", "other names", "three channels"],
)
def test_fashion_mnist_that_is_not_described_as_such_is_refused(
    fashion_mnist: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(fashion_mnist / file)
    with pytest.raises(UserError, match=rf"3\.0\.1 is damaged \({file}.*Remove it and run again"):
        load(fashion_mnist)


def test_fashion_mnist_is_not_fetched_if_something_is_in_its_way(
    fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "fetch_fashion_mnist", lambda _: pytest.fail("fetched"))
    (fashion_mnist / "features.json").unlink()
    with pytest.raises(UserError, match=r"fashion_mnist/3\.0\.1 is in the way"):
        load(fashion_mnist)
    assert (fashion_mnist / "dataset_info.json").exists()


def test_a_set_is_prepared_or_not_and_asking_creates_nothing(
    data_dir: Path, tmp_path: Path
) -> None:
    assert is_prepared("bars", str(data_dir))
    assert not is_prepared("fashion_mnist", str(data_dir))
    assert not is_prepared("fashion_mnist", str(tmp_path / "nowhere"))
    assert not is_prepared("bars", "gs://bucket/tfds")
    assert not list(tmp_path.iterdir())


def test_shared_examples_are_counted(data_dir: Path) -> None:
    dataset = find_dataset("bars", str(data_dir))
    for one, other, shared in [
        ("train", "test", 0),
        ("train[:250]", "train[250:]", 0),
        ("train", "train[250:]", 80),
        ("train[:260]", "train[250:]", 10),
        ("train[:50%]", "train[40%:60%]", 33),
        ("train[:250]+test", "test[:20]+train[240:]", 30),
        ("test+test", "test", 70),
    ]:
        assert dataset.num_shared(one, other) == dataset.num_shared(other, one) == shared


def test_decoding_shows_lines_without_a_terminal_and_only_if_it_takes_long(
    bars: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(bars)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    monkeypatch.setattr(splits, "_DECODE_BATCH", 200)
    os.utime(bars / FILES[0], (1, 1))
    load(bars)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" images")[0] for line in lines] == [
        "decoding test: 70/70",
        "decoding train: 200/330",
        "decoding train: 330/330",
    ]
    assert lines[-1].endswith(", 0 s left")


def test_decoding_shows_a_bar_on_a_terminal(
    bars: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    load(bars)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_BAR_AFTER_SECONDS", 0.0)
    os.utime(bars / FILES[0], (1, 1))
    load(bars)
    shown = capsys.readouterr().err
    assert "decoding train" in shown and "330" in shown


def test_a_cache_that_cannot_be_written_costs_time_only(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    loaded, _ = load_splits("bars", {"a": "test"}, str(data_dir))
    assert len(loaded["a"]) == TEST_SIZE


def test_a_set_in_tfrecord_form_is_left_alone(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bars" / "3.0.1"
    folder.mkdir(parents=True)
    for file in (data_dir / "bars" / "3.0.1").iterdir():
        content = file.read_bytes().replace(b"array_record", b"tfrecord")
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(content)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="was prepared as tfrecord, which only TensorFlow reads"):
        load_splits("bars", {"a": "train"}, str(tmp_path))
    assert sorted(folder.iterdir()) == before


def test_a_set_without_classes_is_refused(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bars" / "3.0.1"
    folder.mkdir(parents=True)
    for file in (data_dir / "bars" / "3.0.1").iterdir():
        content = file.read_bytes()
        if file.name == "features.json":
            content = content.replace(b'"label"', b'"other"')
        (folder / file.name).write_bytes(content)
    with pytest.raises(UserError, match="needs the features `image` and `label`"):
        load_splits("bars", {"a": "train"}, str(tmp_path))


def test_color_sets_keep_their_channels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(12, 8, 9, 3)).astype(np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 2
    (tmp_path / "scratch").mkdir()
    prepare.write_dataset(
        {"train": (images, labels)}, "colors", ("no", "yes"), tmp_path / "scratch", tmp_path
    )
    loaded, info = load_splits("colors", {"a": "train"}, str(tmp_path))
    assert info.image_shape == (8, 9, 3)
    assert sorted(i.tobytes() for i in loaded["a"].images) == sorted(i.tobytes() for i in images)


# Batches


@pytest.fixture
def numbered() -> Split:
    numbers = np.arange(23)
    images = np.broadcast_to(numbers[:, None, None, None], (23, 2, 2, 1)).astype(np.uint8)
    return Split(images, numbers.astype(np.int32))


def test_an_epochs_order_is_a_permutation_of_its_own() -> None:
    key = jax.random.key(0)
    first, second = epoch_order(key, 0, 100), epoch_order(key, 1, 100)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, epoch_order(key, 0, 100))
    assert not np.array_equal(first, epoch_order(jax.random.key(1), 0, 100))


def test_batches_follow_the_order_and_a_last_incomplete_one_is_left_out(numbered: Split) -> None:
    order = np.asarray(epoch_order(jax.random.key(0), 0, 23))
    batches = list(stream(numbered, order, 5, 0))
    assert len(batches) == 4
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.labels, order[5 * step : 5 * step + 5])
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0], batch.labels)


def test_a_stream_can_begin_at_any_step(numbered: Split) -> None:
    order = np.asarray(epoch_order(jax.random.key(0), 0, 23))
    everything = [batch.labels.tolist() for batch in stream(numbered, order, 5, 0)]
    assert [batch.labels.tolist() for batch in stream(numbered, order, 5, 2)] == everything[2:]
    assert list(stream(numbered, order, 5, 4)) == []


@pytest.mark.parametrize("batch_size", [1, 5, 23, 30])
def test_padded_batches_hold_every_example_once(numbered: Split, batch_size: int) -> None:
    seen = []
    for batch, is_real in padded_batches(numbered, batch_size):
        assert len(batch.labels) == len(batch.images) == len(is_real) == batch_size
        seen += batch.labels[is_real].tolist()
    assert seen == list(range(23))


# The real data


def test_fashion_mnist_is_complete_and_balanced(
    real_data: tuple[dict[str, Split], DatasetInfo],
) -> None:
    loaded, info = real_data
    assert info == DatasetInfo((28, 28, 1), prepare.CLASS_NAMES)
    for name, count in (("train", 6000), ("test", 1000)):
        assert loaded[name].images.shape == (10 * count, 28, 28, 1)
        assert np.bincount(loaded[name].labels).tolist() == [count] * 10


def test_no_image_stands_in_both_splits(real_data: tuple[dict[str, Split], DatasetInfo]) -> None:
    train, test = ({image.tobytes() for image in split.images} for split in real_data[0].values())
    assert len(train) == 60_000 and len(test) == 10_000
    assert not train & test


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, tinyvgg_jax; "
        "print([m for m in ('tensorflow_datasets', 'tensorflow', 'matplotlib', 'absl.flags', "
        "'orbax.checkpoint', 'jax') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert result.stdout.strip() == "[]"
