"""Checkpoints: written by Orbax, checked by a digest of their own, the newest intact one used.

A checkpoint is three items: `params`, which restore alone; `opt_state`; and `progress`, JSON
with all else that a run needs to go on, and with the SHA-256 of the two others, because bytes
that flip on a disk restore without an error.
"""

import contextlib
import hashlib
import json
import logging
import operator
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from tinyvgg_jax.errors import UserError

logger = logging.getLogger(__name__)

_METRIC = "validation_accuracy"
_LATEST_KEPT = 2


class Restored(NamedTuple):
    """A checkpoint's content; `opt_state` is None where it was not asked for."""

    step: int
    params: Any
    opt_state: Any
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: the latest two and the best by validation accuracy.

    A context manager; leaving it waits until the last save is on disk.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Opens a folder of checkpoints.

        Args:
            folder: is made if it does not exist.
            read_only: to restore only; nothing is written or moved.

        Raises:
            UserError: if the folder cannot be opened.
        """
        self._folder = folder.absolute()
        self._read_only = read_only
        self._refuse_unreadable_metrics()
        policy = AnyPreservationPolicy(
            [
                LatestN(_LATEST_KEPT),
                BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        try:
            with _without_advice():
                options = ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    best_fn=_accuracy,
                    best_mode="max",
                    read_only=read_only,
                )
                self._manager = ocp.CheckpointManager(self._folder, options=options)
        except Exception as error:
            # Orbax lets whatever its JSON parser and the file system raise through.
            raise UserError(
                f"cannot open the checkpoints in {folder}: {_first_line(error)}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with _as_user_error(f"cannot finish saving a checkpoint in {self._folder}"):
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        progress: dict[str, Any],
        validation_accuracy: float | None,
    ) -> None:
        """Starts saving; the arguments may be donated as soon as this returns.

        Args:
            step: number of optimizer steps taken.
            params: tree of arrays.
            opt_state: tree of arrays.
            progress: JSON-serialisable; what else the run needs to go on.
            validation_accuracy: a fraction; None for a checkpoint within an epoch.

        Raises:
            UserError: if it, or the save before it, could not be written.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
        free = shutil.disk_usage(self._folder).free
        # With what Orbax adds; and before it is half done.
        if free < 2 * size:
            raise UserError(
                f"cannot save a checkpoint in {self._folder}: {free / 1e6:,.0f} MB free, "
                f"{2 * size / 1e6:,.0f} MB needed. What was saved before is kept."
            )
        progress = {**progress, "shapes": _shapes(params)}
        digests = {
            "params": digest(params),
            "opt_state": digest(opt_state),
            "progress": _digest_json(progress),
        }
        metrics = None if validation_accuracy is None else {_METRIC: float(validation_accuracy)}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            progress=ocp.args.JsonSave({**progress, "digests": digests}),
        )
        with _as_user_error(f"cannot save a checkpoint in {self._folder}"):
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        with _as_user_error(f"cannot finish saving a checkpoint in {self._folder}"):
            self._manager.wait_until_finished()

    def restore_newest(self, params: Any, opt_state: Any) -> Restored | None:
        """Restores the newest intact checkpoint and sets damaged newer ones aside.

        Args:
            params: tree of `jax.ShapeDtypeStruct`.
            opt_state: likewise.

        Returns:
            The checkpoint; None if there is none.

        Raises:
            UserError: if there were checkpoints, and all of them are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            restored = self._restore_if_intact(step, params, opt_state)
            if restored is not None:
                return restored
            self._set_aside(step)
        damaged = _damaged_folder(self._folder)
        if steps or damaged.exists():
            raise UserError(
                f"all checkpoints in {self._folder} are damaged (moved to {damaged}, not "
                "deleted). Start again in another --workdir."
            )
        return None

    def restore_params(self, step: int | str, params: Any) -> Restored:
        """Restores parameters alone.

        Args:
            step: a number of steps, "latest", or "best" (by validation accuracy). If one of the
                two last named is damaged, the next latest or next best is taken, with a warning.
            params: tree of `jax.ShapeDtypeStruct`.

        Returns:
            The checkpoint without optimizer state.

        Raises:
            UserError: if there is no such checkpoint, or none of its kind is intact.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self._folder} holds no checkpoint yet.")
        if step not in ("latest", "best"):
            try:
                step = operator.index(step)  # type: ignore[arg-type]
            except TypeError:
                raise UserError(f"step must be a number, latest or best, not {step!r}.") from None
            if step not in steps:
                known = ", ".join(str(known) for known in steps)
                raise UserError(f"there is no checkpoint of step {step}; there are: {known}.")
            candidates = [step]
        elif step == "latest":
            candidates = steps[::-1]
        else:
            candidates = sorted(steps, key=lambda s: (self._validation_accuracy(s), s))[::-1]
        for candidate in candidates:
            restored = self._restore_if_intact(candidate, params, None)
            if restored is not None:
                return restored
        raise UserError(f"the checkpoint of step {candidates[0]} in {self._folder} is damaged.")

    def _restore_if_intact(self, step: int, params: Any, opt_state: Any) -> Restored | None:
        wanted = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        items = {name: ocp.args.StandardRestore(_on_device(tree)) for name, tree in wanted.items()}
        self._refuse_another_network(step, params)
        try:
            content = self._manager.restore(
                step, args=ocp.args.Composite(progress=ocp.args.JsonRestore(), **items)
            )
            progress = dict(content["progress"])
            digests = progress.pop("digests")
            intact = digests["progress"] == _digest_json(progress) and all(
                digest(content[name]) == digests[name] for name in wanted
            )
            reason = "its content does not match its digest"
        except Exception as error:
            # A damaged file shows as one of a dozen exception types, plain Exception included.
            intact, reason = False, _first_line(error)
        if not intact:
            logger.warning("The checkpoint of step %d is damaged: %s", step, reason)
            return None
        del progress["shapes"]
        return Restored(step, content["params"], content.get("opt_state"), progress)

    def _refuse_another_network(self, step: int, params: Any) -> None:
        """A checkpoint that is not of the config's network is not damaged."""
        try:
            content = self._manager.restore(
                step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
            )
            found = dict(content["progress"]["shapes"])
        except Exception:
            return  # Damaged: restoring all of it says how.
        wanted = _shapes(params)
        for path in sorted({*found, *wanted}):
            if found.get(path) == wanted.get(path):
                continue
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} is of another network than "
                f"config.json says: {path} is {found.get(path)} there, not {wanted.get(path)}."
            )

    def _validation_accuracy(self, step: int) -> float:
        try:
            metrics = json.loads(_metrics_file(self._folder / str(step)).read_text())
            return float(metrics[_METRIC])
        except (OSError, ValueError, KeyError, TypeError):
            return -1.0

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way: Orbax saves no step that it has already."""
        _move_aside(self._folder / str(step))
        self._manager.reload()

    def _refuse_unreadable_metrics(self) -> None:
        """Orbax opens no folder in which one checkpoint's metrics are damaged."""
        for folder in self._folder.glob("[0-9]*"):
            file = _metrics_file(folder)
            try:
                if file.exists():
                    json.loads(file.read_text())
            except (OSError, ValueError) as error:
                if self._read_only:
                    raise UserError(f"{file} is damaged; move {folder} away.") from error
                logger.warning("The checkpoint of step %s is damaged: %s", folder.name, error)
                _move_aside(folder)


