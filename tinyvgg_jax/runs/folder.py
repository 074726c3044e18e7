"""A run's folder: its lock, its JSON files, and the check that it holds no other run."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax.errors import UserError

if TYPE_CHECKING:
    # Listing runs does not wait for JAX.
    from tinyvgg_jax.data import DatasetInfo, Split

logger = logging.getLogger(__name__)

# Errors of file systems without locks, mostly network file systems.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns an OSError within the context into a UserError.

    Args:
        path: the file or folder to name in the message.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}.") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically: readers see the old file or the new one, never a part.

    Args:
        path: the file.
        text: its new content, written as UTF-8.

    Raises:
        UserError: if the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.new")
    with writing_to(path.parent):
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)


def json_text(content: dict[str, Any]) -> str:
    """Formats JSON with an indentation of two and a final newline, as in all files of a run."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file atomically; raises as `write_text` does."""
    write_text(path, json_text(content))


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """Reads a run's `summary.json`; None if the run is not finished, or the file is damaged."""
    try:
        content: dict[str, Any] = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        for key in ("seconds", "train_accuracy", "validation_accuracy", "test_accuracy"):
            content[key] = float(content[key])
        dict(content["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content


def write_history(workdir: Path, history: list[dict[str, Any]]) -> None:
    """Replaces a run's `metrics.jsonl`: one line of JSON for each finished epoch."""
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))


def refuse_another_run(workdir: Path, config: ConfigDict) -> None:
    """Checks that a folder is new, or holds a run of the same config.

    Raises:
        UserError: if it holds a run of another config, or checkpoints without a config.
    """
    path = workdir / "config.json"
    with writing_to(workdir):
        is_run, has_checkpoints = path.exists(), (workdir / "checkpoints").exists()
    if has_checkpoints and not is_run:
        raise UserError(
            f"{workdir} holds checkpoints, but no config.json that describes them. Put it back, or "
            "pass another --workdir."
        )
    if is_run:
        differences = config_lib.differences(config, config_lib.from_file(path))
        if differences:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(differences)}). "
                "Pass another --workdir, or the same config to go on with that run."
            )


def describe(
    workdir: Path, config: ConfigDict, splits: "dict[str, Split]", info: "DatasetInfo"
) -> None:
    """Writes `dataset.json` and `config.json`, which identify the folder's run.

    Args:
        workdir: the run's folder.
        config: the run's config.
        splits: the run's splits by name; their sizes are recorded.
        info: the dataset's image shape and class names.

    Raises:
        UserError: if the files cannot be written, or the folder holds a run on other data.
    """
    path = workdir / "dataset.json"
    sizes = {name: len(split) for name, split in splits.items()}
    content = dataclasses.asdict(info) | {"num_examples": sizes}
    with writing_to(workdir):
        before = path.read_bytes() if path.exists() else None
    if before not in (None, json_text(content).encode()):
        raise UserError(
            f"{workdir} holds a run on other data than the {config.data.name} found here (compare "
            f"{path}). Pass another --workdir, or the right --config.data.data_dir."
        )
    write_json(path, content)
    write_json(workdir / "config.json", config.to_dict())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Creates a run's folder and locks it, so that no second process trains in it.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        UserError: if another process holds the lock, or the folder cannot be created.
    """
    with writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {workdir}.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {workdir}: {error.strerror}.") from error
            logger.warning(
                "The file system of %s has no locks (%s), so nothing keeps a second process from "
                "training there too.",
                workdir,
                error.strerror,
            )
        yield
