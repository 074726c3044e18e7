"""A run's folder: its lock, its JSON files, and the checks that it holds no other run."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax.data import DatasetInfo, Split
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.optimizer import SCHEDULES

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
    with writing_to(path):
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)


def json_text(content: dict[str, Any]) -> str:
    """Formats JSON with an indentation of two and a final newline, as in all files of a run."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file atomically; raises as `write_text` does."""
    write_text(path, json_text(content))


def write_history(workdir: Path, history: list[dict[str, Any]]) -> None:
    """Replaces a run's `metrics.jsonl`: one line of JSON for each finished epoch."""
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))


def remove_file(path: Path) -> None:
    """Removes a file if it is there.

    Raises:
        UserError: if it cannot be removed.
    """
    with writing_to(path):
        path.unlink(missing_ok=True)


def distinct_sizes(first: int, second: int) -> tuple[str, str]:
    """Formats two sizes in bytes in the largest unit that shows their difference."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        shown = f"{first / unit:,.1f} {name}", f"{second / unit:,.1f} {name}"
        if max(first, second) >= unit and shown[0] != shown[1]:
            return shown
    return f"{first:,} bytes", f"{second:,} bytes"


def steps_taken(workdir: Path) -> int:
    """Reads how far a run has been trained from the names of its checkpoints.

    Returns:
        The number of optimizer steps of the newest checkpoint, intact or not; 0 if there is none.
    """
    names = [path.name for path in (workdir / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def refuse_another_run(workdir: Path, config: ConfigDict) -> None:
    """Checks that a folder is new, or holds a run that a config can go on with.

    That is a run of the same config. The number of epochs may differ if the schedule does not
    depend on it, and the number of seeds if both are more than 1.

    Raises:
        UserError: if the folder holds another run, more seeds, or checkpoints without a config.
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
        theirs = config_lib.from_file(path)
        differences = config_lib.differences(config, theirs)
        if differences:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(differences)}). "
                "Pass another --workdir, or the same config to go on with that run."
            )
        _refuse_other_seeds(workdir, config, theirs)
        if config.num_epochs != theirs.num_epochs:
            _refuse_other_schedule(workdir, config, theirs)


def _refuse_other_schedule(workdir: Path, config: ConfigDict, theirs: ConfigDict) -> None:
    """Checks that another number of epochs leaves the learning rates of a run as they were."""
    if SCHEDULES[config.schedule].depends_on_num_epochs:
        raise UserError(
            f"{workdir} holds a run of num_epochs={theirs.num_epochs}, which cannot become one of "
            f"num_epochs={config.num_epochs}: with the schedule {config.schedule!r}, every "
            "learning rate depends on the number of epochs. Pass another --workdir."
        )


def _refuse_other_seeds(workdir: Path, config: ConfigDict, theirs: ConfigDict) -> None:
    """Checks that the seeds in a folder are among a config's, and lie where it would put them."""
    ours, before = config.num_seeds, theirs.num_seeds
    if ours != before and 1 in (ours, before):
        raise UserError(
            f"{workdir} holds {'a single run' if before == 1 else f'runs of {before} seeds'}, not "
            f"{'a single run' if ours == 1 else f'runs of {ours} seeds'}: several seeds have "
            "folders of their own in --workdir, and a single run has none. Pass another --workdir."
        )
    further = range(config.seed + ours, config.seed + before)
    begun = [seed for seed in further if (workdir / f"seed_{seed}" / "config.json").exists()]
    if begun:
        raise UserError(
            f"{workdir} holds the run of seed {begun[-1]} already, which config.num_seeds={ours} "
            f"leaves out. Pass --config.num_seeds={begun[-1] - config.seed + 1} or more, or "
            "another --workdir."
        )


def refuse_fewer_epochs(workdir: Path, num_epochs: int, steps_per_epoch: int) -> None:
    """Checks that a run has not been trained for longer than a config says.

    Args:
        workdir: the run's folder.
        num_epochs: the config's number of epochs.
        steps_per_epoch: optimizer steps in an epoch.

    Raises:
        UserError: if the run has been trained beyond the last epoch.
    """
    begun = math.ceil(steps_taken(workdir) / steps_per_epoch)
    if begun > num_epochs:
        raise UserError(
            f"{workdir} holds a run that has reached epoch {begun} already, and config.num_epochs "
            f"is {num_epochs}. Pass --config.num_epochs={begun} or more, or another --workdir."
        )


def _dataset_json(splits: dict[str, Split], info: DatasetInfo) -> str:
    """Formats `dataset.json`: image shape, class names, and sizes of the splits."""
    sizes = {name: len(split) for name, split in splits.items()}
    return json_text(dataclasses.asdict(info) | {"num_examples": sizes})


def refuse_other_data(
    workdir: Path, dataset: str, splits: dict[str, Split], info: DatasetInfo
) -> None:
    """Checks that a folder is new, or holds a run on the same data.

    Args:
        workdir: the run's folder.
        dataset: the dataset's name, for the message.
        splits: the splits by name.
        info: the dataset's image shape and class names.

    Raises:
        UserError: if the data differ from those in `dataset.json`.
    """
    path = workdir / "dataset.json"
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    if before != _dataset_json(splits, info).encode():
        raise UserError(
            f"{workdir} holds a run on other data than the {dataset} found here (compare "
            f"{path}). Pass another --workdir, or the right --config.data.data_dir."
        )


def describe(
    workdir: Path, config: ConfigDict, splits: dict[str, Split], info: DatasetInfo
) -> None:
    """Writes `dataset.json` and `config.json`, which identify the folder's run.

    Args:
        workdir: the run's folder.
        config: the run's config.
        splits: the run's splits by name; their sizes are recorded.
        info: the dataset's image shape and class names.

    Raises:
        UserError: if the files cannot be written.
    """
    write_text(workdir / "dataset.json", _dataset_json(splits, info))
    write_config(workdir, config)


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`; a summary of another number of epochs or seeds is removed before.

    Raises:
        UserError: if that is not possible.
    """
    path = workdir / "config.json"
    if path.exists():
        theirs = config_lib.from_file(path)
        if (theirs.num_epochs, theirs.num_seeds) != (config.num_epochs, config.num_seeds):
            remove_file(workdir / "summary.json")
    write_json(path, config.to_dict())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Creates a run's folder and locks it, so that no second process trains in it.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        UserError: if another process holds the lock, or the folder cannot be created.
    """
    path = workdir / ".lock"
    with writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with writing_to(path):
        file = path.open("w")
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
