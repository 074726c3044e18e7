"""A run's folder: how its files are written, whose it is, and who may train in it."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax.data import DatasetInfo, Split
from tinyvgg_jax.errors import UserError

logger = logging.getLogger(__name__)

# How file systems, mostly of networks, say that they have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}.") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file, so that a reader and a crash see the old or the new one, whole.

    Raises:
        UserError: if it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.new")
    with writing_to(path.parent):
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)


def json_text(content: dict[str, Any]) -> str:
    """Formats JSON as in all of a run's files, for people and programs."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file; errors are those of `write_text`."""
    write_text(path, json_text(content))


def write_history(workdir: Path, history: list[dict[str, Any]]) -> None:
    """Writes a run's `metrics.jsonl` anew: a line of JSON for each epoch."""
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))


def refuse_another_run(workdir: Path, config: ConfigDict) -> None:
    """Raises a UserError if a folder holds a run of another config, or checkpoints of none."""
    path = workdir / "config.json"
    with writing_to(workdir):
        is_run, has_checkpoints = path.exists(), (workdir / "checkpoints").exists()
    if has_checkpoints and not is_run:
        raise UserError(
            f"{workdir} holds checkpoints, but no config.json that says of what. Put it back, or "
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
    workdir: Path, config: ConfigDict, splits: dict[str, Split], info: DatasetInfo
) -> None:
    """Writes `dataset.json` and `config.json`, which say whose the folder is.

    Raises:
        UserError: if they cannot be written, or the folder's run is of other data.
    """
    path = workdir / "dataset.json"
    sizes = {name: len(split) for name, split in splits.items()}
    content = dataclasses.asdict(info) | {"num_examples": sizes}
    with writing_to(workdir):
        before = path.read_bytes() if path.exists() else None
    if before not in (None, json_text(content).encode()):
        raise UserError(
            f"{workdir} holds a run on other data than {config.data.name} is here: see {path}, "
            "unless that is damaged. Pass another --workdir, or the right --config.data.data_dir."
        )
    write_json(path, content)
    write_json(workdir / "config.json", config.to_dict())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes a run's folder and keeps a second process from training in it.

    The lock ends with the process, however it ends.

    Raises:
        UserError: if another process holds the lock, or the folder cannot be made.
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
