"""Checkpoints: Orbax writes them, a SHA-256 verifies them, and the newest intact one is restored.

A checkpoint has three items: `params`, which can be restored alone; `opt_state`; and `progress`, a
JSON object with everything else that a run needs to continue, with the validation accuracy, and
with the SHA-256 digests of all three. The digests are there because Orbax restores bytes that
flipped on a disk without an error.

A checkpoint is moved away only if it is proven to be damaged: its digest does not match, or its
files do not restore although all of them can be read and a fresh checkpoint does restore on this
machine. Any other failure, like a missing permission or another dtype, raises an error and moves
nothing.
"""

import contextlib
import copy
import json
import logging
import operator
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import (
    PolicyCheckpointInfo,
    PreservationContext,
    PreservationPolicy,
)

from tinyvgg_jax import processes
from tinyvgg_jax.devices import REPLICATED
from tinyvgg_jax.errors import AgreedError, UserError, first_line, hide_leftovers
from tinyvgg_jax.paths import open_regular
from tinyvgg_jax.runs.files import digest_json, writing_to
from tinyvgg_jax.runs.folder import distinct_sizes
from tinyvgg_jax.runs.integrity import (
    DamagedError,
    Layout,
    check_layout,
    digest,
    layout_of,
    plain_path,
    read_all_files,
    require_regular_files,
)

logger = logging.getLogger(__name__)

_ACCURACY = "validation_accuracy"
_LATEST_KEPT = 2
# An item of earlier versions.
_METRICS = "metrics"
# A file of Orbax in a checkpoint, with the times of its writing.
_TIMES = "_CHECKPOINT_METADATA"
# Entries of `progress` that are the checkpoint's own, and not the run's.
_OWN_ENTRIES = ("shapes", "arrays", _ACCURACY)


class Restored(NamedTuple):
    """The content of a checkpoint.

    Attributes:
        step: number of optimizer steps taken.
        params: tree of arrays.
        opt_state: tree of arrays; None if only the parameters were restored.
        progress: what `Checkpoints.save` was given.
    """

    step: int
    params: Any
    opt_state: Any
    progress: dict[str, Any]


