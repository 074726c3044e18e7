"""Training: a run, or several at once, from its config to its summary."""

import contextlib
import dataclasses
import logging
import math
import secrets
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from tinyvgg_jax import config as config_lib
from tinyvgg_jax import processes
from tinyvgg_jax.data import Split, fits_on_device
from tinyvgg_jax.devices import find_mesh, num_devices, replicate, require_even_batches
from tinyvgg_jax.errors import DivergedError, InterruptedRunError, UserError, first_line
from tinyvgg_jax.evaluate import Evaluation, evaluate
from tinyvgg_jax.model import count_parameters
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.pipeline import DevicePipeline, StreamPipeline, stack, unstack
from tinyvgg_jax.report.progress import (
    Command,
    TrainingProgress,
    evaluation_progress,
)
from tinyvgg_jax.report.recipe import library_versions
from tinyvgg_jax.report.tensorboard import TensorBoard
from tinyvgg_jax.runs import files, folder, seeds
from tinyvgg_jax.runs.checkpoint import Checkpoints
from tinyvgg_jax.runs.run import (
    Run,
    RunState,
    find_data,
    first_state,
    make_run,
    restore_state,
    with_source,
)
from tinyvgg_jax.signals import stop_signals
from tinyvgg_jax.step import StepSums
from tinyvgg_jax.system import Profile

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """One of the runs that are trained together; mostly the only one."""

    run: Run
    state: RunState
    checkpoints: Checkpoints


def train_and_evaluate(
    config: ConfigDict | Mapping[str, Any], workdir: str | Path
) -> dict[str, Any]:
    """Trains a network, or goes on where an earlier call stopped, and evaluates it.

    All devices of the process share the work, as `config.num_devices` says. After
    `jax.distributed.initialize`, so do the devices of all processes, which each make this call.

    Args:
        config: the fields of `configs/default.py`.
        workdir: receives `config.json`, `dataset.json`, `metrics.jsonl`, `checkpoints/`,
            TensorBoard's events and `summary.json`.

    Returns:
        The summary: accuracies (fractions) and losses (nats) of the last epoch's parameters on
        the train split without augmentation, validation and test; parameters, seconds, device,
        versions. With several seeds the accuracies and losses are means, `seeds` has their
        statistics, and each seed's own summary is in its folder.

    Raises:
        UserError: if something in the config, the data or the folder is not right.
        DivergedError: if the loss is no longer finite. The last checkpoint is kept.
        InterruptedRunError: on SIGINT or SIGTERM, after saving. Calling again goes on from there.
        LostProcessError: if another process of the run is gone.
    """
    config = config_lib.validated(config)
    workdir = local_path(workdir).absolute()
    # A run is float32, or bfloat16, by its config, and its random numbers follow from its seed,
    # however JAX is set. Optax does not follow JAX's strict rules itself.
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.threefry_partitionable(True),
    ):
        require_same_config(config)
        config = processes.first_then_others(lambda: find_data(config))
        try:
            if config.num_seeds > 1:
                return train_seeds(config, workdir)
            return train_together({workdir: config}, Command(workdir, {workdir: ""}))[0]
        except jax.errors.JaxRuntimeError as error:
            if not _has_no_room(error):
                raise
            raise UserError(
                "the device has no room for this run. See what else uses it, or pass a lower "
                "config.batch_size or a smaller network, and another --workdir. "
                f"{first_line(error)}"
            ) from error


def require_same_config(config: ConfigDict) -> None:
    """Checks that all processes have the same config; the data's folders may differ."""
    fields = config_lib.flat(config)
    for name in ("data.data_dir", "data.source_dir"):
        fields.pop(name)
    processes.require_same("configs", fields)


def require_same_data(run: Run) -> None:
    """Checks that all processes have the same examples."""
    if processes.count() > 1:
        contents = {name: split.digest for name, split in run.splits.items()}
        processes.require_same("data", contents)


