"""A run's folder: its lock, its config and results, and the checks that it holds no other run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import math
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
        raise UserError(f"{path} is not valid: {error}") from error


def read_dataset(workdir: Path) -> DatasetInfo:
    """Reads the image shape and class names of a run's dataset from `dataset.json`.

    Args:
        workdir: the run's folder.

    Raises:
        UserError: if the file is missing or damaged.
    """
    path = workdir / "dataset.json"
    content = read_json(path)
    if content is None:
        raise UserError(f"{workdir} holds no {path.name}.")
    info = dataset_info(content)
    if info is None:
        raise UserError(f"{path} is damaged: it holds no image_shape or class_names of a dataset.")
    return info


def dataset_info(content: dict[str, Any]) -> DatasetInfo | None:
    """Reads `image_shape`, `class_names` and `fit` from JSON content; None if they are not there.

    Without `fit` it is "garment".
    """
    from tinyvgg_jax.data import DatasetInfo
    from tinyvgg_jax.pictures import FITS

    shape, names = content.get("image_shape"), content.get("class_names")
    fit = content.get("fit", "garment")
    if (
        isinstance(shape, list)
        and len(shape) == 3
        and all(type(size) is int and 0 < size < 1_000_000 for size in shape)
        and isinstance(names, list)
        and names
        and all(isinstance(name, str) for name in names)
        and fit in FITS
    ):
        return DatasetInfo((shape[0], shape[1], shape[2]), tuple(names), fit)
    return None


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
        UserError: if the folder holds another run, more seeds, or files of a run without a config.
    """
    path = workdir / "config.json"
    with writing_to(workdir):
        is_run = path.exists()
        names = ("checkpoints", "metrics.jsonl", "summary.json")
        others = [name for name in names if (workdir / name).exists()]
    if others and not is_run:
        raise UserError(
            f"{workdir} holds {', '.join(others)}, but no config.json that describes a run. "
            "Put it back, or pass another --workdir."
        )
    if is_run:
        theirs = read_config(workdir)
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
    from tinyvgg_jax.optimizer import SCHEDULES

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


def _dataset_content(splits: dict[str, Split], info: DatasetInfo) -> dict[str, Any]:
    """Makes the content of `dataset.json`: image shape, class names, splits' sizes and digests."""
    sizes = {name: len(split) for name, split in splits.items()}
    digests = {name: split.digest for name, split in splits.items()}
    content = dataclasses.asdict(info) | {"num_examples": sizes, "digests": digests}
    if info.fit == "garment":  # As in runs from before there were others.
        del content["fit"]
    # JSON has lists where these are tuples.
    return {name: list(x) if isinstance(x, tuple) else x for name, x in content.items()}


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
    before, now = read_json(path), _dataset_content(splits, info)
    if before is not None and "digests" not in before:  # As in runs from before they were written.
        del now["digests"]
    if before not in (None, now):
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
        splits: the run's splits by name; their sizes and digests are recorded.
        info: the dataset's image shape and class names.

    Raises:
        UserError: if the files cannot be written.
    """
    write_json(workdir / "dataset.json", _dataset_content(splits, info))
    write_config(workdir, config)


def mark_of(workdir: Path, name: str) -> Path:
    """Names the file by which the processes of a run recognise its folder.

    Args:
        workdir: the run's folder.
        name: a new one each time, which no network file system can have looked for before.
    """
    return workdir / f".mark-{name}"


def leave_mark(mark: Path) -> None:
    """Leaves a mark; raises a UserError if that is not possible."""
    with writing_to(mark):
        mark.touch()


def require_mark(mark: Path) -> None:
    """Checks that the first process has left a mark here.

    Raises:
        UserError: if the folder is another one.
    """
    if not mark.exists():
        raise UserError(
            f"{mark.parent} is another folder than that of process 0. Several processes need a "
            "folder on a file system that they share."
        )


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`; a summary of another number of epochs or seeds is removed before.

    Raises:
        UserError: if that is not possible.
    """
    path = workdir / "config.json"
    if path.exists():
        theirs = read_config(workdir)
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
        # A link in its place is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
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
