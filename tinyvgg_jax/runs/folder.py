"""A run's folder: its lock, its config and results, and the check that it holds no other run."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.runs.files import read_json, write_json, write_text, writing_to

if TYPE_CHECKING:
    # Listing runs does not wait for JAX, which comes with it.
    from tinyvgg_jax.data import DatasetInfo, Split

logger = logging.getLogger(__name__)

# Errors of file systems without locks, mostly network file systems.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write_history(workdir: Path, history: list[dict[str, Any]]) -> None:
    """Replaces a run's `metrics.jsonl`: one line of JSON for each finished epoch."""
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))


def read_config(workdir: Path) -> ConfigDict:
    """Reads a run's `config.json`.

    Args:
        workdir: the run's folder.

    Returns:
        The validated config.

    Raises:
        UserError: if the folder holds no run, or the file is damaged or no valid config.
    """
    path = workdir / "config.json"
    content = read_json(path)
    if content is None:
        raise UserError(f"{workdir} holds no run: there is no {path.name} in it.")
    try:
        return config_lib.validated(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_dataset(workdir: Path) -> "DatasetInfo":
    """Reads the image shape and class names of a run's dataset from `dataset.json`.

    Args:
        workdir: the run's folder.

    Raises:
        UserError: if the file is missing or damaged.
    """
    from tinyvgg_jax.data import DatasetInfo

    path = workdir / "dataset.json"
    content = read_json(path)
    if content is None:
        raise UserError(f"{workdir} holds no {path.name}.")
    shape, names = content.get("image_shape"), content.get("class_names")
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(type(size) is int and 0 < size < 1_000_000 for size in shape)
        and isinstance(names, list)
        and names
        and all(isinstance(name, str) for name in names)
    ):
        raise UserError(f"{path} is damaged: it holds no image_shape or class_names of a dataset.")
    return DatasetInfo((shape[0], shape[1], shape[2]), tuple(names))


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """Reads the `summary.json` of a finished run.

    Args:
        workdir: the run's folder.

    Returns:
        What `train_and_evaluate` returned; None if the run is not finished, or, with a warning, if
        the file is damaged: everything in it can be computed again.
    """
    path = workdir / "summary.json"
    try:
        summary = read_json(path)
        if summary is not None and not _is_summary(summary):
            raise UserError(f"{path} is damaged: it is no summary of a run.")
    except UserError as error:
        logger.warning("Ignored: %s", error)
        return None
    return summary


def _is_summary(content: dict[str, Any]) -> bool:
    """Tells whether JSON content has the keys of a summary, each of the right type."""
    fields = [name for name in config_lib.FIELDS if name.endswith("_split")]
    splits = [name.removeprefix("data.").removesuffix("_split") for name in fields]
    numbers = [f"{split}_{kind}" for split in splits for kind in ("accuracy", "loss")]
    return (
        all(type(content.get(key)) in (int, float) for key in (*numbers, "seconds"))
        and all(type(content.get(key)) is int for key in ("step", "parameters"))
        and all(isinstance(content.get(key), str) for key in ("dataset", "device"))
        and isinstance(content.get("versions"), dict)
    )


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
        differences = config_lib.differences(config, read_config(workdir))
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
    before = read_json(path)
    # Lists come back where tuples were written.
    if before not in (None, json.loads(json.dumps(content))):
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
        # A link in its place is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(workdir / ".lock", flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    finally:
        os.close(descriptor)