class _Kept(PreservationPolicy):
    """Policy that keeps the latest checkpoints, the best one, and those of unknown accuracy."""

    def __init__(self, accuracies: dict[int, float | None]):
        """Makes the policy.

        Args:
            accuracies: validation accuracies by step, to which steps may be added later.
        """
        self._accuracies = accuracies

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        """Tells for each checkpoint, the oldest first, whether it is kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-_LATEST_KEPT:], *_best_first(steps, self._accuracies)[:1]}
        return [step in kept or step not in self._accuracies for step in steps]


class Checkpoints:
    """The checkpoints of one run: the latest two, and the best by validation accuracy.

    An instance is a context manager; its exit waits until the last save is on disk.
    """

    def __init__(self, folder: Path, *, read_only: bool = False, mesh: Mesh | None = None):
        """Opens a folder of checkpoints.

        Args:
            folder: the folder; it is created if it does not exist.
            read_only: whether to restore only; then nothing is written or moved.
            mesh: the devices that each get all arrays; None for the first device. It need not be
                the mesh that the arrays were saved from.

        Raises:
            UserError: if the folder cannot be opened.
        """
        # Before anything is read, because what fails leaves them at once.
        hide_leftovers()
        self._folder = folder.absolute()
        self._read_only = read_only
        self._mesh = mesh
        # The first save is read back at once, so that a run that cannot be restored stops early.
        self._read_back = False
        # JAX finds its devices here, so that a missing device is not reported as a fault of the
        # checkpoints below.
        jax.local_devices()
        try:
            with contextlib.ExitStack() as resources:
                self._open(resources)
                self._resources = resources.pop_all()
        except UserError:
            raise
        except Exception as error:
            # Orbax passes on any exception of its JSON parser and of the file system.
            raise UserError(
                f"cannot open the checkpoints in {folder}: {first_line(error)}"
            ) from error

    def _open(self, resources: contextlib.ExitStack) -> None:
        """Makes Orbax's reader, and its manager of a folder that is written to."""
        if not self._read_only:
            processes.on_first(self._make_ready)
        self._orbax_folder = resources.enter_context(plain_path(self._folder))
        self._reader = resources.enter_context(ocp.Checkpointer(ocp.CompositeCheckpointHandler()))
        # A step whose accuracy cannot be known now is missing; None stands for the middle of an
        # epoch.
        self._accuracies = {
            step: _accuracy(step, progress)
            for step in self.steps()
            if (progress := self._intact_progress(step)) is not None
        }
        if self._read_only:
            return
        options = ocp.CheckpointManagerOptions(preservation_policy=_Kept(self._accuracies))
        self._manager = ocp.CheckpointManager(self._orbax_folder, options=options)

    def _make_ready(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        _clear_the_way(self._folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: Any, error: BaseException | None, *__: Any) -> None:
        if error is not None and processes.count() > 1 and not processes.is_agreed(error):
            # Orbax would wait for the other processes, which know nothing of this error.
            return
        with self._resources, self._as_user_error("cannot finish saving a checkpoint"):
            if not self._read_only:
                self._manager.close()

    def steps(self) -> list[int]:
        """Lists the steps that have a checkpoint, in ascending order."""
        # A checkpoint gets its name when it is whole. A network file system may show it later to
        # some processes, so all go by the first one.
        names = [path.name for path in self._folder.iterdir() if path.is_dir()]
        names = processes.exchange(names)[0]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        progress: dict[str, Any],
        validation_accuracy: float | None,
    ) -> None:
        """Starts to save a checkpoint; the arrays may be donated as soon as this returns.

        Args:
            step: number of optimizer steps taken.
            params: tree of arrays.
            opt_state: tree of arrays.
            progress: what else the run needs to continue, JSON-serialisable.
            validation_accuracy: a fraction; None for a checkpoint in the middle of an epoch.

        Raises:
            UserError: if this checkpoint, or the one before it, could not be written.
        """
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
        processes.on_first(lambda: self._require_room(size))
        arrays = {"params": params, "opt_state": opt_state}
        # Orbax writes in the background, when the caller may have appended to its lists already.
        progress = {
            **copy.deepcopy(progress),
            "shapes": {path: shape for path, (shape, _) in layout_of(params).items()},
            "arrays": {name: layout_of(tree) for name, tree in arrays.items()},
            _ACCURACY: None if validation_accuracy is None else float(validation_accuracy),
        }
        digests = {name: digest(tree) for name, tree in arrays.items()}
        digests["progress"] = digest_json(progress)
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            progress=ocp.args.JsonSave({**progress, "digests": digests}),
        )
        with self._as_user_error("cannot save a checkpoint"):
            self._accuracies[step] = progress[_ACCURACY]
            self._manager.save(step, args=items, force=True)
        if not self._read_back:
            self.wait()
            with self._as_user_error("what was saved cannot be read back"):
                self._restore(step, arrays)
            self._read_back = True

    def _require_room(self, size: int) -> None:
        """Checks, before a partial write, that the disk has room for arrays of `size` bytes."""
        with self._as_user_error("cannot save a checkpoint"):
            free = shutil.disk_usage(self._folder).free
        # Twice the size leaves room for Orbax's metadata.
        if free < 2 * size:
            has, needs = distinct_sizes(free, 2 * size)
            raise UserError(
                f"cannot save a checkpoint in {self._folder}: {has} free, "
                f"{needs} needed. What was saved before is kept."
            )

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        with self._as_user_error("cannot finish saving a checkpoint"):
            self._manager.wait_until_finished()

    def restore_newest(self, params: Any, opt_state: Any) -> Restored | None:
        """Restores the newest intact checkpoint and moves damaged newer ones away.

        Args:
            params: tree of `jax.ShapeDtypeStruct`.
            opt_state: tree of `jax.ShapeDtypeStruct`.

        Returns:
            The checkpoint; None if none was ever saved.

        Raises:
            UserError: if all checkpoints are damaged, or the newest one does not fit `params` and
                `opt_state`.
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
        """Restores the parameters without the optimizer state.

        Args:
            step: number of optimizer steps, "latest", or "best" (by validation accuracy). If the
                latest or the best checkpoint is damaged, a warning is logged and the next one is
                restored.
            params: tree of `jax.ShapeDtypeStruct`.

        Returns:
            The checkpoint; its `opt_state` is None.

        Raises:
            UserError: if there is no such checkpoint, or it is damaged.
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
            candidates = _best_first(steps, self._accuracies)
            for unknown in set(steps) - self._accuracies.keys():
                # It may be the best one: restoring it logs, or raises, why that is not known.
                self._restore_if_intact(unknown, params, None)
        for candidate in candidates:
            restored = self._restore_if_intact(candidate, params, None)
            if restored is not None:
                return restored
        raise UserError(f"the checkpoint of step {candidates[0]} in {self._folder} is damaged.")

    def _restore_if_intact(self, step: int, params: Any, opt_state: Any) -> Restored | None:
        """Restores a checkpoint; None if it is damaged, for any of the processes."""
        restored = processes.together(lambda: self._restore_or_explain(step, params, opt_state))
        intact = processes.exchange(restored is not None)
        if all(intact) or not any(intact):
            return restored
        raise AgreedError(
            f"{self._name(step)} cannot be restored by process {intact.index(False)}, and is "
            "left as it is, since others can."
        )

    def _restore_or_explain(self, step: int, params: Any, opt_state: Any) -> Restored | None:
        """Restores a checkpoint; None, with a warning, if it is damaged."""
        wanted = {"params": params} | ({} if opt_state is None else {"opt_state": opt_state})
        try:
            return self._restore(step, wanted)
        except UserError:
            raise
        except Exception as error:
            # A damaged file raises one of a dozen exception types, plain Exception included.
            if not isinstance(error, DamagedError):
                self._require_damage(step, wanted, error)
            logger.info("Reading the checkpoint of step %d again: %s", step, self._reason(error))
        # A network file system fails now and then, and damage is still there the second time.
        try:
            return self._restore(step, wanted)
        except UserError:
            raise
        except Exception as error:
            logger.warning("The checkpoint of step %d is damaged: %s", step, self._reason(error))
            return None

    def _restore(self, step: int, wanted: dict[str, Any]) -> Restored:
        """Restores items of a checkpoint and compares them with their digests.

        Args:
            step: number of optimizer steps.
            wanted: trees of `jax.ShapeDtypeStruct` by the items' names; "params" is one of them.

        Raises:
            DamagedError: if a digest does not match.
            UserError: if the checkpoint holds other arrays.
        """
        progress, digests = self._read_progress(step)
        for name, tree in wanted.items():
            # Earlier versions recorded no layout; Orbax's own is not covered by a digest.
            stored_layout = progress.get("arrays", {}).get(name) or self._orbax_layout(step, name)
            check_layout(self._name(step), name, layout_of(tree), stored_layout)
        items = {
            name: ocp.args.StandardRestore(_placed(tree, self._mesh))
            for name, tree in wanted.items()
        }
        content = self._reader.restore(
            self._orbax_folder / str(step), args=ocp.args.Composite(**items)
        )
        if any(digest(content[name]) != digests[name] for name in wanted):
            raise DamagedError("its content does not match its digest")
        for name in _OWN_ENTRIES:
            progress.pop(name, None)
        return Restored(step, content["params"], content.get("opt_state"), progress)

    def _read_progress(self, step: int) -> tuple[dict[str, Any], dict[str, str]]:
        """Reads a checkpoint's progress and its digests; raises if it is damaged."""
        require_regular_files(self._folder / str(step), besides=_METRICS)
        stored = self._reader.restore(
            self._orbax_folder / str(step),
            args=ocp.args.Composite(progress=ocp.args.JsonRestore()),
        )
        progress = dict(stored["progress"])
        digests = progress.pop("digests")
        if digests["progress"] != digest_json(progress):
            raise DamagedError("its content does not match its digest")
        return progress, digests

    def _intact_progress(self, step: int) -> dict[str, Any] | None:
        """Reads a checkpoint's progress; None if that fails, which restoring it will explain."""
        try:
            return self._read_progress(step)[0]
        except Exception:
            # A damaged file raises one of a dozen exception types, plain Exception included.
            return None

    def _name(self, step: int) -> str:
        return f"the checkpoint of step {step} in {self._folder}"

    def _orbax_layout(self, step: int, name: str) -> Layout:
        """Reads the layout of an item from Orbax's metadata."""
        with _without_advice(), ocp.StandardCheckpointer() as checkpointer:
            return layout_of(
                checkpointer.metadata(self._orbax_folder / str(step) / name).item_metadata
            )

    def _require_damage(self, step: int, wanted: dict[str, Any], error: Exception) -> None:
        """Raises a UserError unless damage is the only explanation for a failed restore.

        That is so if every file of the checkpoint can be read to its end, and if this process can
        save and restore other arrays of the same shapes and dtypes.
        """
        where = self._name(step)
        try:
            read_all_files(self._folder / str(step))
        except OSError as unreadable:
            raise UserError(
                f"{where} cannot be read, and is left as it is: {unreadable.filename}: "
                f"{(unreadable.strerror or str(unreadable)).lower()}."
            ) from error
        if processes.count() > 1:
            # They could not save and restore apart from each other. It counts as damage if the
            # others cannot restore it either.
            return
        try:
            _round_trip(wanted)
        except Exception:
            raise UserError(
                f"{where} cannot be restored on this machine, nor can a fresh one, so it is left "
                f"as it is: {self._reason(error)}"
            ) from error

    def _quarantine(self, step: int) -> None:
        """Moves a damaged checkpoint away, because Orbax refuses to save a step that exists."""
        processes.on_first(lambda: _quarantine_folder(self._folder / str(step)))
        self._manager.reload()

    @contextlib.contextmanager
    def _as_user_error(self, what: str) -> Iterator[None]:
        """Turns any exception into a UserError that begins with what failed."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # TensorStore reports a full disk as OSError, ValueError or a bare Exception.
            raise UserError(f"{what} in {self._folder}: {self._reason(error)}") from error

    def _reason(self, error: BaseException) -> str:
        """Shortens an error to one line, with the folder's own path instead of Orbax's."""
        reason = first_line(error).partition(" See full TensorStore details")[0]
        return reason.replace(str(self._orbax_folder), str(self._folder))


def _round_trip(wanted: dict[str, Any]) -> None:
    """Saves and restores zeros of the given shapes and dtypes, in a scratch folder.

    Args:
        wanted: tree of `jax.ShapeDtypeStruct`.

    Raises:
        Exception: if that fails, of any type.
    """
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), wanted)
    with tempfile.TemporaryDirectory() as scratch, ocp.StandardCheckpointer() as checkpointer:
        path = Path(scratch) / "checkpoint"
        checkpointer.save(path, zeros)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path, _placed(wanted, None))
        if digest(restored) != digest(zeros):
            raise DamagedError("zeros did not come back as zeros")


def _placed(tree: Any, mesh: Mesh | None) -> Any:
    """Tells Orbax to restore a tree of arrays onto every device of a mesh, or the first device."""
    sharding: jax.sharding.Sharding
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    else:
        sharding = jax.sharding.NamedSharding(mesh, REPLICATED)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _accuracy(step: int, progress: dict[str, Any]) -> float | None:
    """Finds a checkpoint's validation accuracy; None for one in the middle of an epoch."""
    if _ACCURACY in progress:
        return cast(float | None, progress[_ACCURACY])
    # Earlier versions recorded it in the history only.
    last = (progress.get("history") or [{}])[-1]
    return cast(float, last[_ACCURACY]) if last.get("step") == step else None


