"""Checkpoints: written by Orbax, checked by a digest of their own, the newest intact one used.

A checkpoint is three items: `params`, which restore alone; `opt_state`; and `progress`, JSON
with all else that a run needs to go on, and with the SHA-256 of the two others, because bytes
that flip on a disk restore without an error.

Only what is proven to be damaged is moved away: a digest that does not match, or files that do not
restore although all of them can be read and a fresh checkpoint restores on this machine. Anything
else, like a permission that is missing or another dtype, is an error that moves nothing.
"""

import contextlib
import copy
import hashlib
import json
import logging
import operator
import os
import re
import shutil
import tempfile
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
# Orbax takes the folder's path for a pattern of names and encodes it as UTF-8, so that it loses
# files under a path with brackets or with characters that the locale cannot spell.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._ +,=@%-]*")
# Linux gives every open folder a second path here.
_OPEN_FOLDERS = Path("/proc/self/fd")
_LATEST_KEPT = 2


class Restored(NamedTuple):
    """A checkpoint's content; `opt_state` is None where it was not asked for."""

    step: int
    params: Any
    opt_state: Any
    progress: dict[str, Any]


class _DamagedError(Exception):
    """The content of a checkpoint is not what was saved."""


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
        # Saved and read back once, so that what cannot be restored is known after one save.
        self._read_back = False
        # A missing device is no fault of the checkpoints, so its error must not pass for one.
        jax.local_devices()
        self._refuse_unreadable_metrics()
        policy = AnyPreservationPolicy(
            [
                LatestN(_LATEST_KEPT),
                BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._resources = contextlib.ExitStack()
        try:
            if not read_only:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._orbax_folder = self._resources.enter_context(_plain_path(self._folder))
            with _without_advice():
                options = ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    best_fn=_accuracy,
                    best_mode="max",
                    read_only=read_only,
                )
                self._manager = ocp.CheckpointManager(self._orbax_folder, options=options)
        except UserError:
            raise
        except Exception as error:
            # Orbax lets whatever its JSON parser and the file system raise through.
            self._resources.close()
            raise UserError(
                f"cannot open the checkpoints in {folder}: {_first_line(error)}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with self._resources, self._as_user_error("cannot finish saving a checkpoint"):
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
        arrays = {"params": params, "opt_state": opt_state}
        # A copy, because it is written later, when the caller's lists have grown already.
        progress = {
            **copy.deepcopy(progress),
            "shapes": {path: shape for path, (shape, _) in _layout(params).items()},
            "arrays": {name: _layout(tree) for name, tree in arrays.items()},
        }
        digests = {name: digest(tree) for name, tree in arrays.items()}
        digests["progress"] = _digest_json(progress)
        metrics = None if validation_accuracy is None else {_METRIC: float(validation_accuracy)}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            progress=ocp.args.JsonSave({**progress, "digests": digests}),
        )
        with self._as_user_error("cannot save a checkpoint"):
            self._manager.save(step, args=items, metrics=metrics, force=True)
        if not self._read_back:
            self.wait()
            with self._as_user_error("what was saved cannot be read back"):
                self._restore(step, arrays)
            self._read_back = True

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        with self._as_user_error("cannot finish saving a checkpoint"):
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
            self._quarantine(step)
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
        try:
            return self._restore(step, wanted)
        except UserError:
            raise
        except Exception as error:
            # A damaged file shows as one of a dozen exception types, plain Exception included.
            if not isinstance(error, _DamagedError):
                self._require_damage(step, wanted, error)
            logger.warning("The checkpoint of step %d is damaged: %s", step, self._reason(error))
            return None

    def _restore(self, step: int, wanted: dict[str, Any]) -> Restored:
        """Restores the items that are wanted, and compares them with their digests."""
        stored = self._manager.restore(
            step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())
        )
        progress = dict(stored["progress"])
        digests = progress.pop("digests")
        if digests["progress"] != _digest_json(progress):
            raise _DamagedError("its content does not match its digest")
        self._refuse_other_arrays(step, wanted, progress)
        items = {name: ocp.args.StandardRestore(_on_device(tree)) for name, tree in wanted.items()}
        content = self._manager.restore(step, args=ocp.args.Composite(**items))
        if any(digest(content[name]) != digests[name] for name in wanted):
            raise _DamagedError("its content does not match its digest")
        for name in ("shapes", "arrays"):
            progress.pop(name, None)
        return Restored(step, content["params"], content.get("opt_state"), progress)

    def _refuse_other_arrays(
        self, step: int, wanted: dict[str, Any], progress: dict[str, Any]
    ) -> None:
        """Raises a UserError if a checkpoint has other arrays than are wanted, or other dtypes.

        Orbax would convert another dtype silently, so that the digest would not match.
        """
        where = f"the checkpoint of step {step} in {self._folder}"
        for name, tree in wanted.items():
            layout = _layout(tree)
            # Earlier runs have no record of their own; Orbax's is not under a digest.
            found = progress.get("arrays", {}).get(name) or self._recorded_by_orbax(step, name)
            shapes = {path: shape for path, (shape, _) in found.items()}
            for path in sorted({*shapes, *layout}):
                here, there = layout.get(path, [None])[0], shapes.get(path)
                if here == there:
                    continue
                if name == "params":
                    raise UserError(
                        f"{where} is of another network than config.json says: {path} is {there} "
                        f"there, not {here}."
                    )
                raise UserError(
                    f"{where} has another optimizer state than this version makes: {path} is "
                    f"{there} there, not {here}. Go on with the versions of the packages that "
                    "began the run, or evaluate it as it is."
                )
            for path, (_, dtype) in found.items():
                if dtype != layout[path][1]:
                    raise UserError(
                        f"{where} has {path} in {dtype}, but this process would make it "
                        f"{layout[path][1]}. Is JAX_ENABLE_X64 set otherwise than for the run?"
                    )

    def _recorded_by_orbax(self, step: int, name: str) -> dict[str, list[Any]]:
        with _without_advice(), ocp.StandardCheckpointer() as checkpointer:
            return _layout(
                checkpointer.metadata(self._orbax_folder / str(step) / name).item_metadata
            )

    def _require_damage(self, step: int, wanted: dict[str, Any], error: Exception) -> None:
        """Raises a UserError unless files that did not restore must be damaged.

        They must be if each of them can be read to its end, and if other arrays of the same shapes
        can be saved and restored in this process.
        """
        where = f"the checkpoint of step {step} in {self._folder}"
        try:
            _read_all(self._folder / str(step))
        except OSError as unreadable:
            raise UserError(
                f"{where} cannot be read, and is left as it is: {unreadable.filename}: "
                f"{(unreadable.strerror or str(unreadable)).lower()}."
            ) from error
        try:
            _round_trip(wanted)
        except Exception:
            raise UserError(
                f"{where} cannot be restored on this machine, nor can a fresh one, so it is left "
                f"as it is: {self._reason(error)}"
            ) from error

    def _validation_accuracy(self, step: int) -> float:
        try:
            metrics = json.loads(
                _metrics_file(self._folder / str(step)).read_text(encoding="utf-8")
            )
            return float(metrics[_METRIC])
        except (OSError, ValueError, KeyError, TypeError):
            return -1.0

    def _quarantine(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way: Orbax saves no step that it has already."""
        _quarantine_folder(self._folder / str(step))
        self._manager.reload()

    def _refuse_unreadable_metrics(self) -> None:
        """Moves away checkpoints with damaged metrics, because Orbax opens no folder with one."""
        for folder in self._folder.glob("[0-9]*"):
            file = _metrics_file(folder)
            try:
                if file.exists():
                    json.loads(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
            except ValueError as error:
                if self._read_only:
                    raise UserError(f"{file} is damaged; move {folder} away.") from error
                logger.warning("The checkpoint of step %s is damaged: %s", folder.name, error)
                _quarantine_folder(folder)

    @contextlib.contextmanager
    def _as_user_error(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # A full disk reaches us as OSError, ValueError or a bare Exception from tensorstore.
            raise UserError(f"{what} in {self._folder}: {self._reason(error)}") from error

    def _reason(self, error: BaseException) -> str:
        return _first_line(error).replace(str(self._orbax_folder), str(self._folder))


@contextlib.contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    """A path to an existing folder that Orbax can use, for as long as the context lasts.

    Raises:
        UserError: if the folder's own path is not plain, and the system gives it no other.
    """
    if _PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        path = _OPEN_FOLDERS / str(descriptor)
        if not path.is_dir():
            raise UserError(
                f"Orbax cannot keep checkpoints in {folder}, because of the characters in its "
                "path. Pass a --workdir with plain letters, digits, dots and dashes."
            )
        yield path
    finally:
        os.close(descriptor)


def _read_all(folder: Path) -> None:
    """Reads every file below a folder, or raises the OSError that stands in the way."""

    def stop(error: OSError) -> None:
        raise error

    for where, _, names in os.walk(folder, onerror=stop):
        for name in names:
            with (Path(where) / name).open("rb") as file:
                while file.read(1 << 20):
                    pass


def _round_trip(wanted: dict[str, Any]) -> None:
    """Saves and restores arrays of zeros of the shapes and dtypes that are wanted."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), wanted)
    with tempfile.TemporaryDirectory() as scratch, ocp.StandardCheckpointer() as checkpointer:
        path = Path(scratch) / "checkpoint"
        checkpointer.save(path, zeros)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path, _on_device(wanted))
        if digest(restored) != digest(zeros):
            raise _DamagedError("zeros did not come back as zeros")


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


def _layout(tree: Any) -> dict[str, list[Any]]:
    """Shape and dtype of each array by its path, like `{"a/b": [[2, 3], "int32"]}`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(leaf.shape),
            str(np.dtype(leaf.dtype)),
        ]
        for path, leaf in leaves
    }


def _accuracy(metrics: Any) -> float:
    return metrics[_METRIC]


def _metrics_file(step_folder: Path) -> Path:
    return step_folder / "metrics" / "metrics"


def _damaged_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.damaged")


def _quarantine_folder(step_folder: Path) -> None:
    damaged = _damaged_folder(step_folder.parent)
    damaged.mkdir(exist_ok=True)
    target = damaged / step_folder.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(step_folder, target)
    logger.warning("It was moved to %s.", target)


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