def train_seeds(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains a config's seeds, each a run in a folder of its own, and summarises them."""
    configs = {workdir / name: one for name, one in seeds.members(config).items()}
    for path, one in ({workdir: config} | configs).items():
        processes.on_first(partial(folder.refuse_another_run, path, one))
    # Making the first run checks the config and the data before anything is written to the folder.
    first, first_config = next(iter(configs.items()))
    # A single CPU is busy with one network already, and convolutions with a kernel for each image
    # of a batch are slow there. Several processes share the batches of one run after another,
    # because all that save a run's arrays must hold them.
    several = _accelerated() or find_mesh(config.num_devices) is not None
    together = several and config.data.pipeline != "stream" and processes.count() == 1
    run = processes.first_then_others(
        lambda: make_run(first_config, first, shares_batches=not together)
    )
    require_same_data(run)
    for path, one in configs.items():
        member = dataclasses.replace(run, config=one, workdir=path)
        processes.on_first(partial(check_folder, member))
        processes.together(partial(with_source, member))
    command = Command(workdir, dict(zip(configs, seeds.titles(config), strict=True)))
    with contextlib.ExitStack() as lock:
        processes.on_first(lambda: lock.enter_context(folder.locked(workdir)))
        processes.on_first(lambda: folder.write_config(workdir, config))
        summaries = None
        if together:
            try:
                summaries = train_together(configs, command, run.splits)
            except jax.errors.JaxRuntimeError as error:
                if not _has_no_room(error):
                    raise
                require_even_batches(config.batch_size, run.mesh)
                logger.warning("The device has no room for all seeds at once; one after another.")
        if summaries is None:
            summaries = [
                train_together({path: one}, command, run.splits)[0] for path, one in configs.items()
            ]
        summary = seeds.summarise(summaries)
        processes.on_first(lambda: files.write_json(workdir / "summary.json", summary))
    return summary


def _has_no_room(error: jax.errors.JaxRuntimeError) -> bool:
    """Tells whether a device had too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _accelerated() -> bool:
    return jax.default_backend() != "cpu"


def check_folder(run: Run) -> None:
    """Checks that a run's folder is new, or that the run can go on there; nothing is written."""
    folder.refuse_other_data(run.workdir, run.config.data.name, run.splits, run.info)
    folder.refuse_fewer_epochs(run.workdir, run.config.num_epochs, run.steps_per_epoch)


def train_together(
    configs: dict[Path, ConfigDict], command: Command, splits: dict[str, Split] | None = None
) -> list[dict[str, Any]]:
    """Trains runs that differ in their seeds only, in one program where their steps are the same.

    Args:
        configs: the config of each run by its folder; usually a single one.
        command: the call that trains them.
        splits: the splits of all runs, if they have been loaded already.

    Returns:
        The summary of each run.
    """
    with processes.reporting_losses(), contextlib.ExitStack() as locks:
        runs: list[Run] = []
        for workdir, config in configs.items():
            runs.append(open_run(config, workdir, splits, locks, len(configs) == 1))
            splits = runs[0].splits
        members = []
        with contextlib.ExitStack() as open_checkpoints:
            for run in runs:
                members.append(restore_member(run, command, open_checkpoints))
            # Their steps differ if an interruption let only some runs save, or if some are new.
            groups: dict[int, list[Member]] = {}
            for member in members:
                groups.setdefault(int(member.state.train.step), []).append(member)
            for group in groups.values():
                train(group, command)
        return [finish(member.run, member.state, command) for member in members]


def open_run(
    config: ConfigDict,
    workdir: Path,
    splits: dict[str, Split] | None,
    locks: contextlib.ExitStack,
    shares_batches: bool,
) -> Run:
    """Makes a run, locks its folder until `locks` is closed, and describes the run there."""
    processes.on_first(lambda: folder.refuse_another_run(workdir, config))
    run = processes.first_then_others(
        lambda: make_run(config, workdir, splits, shares_batches=shares_batches)
    )
    if splits is None:
        require_same_data(run)
    source = processes.together(lambda: with_source(run).source)
    run = dataclasses.replace(run, source=source)
    processes.on_first(lambda: locks.enter_context(folder.locked(workdir)))
    require_shared_folder(workdir)
    processes.on_first(lambda: check_folder(run))
    processes.on_first(lambda: folder.describe(workdir, config, run.splits, run.info))
    return run


def require_shared_folder(workdir: Path) -> None:
    """Checks that a run's folder is the same one in all processes."""
    if processes.count() == 1:
        return
    mark = folder.mark_of(workdir, processes.exchange(secrets.token_hex(8))[0])
    processes.on_first(lambda: folder.leave_mark(mark))
    try:
        processes.together(lambda: folder.require_mark(mark))
    finally:
        processes.on_first(lambda: mark.unlink(missing_ok=True))


def restore_member(run: Run, command: Command, open_checkpoints: contextlib.ExitStack) -> Member:
    """Opens a run's checkpoints and restores its state; a new run begins with its first state."""
    checkpoints = Checkpoints(run.workdir / "checkpoints", mesh=run.mesh)
    open_checkpoints.enter_context(checkpoints)
    state = restore_state(run, checkpoints)
    if state is not None:
        history, step = state.history, int(state.train.step)
        processes.on_first(lambda: folder.write_history(run.workdir, history))
        title = command.titles[run.workdir]
        logger.info("%sGoing on from step %d in %s.", title, step, run.workdir)
    return Member(run, state or first_state(run), checkpoints)


def train(members: list[Member], command: Command) -> None:
    """Trains runs that are at the same step to the end of their last epoch.

    Args:
        members: runs that differ in their seeds only. Their states change.
        command: the call that trains them.
    """
    run, history = members[0].run, members[0].state.history
    num_epochs, batch_size = run.config.num_epochs, run.config.batch_size
    if len(history) == num_epochs:
        return
    runs = [member.run for member in members]
    pipeline, stacked = make_pipeline(runs), are_stacked(runs)
    profiled = run.config.profile and processes.is_first()
    profile = Profile(files.subfolder(run.workdir, "profile") if profiled else None)
    progress = TrainingProgress(runs, command)
    with stop_signals() as received, contextlib.closing(profile), contextlib.ExitStack() as opened:
        stop = processes.Stop(received)
        writers = [processes.on_first(partial(open_records, m, opened)) for m in members]
        for epoch in range(len(history), num_epochs):
            # -- Steps: compiled calls, of one step or of many, until the epoch's end or a signal.
            states = [(member.state.train, member.state.sums) for member in members]
            state, sums = stack(states, run.mesh) if stacked else states[0]
            first_step = int(members[0].state.train.step) - epoch * run.steps_per_epoch
            start = time.perf_counter()
            with progress.epoch(epoch, first_step):
                for result in pipeline.epoch(state, sums, epoch, first_step):
                    state, sums = result.state, result.sums
                    # Fetching the sums waits for the device, so only as often as people look.
                    if progress.is_due():
                        # Several processes look for a diverged loss at the end of the epoch only,
                        # because all of them must stop at the same step.
                        fetch_now = fetch_finite if processes.count() == 1 else fetch
                        progress.show(result.step, fetch_now(sums, members))
                    profile.after_call(result.done)
                    if stop.after_call():
                        break
                fetched = fetch_finite(sums, members)
                progress.measure(int(fetched.examples.min()) // batch_size)

            # -- Each run takes its slice of the stacked state and its share of the time.
            seconds = (time.perf_counter() - start) / len(members)
            own_states = unstack((state, sums), len(members)) if stacked else [(state, sums)]
            for member, own in zip(members, own_states, strict=True):
                member.state.train, member.state.sums = own
                member.state.seconds += seconds

            # -- A signal within the epoch: save, and leave the rest for the next call.
            signal = stop.signal()
            if signal and fetched.examples.min() < run.steps_per_epoch * batch_size:
                for member in members:
                    member.state.save(member.checkpoints, None)
                raise interrupted(members, command, signal)

            # -- Validation, checkpoint, log. A signal is heeded when the epoch is saved, after the
            # last epoch too: the evaluation of the splits, and other seeds, would take their time.
            for member, writer in zip(members, writers, strict=True):
                record = end_epoch(member.run, member.state, command)
                member.state.save(member.checkpoints, record["validation_accuracy"])
                processes.on_first(partial(write_records, member, writer))
            logger.info("%s", progress.epoch_line([m.state.history[-1] for m in members]))
            signal = stop.signal()
            if signal:
                raise interrupted(members, command, signal)


def open_records(member: Member, opened: contextlib.ExitStack) -> TensorBoard:
    """Opens TensorBoard's events of a run that is trained on, until `opened` is closed."""
    # An earlier summary is out of date.
    folder.remove_file(member.run.workdir / "summary.json")
    return opened.enter_context(TensorBoard(member.run.workdir, member.state.history))


def write_records(member: Member, writer: TensorBoard | None) -> None:
    """Writes the records of the epochs so far to `metrics.jsonl`, and the last one as events."""
    assert writer is not None
    folder.write_history(member.run.workdir, member.state.history)
    writer.add(member.state.history[-1])


def are_stacked(runs: list[Run]) -> bool:
    """Tells whether runs have their arrays stacked, and are spread over the devices.

    Several are. So is a single one whose batches the devices cannot share evenly, which is the last
    of several seeds.
    """
    return len(runs) > 1 or runs[0].config.batch_size % num_devices(runs[0].mesh) != 0


def make_pipeline(runs: list[Run]) -> StreamPipeline | DevicePipeline:
    """Chooses how the steps of an epoch run: on images on the device, or on batches from the host.

    Args:
        runs: runs that differ in their seeds only. Stacked ones need their images on the device;
            any other shares each batch among the devices.
    """
    run, mesh, stacked = runs[0], runs[0].mesh, are_stacked(runs)
    config, split = run.config, run.splits["train"]
    keys = stack([run.keys for run in runs], mesh) if stacked else run.keys
    step = run.train_step(shared=mesh is not None and not stacked)
    wanted = config.data.pipeline
    if wanted == "auto":
        # Processes must run the same program, although their devices may have different memory.
        wanted = "device" if all(processes.exchange(fits_on_device(split))) else "stream"
    if stacked or wanted == "device":
        return DevicePipeline(step, split, config.batch_size, keys, mesh=mesh)
    return StreamPipeline(step, split, config.batch_size, keys, mesh)


def fetch(sums: StepSums, members: list[Member]) -> StepSums:
    """Fetches sums from the device."""
    fetched: StepSums = jax.device_get(sums)
    if fetched.loss.ndim:
        # Runs may have been repeated, so that each device has the same number of them.
        fetched = StepSums(*(leaf[: len(members)] for leaf in fetched))
    return fetched


def fetch_finite(sums: StepSums, members: list[Member]) -> StepSums:
    """Fetches sums from the device; raises a DivergedError if a loss is not finite."""
    fetched = fetch(sums, members)
    for member, step in zip(members, fetched.diverged_at.reshape(-1), strict=True):
        if step:
            raise diverged("training", int(step), member.run)
    return fetched


def diverged(which: str, step: int, run: Run) -> DivergedError:
    """Makes the error of a loss that is not finite."""
    return DivergedError(
        f"the {which} loss is not a finite number at step {step}. What was saved before is "
        f"kept in {run.workdir}. Try a lower --config.learning_rate in another --workdir.",
        step,
    )


def interrupted(members: list[Member], command: Command, signal_number: int) -> InterruptedRunError:
    """Makes the error of a signal after which everything is saved."""
    title, step = command.title([m.run for m in members]), int(members[0].state.train.step)
    return InterruptedRunError(
        f"{title}interrupted at step {step}; everything is saved in {command.workdir}. "
        "Run the same command again to go on from there.",
        signal_number,
    )


def end_epoch(run: Run, state: RunState, command: Command) -> dict[str, Any]:
    """Validates, adds the epoch's record to the history and begins the next epoch's sums."""
    sums, step = jax.device_get(state.sums), int(state.train.step)
    validation = evaluate_split(run, state, "validation", command)
    if not math.isfinite(validation.loss):
        raise diverged("validation", step, run)
    record = {
        "epoch": len(state.history) + 1,
        "step": step,
        "learning_rate": float(run.schedule(step - 1)),
        "train_loss": float(sums.loss) / int(sums.examples),
        "train_accuracy": int(sums.correct) / int(sums.examples),
        "validation_loss": validation.mean_loss,
        "validation_accuracy": validation.accuracy,
        "seconds": state.seconds,
        "images_per_second": int(sums.examples) / state.seconds,
    }
    state.history.append(record)
    state.sums, state.seconds = replicate(StepSums.zero(), run.mesh), 0.0
    return record


def evaluate_split(run: Run, state: RunState, name: str, command: Command) -> Evaluation:
    """Evaluates a run's parameters on a split, shows the progress and measures the speed."""
    split, start = run.splits[name], time.perf_counter()
    title = f"{command.titles[run.workdir]}evaluating {name}"
    with evaluation_progress(title, len(split)) as on_progress:
        params = state.train.evaluated
        result = evaluate(run.model, params, split, on_progress=on_progress, mesh=run.mesh)
    command.pace.evaluation = (time.perf_counter() - start) / len(split)
    return result


def device_name(run: Run) -> str:
    """Names the devices that a run is trained on, like "4 x NVIDIA H100"."""
    count, kind = num_devices(run.mesh), jax.devices()[0].device_kind
    return kind if count == 1 else f"{count} x {kind}"


def finish(run: Run, state: RunState, command: Command) -> dict[str, Any]:
    """Evaluates the last parameters on every split and writes summary.json, unless it is there."""
    step, title = int(state.train.step), command.titles[run.workdir]
    summary = processes.exchange(processes.on_first(lambda: folder.read_summary(run.workdir)))[0]
    if summary is not None and summary["step"] == step:
        logger.info("%sThis run is finished already.", title)
        return summary
    logger.info("%sEvaluating ...", title)
    summary, guessing_losses = {}, {}
    for name in run.splits:
        result = evaluate_split(run, state, name, command)
        summary[f"{name}_accuracy"] = result.accuracy
        summary[f"{name}_loss"] = result.mean_loss
        guessing_losses[name] = result.guessing_loss
    summary |= {
        "dataset": run.config.data.name,
        "step": step,
        "parameters": count_parameters(state.train.params),
        "seconds": sum(record["seconds"] for record in state.history),
        "device": device_name(run),
        "versions": library_versions(),
    }
    processes.on_first(lambda: files.write_json(run.workdir / "summary.json", summary))
    # Written so that it warns of a loss that is not a number, too.
    if not summary["train_loss"] < guessing_losses["train"]:
        logger.warning(
            "%sThe train loss, %.4g, is no better than that of guessing, %.4g: the training has "
            "diverged, or hardly begun. Try a lower --config.learning_rate in another --workdir.",
            title,
            summary["train_loss"],
            guessing_losses["train"],
        )
    return summary