def digest(tree: Any) -> str:
    """The SHA-256 of a tree of arrays: of paths, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]:
        array = np.ascontiguousarray(leaf)
        header = [jax.tree_util.keystr(path), str(array.dtype), list(array.shape)]
        sha.update(json.dumps(header).encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _digest_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _on_device(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _shapes(tree: Any) -> dict[str, list[int]]:
    """What tells one network's parameters from another's, as JSON."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in leaves
    }


def _accuracy(metrics: Any) -> float:
    return metrics[_METRIC]


def _metrics_file(step_folder: Path) -> Path:
    return step_folder / "metrics" / "metrics"


def _damaged_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.damaged")


def _move_aside(step_folder: Path) -> None:
    damaged = _damaged_folder(step_folder.parent)
    damaged.mkdir(exist_ok=True)
    target = damaged / step_folder.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(step_folder, target)
    logger.warning("It was moved to %s.", target)


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A full disk reaches us as OSError, ValueError or a bare Exception from tensorstore.
        raise UserError(f"{what}: {_first_line(error)}") from error


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Orbax warns of what follows from `read_only`, which is what was asked for."""
    library = logging.getLogger("absl")
    before = library.level
    library.setLevel(max(logging.ERROR, library.getEffectiveLevel()))
    try:
        yield
    finally:
        library.setLevel(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
