import os
import shutil
import socket
from pathlib import Path

import pytest

from tinyvgg_jax import cache
from tinyvgg_jax.cache import cache_dir

NAME, CONTENT = "room/name", b"content " * 20


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tinyvgg_jax"


@pytest.fixture
def kept() -> Path:
    return cache.keep(NAME, lambda file: file.write(CONTENT))


def test_the_folder_is_where_the_desktop_standard_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_dir() == tmp_path / "tinyvgg_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "tinyvgg_jax"


def test_what_is_kept_is_found_and_nothing_lies_beside_it(folder: Path, kept: Path) -> None:
    assert cache.find(NAME) == kept == folder / NAME
    assert cache.read(NAME) == CONTENT
    assert kept.read_bytes()[: len(CONTENT)] == CONTENT
    assert list(kept.parent.iterdir()) == [kept]


def test_what_was_never_kept_is_not_found_and_not_talked_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert cache.find(NAME) is None and cache.read(NAME) is None
    assert not caplog.records


def test_every_flipped_byte_is_noticed(kept: Path) -> None:
    raw = kept.read_bytes()
    for i in range(len(raw)):
        kept.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
        assert cache.find(NAME) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"short", CONTENT, CONTENT[:80] + bytes(112), bytes(192)],
    ids=["empty", "shorter than a digest", "without its digest", "half zeros", "zeros"],
)
def test_a_damaged_file_is_one_warning_and_made_again(
    kept: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    kept.write_bytes(content)
    assert cache.find(NAME) is None
    (record,) = caplog.records
    assert str(kept) in record.getMessage() and "\n" not in record.getMessage()
    cache.keep(NAME, lambda file: file.write(CONTENT))
    assert cache.read(NAME) == CONTENT


def test_an_intact_file_of_another_name_is_not_taken(kept: Path) -> None:
    shutil.copy(kept, kept.with_name("other"))
    assert cache.find("room/other") is None


def test_what_is_no_file_is_replaced_without_waiting_for_it(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)

    def folder_with_a_file(path: Path) -> None:
        (path / "sub").mkdir(parents=True)
        (path / "sub" / "file").touch()

    monkeypatch.chdir(kept.parent)  # The path of a socket must be short.
    for make in (folder_with_a_file, os.mkfifo, bind, lambda path: path.symlink_to(path)):
        kept.unlink()
        make(kept)
        assert cache.find(NAME) is None
        cache.keep(NAME, lambda file: file.write(CONTENT))
        assert cache.read(NAME) == CONTENT


def test_a_link_is_replaced_and_not_followed(kept: Path, tmp_path: Path) -> None:
    kept.unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    kept.symlink_to(tmp_path / "elsewhere")
    cache.keep(NAME, lambda file: file.write(CONTENT))
    assert cache.read(NAME) == CONTENT and not kept.is_symlink()
    assert (tmp_path / "elsewhere" / "file").exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(kept: Path) -> None:
    def fail(_: object) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        cache.keep(NAME, fail)
    assert cache.read(NAME) == CONTENT
    assert list(kept.parent.iterdir()) == [kept]


def test_a_folder_that_cannot_be_made_is_an_error_that_callers_expect(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    assert cache.find(NAME) is None
    with pytest.raises(OSError):
        cache.keep(NAME, lambda file: file.write(CONTENT))


def test_a_file_is_on_the_disk_before_it_has_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((folder / NAME).exists()))
    cache.keep(NAME, lambda file: file.write(CONTENT))
    assert synced == [False]