def _best_first(steps: Sequence[int], accuracies: dict[int, float | None]) -> list[int]:
    """Sorts steps by validation accuracy, later ones first if equal, those without one last."""

    def rank(step: int) -> tuple[float, int]:
        accuracy = accuracies.get(step)
        return (-1.0 if accuracy is None else accuracy, step)

    return sorted(steps, key=rank, reverse=True)


def _clear_the_way(folder: Path) -> None:
    """Removes what would keep Orbax from opening a folder, and what nothing here reads.

    These are a checkpoint's times, and metrics that earlier versions wrote. Neither has a digest.

    Raises:
        UserError: if such a file cannot be read, or a file is in the way of a checkpoint.
    """
    for step_folder in folder.glob("[0-9]*"):
        if not step_folder.is_dir():
            raise UserError(f"{step_folder} is in the way of a checkpoint: it is no folder.")
        metrics, times = step_folder / _METRICS / _METRICS, step_folder / _TIMES
        if _is_unusable(metrics):
            shutil.rmtree(metrics.parent)
        # Orbax does without the file, and passes over a folder in its place.
        if not times.is_dir() and _is_unusable(times):
            times.unlink()


def _is_unusable(path: Path) -> bool:
    """Tells, with a warning, whether a file is there and holds no JSON object."""
    try:
        with open_regular(path) as file:
            if isinstance(json.loads(file.read()), dict):
                return False
        reason: object = "it holds no JSON object"
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = error
    logger.warning("Removed %s, which is damaged and not needed: %s", path, reason)
    return True


def _damaged_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.damaged")


def _quarantine_folder(step_folder: Path) -> None:
    """Moves a checkpoint's folder to `checkpoints.damaged`, so that nothing is lost."""
    damaged = _damaged_folder(step_folder.parent)
    target, number = damaged / step_folder.name, 1
    while target.exists():
        number += 1
        target = damaged / f"{step_folder.name}.{number}"
    with writing_to(damaged):
        damaged.mkdir(exist_ok=True)
        # Renaming moves all of it or nothing.
        step_folder.rename(target)
    logger.warning("It was moved to %s.", target)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Silences Orbax's warnings about the consequences of `read_only`, which is intended here."""
    library = logging.getLogger("absl")
    before = library.level
    library.setLevel(max(logging.ERROR, library.getEffectiveLevel()))
    try:
        yield
    finally:
        library.setLevel(before)
