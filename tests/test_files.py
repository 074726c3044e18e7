"""Files of a run's folder: what is read again is checked, and nothing is written through a link."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from tinyvgg_jax import UserError, restore, train_and_evaluate
from tinyvgg_jax.config import validated
from tinyvgg_jax.runs import files
from tinyvgg_jax.runs.folder import locked, read_config, read_dataset, read_summary

Trained = tuple[Path, dict[str, Any]]


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, float("inf")], "é": {"b": "\udcff\x1b"}}
    files.write_json(tmp_path / "x.json", content)
    assert files.read_json(tmp_path / "x.json") == content
    assert files.read_json(tmp_path / "y.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_an_edited_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"accuracy": 0.5})
    edit(path, "0.5", "0.9")
    with pytest.raises(UserError, match=r"x\.json is damaged, or was edited"):
        files.read_json(path)
    # As the message says; and as earlier versions wrote it.
    edit(path, ",\n" + path.read_text().splitlines()[2], "")
    assert files.read_json(path) == {"accuracy": 0.9}


OTHER_KINDS = [b"[]", b"3", b'"x"', b"null", b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000]


@pytest.mark.parametrize("content", OTHER_KINDS)
def test_json_of_another_kind_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json is damaged"):
        files.read_json(tmp_path / "x.json")


def test_a_fifo_or_a_folder_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x\.json cannot be read: not a regular file"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "y.json").mkdir()
    with pytest.raises(UserError, match=r"y\.json cannot be read"):
        files.read_json(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("name", "before", "after", "read"),
    [
        ("config.json", '"test_split": "test"', '"test_split": "train"', read_config),
        ("dataset.json", '"top"', '"cap"', read_dataset),
    ],
)
def test_what_describes_a_run_is_checked(
    run: Path, name: str, before: str, after: str, read: Callable[[Path], Any]
) -> None:
    edit(run / name, before, after)
    with pytest.raises(UserError, match=f"{name} is damaged, or was edited"):
        read(run)
    with pytest.raises(UserError, match=f"{name} is damaged, or was edited"):
        restore(run)


OTHER_DATASETS = [
    {},
    {"image_shape": 3, "class_names": ["a"]},
    {"image_shape": [28, 28], "class_names": ["a"]},
    {"image_shape": [28, 28, 10**12], "class_names": ["a"]},
    {"image_shape": [28, True, 1], "class_names": ["a"]},
    {"image_shape": [28, 28, 1], "class_names": []},
    {"image_shape": [28, 28, 1], "class_names": "ab"},
    {"image_shape": [28, 28, 1], "class_names": [1]},
]


@pytest.mark.parametrize("content", OTHER_DATASETS)
def test_another_object_is_no_dataset(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        read_dataset(tmp_path)


def test_a_config_file_is_a_config_as_it_is(run: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    assert validated(content) == read_config(run)


def test_another_object_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": {"a": []}}')
    with pytest.raises(UserError, match=r"config\.json is not valid: .* 'seed.a'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "damage", ["edited", "pipe", '{"a": []}', "{}", "[]", "null", '{"step": 8}', "{"]
)
def test_a_damaged_summary_is_made_again(
    run: Path, trained: Trained, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "summary.json"
    if damage == "edited":
        edit(path, '"parameters": ', '"parameters": 1')
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_text(damage)
    assert read_summary(run) is None
    assert "summary.json" in caplog.text
    config: ConfigDict = read_config(run)
    assert train_and_evaluate(config, run) == trained[1]
    assert read_summary(run) == trained[1]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "x.json").symlink_to(victim)
    files.write_json(folder / "x.json", {})
    assert not (folder / "x.json").is_symlink()
    (folder / f".y.json.{os.getpid()}.new").symlink_to(victim)
    files.write_json(folder / "y.json", {})
    (folder / "evaluation").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="evaluation is a link"):
        files.subfolder(folder, "evaluation", "test")
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="cannot write"), locked(folder):
        pass
    assert victim.read_text() == "precious" and not (tmp_path / "elsewhere").exists()


def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(tmp_path / "x", "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"x: No space left on device"):
        files.write_text(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]
