"""A run's folder: what may go on in it, and the messages about its files."""

import errno
import json
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX import RecordWriter
from test_train import content_of

from tinyvgg_jax import InterruptedRunError, UserError, restore, train, train_and_evaluate
from tinyvgg_jax.pipeline import DevicePipeline
from tinyvgg_jax.report.evaluation import evaluate_checkpoint, evaluate_each_seed
from tinyvgg_jax.report.tensorboard import TensorBoard
from tinyvgg_jax.runs import folder


class Killed(BaseException):
    """Stands for the death of the process."""


def kill(*_: Any) -> None:
    raise Killed


def interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends SIGTERM to this process after so many calls of a pipeline."""
    original, left = DevicePipeline.epoch, [calls]

    def epoch(*arguments: Any) -> Any:
        for result in original(*arguments):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGTERM)
            yield result

    monkeypatch.setattr(DevicePipeline, "epoch", epoch)


def with_everything(config: ConfigDict) -> ConfigDict:
    """Turns on every option that adds to the state, and many that draw random numbers."""
    config.optimizer, config.nesterov, config.warmup_epochs = "muon", True, 0.5
    config.weight_decay, config.gradient_clipping, config.label_smoothing = 0.01, 5.0, 0.1
    config.ema_decay, config.model.dropout = 0.9, 0.1
    config.augment.update(alternating_flip=True, shift_pixels=1, cutout_size=2, mixup_alpha=0.1)
    return config


def files_of(workdir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def scalars_of(workdir: Path, tag: str) -> list[tuple[int, float]]:
    """Reads the steps and values of a tag from TensorBoard's event files, in their order."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            found += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    return found


# More epochs


@pytest.mark.parametrize(
    ("everything", "first", "then"),
    [
        (False, "device", "device"),
        (False, "stream", "stream"),
        (False, "stream", "device"),
        pytest.param(True, "device", "stream", marks=pytest.mark.slow),
    ],
)
def test_two_epochs_and_then_four_are_four_epochs_bit_for_bit(
    config: ConfigDict, tmp_path: Path, everything: bool, first: str, then: str
) -> None:
    config = with_everything(config) if everything else config
    config.num_epochs, config.data.pipeline = 2, first
    before = train_and_evaluate(config, tmp_path / "in two")
    config.num_epochs, config.data.pipeline = 4, then
    after = train_and_evaluate(config, tmp_path / "in two")
    train_and_evaluate(config, tmp_path / "at once")
    assert (before["step"], after["step"]) == (16, 32)
    content = content_of(tmp_path / "in two")
    assert content == content_of(tmp_path / "at once")
    scalars = scalars_of(tmp_path / "in two", "loss/train")
    for (step, value), record in zip(scalars, content["records"], strict=True):
        assert step == record["step"] and value == pytest.approx(record["train_loss"])


@pytest.mark.parametrize("together", [False, True])
def test_several_seeds_go_on_with_more_epochs_bit_for_bit(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.setattr(train, "_accelerated", lambda: together)
    config.num_seeds, config.num_epochs, config.ema_decay = 2, 1, 0.9
    train_and_evaluate(config, tmp_path / "in two")
    config.num_epochs = 2
    in_two = train_and_evaluate(config, tmp_path / "in two")
    at_once = train_and_evaluate(config, tmp_path / "at once")
    assert in_two | {"seconds": 0} == at_once | {"seconds": 0}
    assert json.loads((tmp_path / "in two" / "config.json").read_text())["num_epochs"] == 2
    for seed in (0, 1):
        ours, theirs = (tmp_path / name / f"seed_{seed}" for name in ("in two", "at once"))
        assert content_of(ours) == content_of(theirs)


def test_a_run_whose_schedule_depends_on_its_epochs_cannot_go_on_and_is_told_why(
    config: ConfigDict, tmp_path: Path
) -> None:
    config.num_epochs, config.schedule = 1, "cosine"
    train_and_evaluate(config, tmp_path)
    before = files_of(tmp_path)
    config.num_epochs = 2
    with pytest.raises(UserError, match=r"num_epochs=1, .* of num_epochs=2: with .* 'cosine'"):
        train_and_evaluate(config, tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(("calls", "epoch"), [(16, 2), (17, 3)])
def test_a_run_is_not_cut_short_of_what_it_has_been_trained_for(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: int,
    epoch: int,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(calls, patch)
        with pytest.raises(InterruptedRunError):
            train_and_evaluate(config, tmp_path)
    before = files_of(tmp_path)
    config.num_epochs = epoch - 1
    with pytest.raises(
        UserError, match=rf"reached epoch {epoch} already.*num_epochs={epoch} or more"
    ):
        train_and_evaluate(config, tmp_path)
    # The lock is taken before.
    assert {path for path, time in files_of(tmp_path).items() if before[path] != time} <= {
        tmp_path / ".lock"
    }
    # An unfinished run may end sooner than it was meant to.
    config.num_epochs = epoch
    summary = train_and_evaluate(config, tmp_path)
    assert summary["step"] == 8 * epoch
    train_and_evaluate(config, tmp_path / "at once")
    assert content_of(tmp_path)["records"] == content_of(tmp_path / "at once")["records"]


def test_seeds_are_not_cut_short_and_their_folder_is_untouched(
    config: ConfigDict, tmp_path: Path
) -> None:
    config.num_seeds, config.num_epochs = 2, 2
    train_and_evaluate(config, tmp_path)
    before = files_of(tmp_path)
    config.num_epochs = 1
    with pytest.raises(UserError, match=r"seed_0 holds a run that has reached epoch 2 already"):
        train_and_evaluate(config, tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("moment", ["remove_file", "write_json", "write_history"])
@pytest.mark.parametrize("num_epochs", [1, 2])
def test_killed_before_the_first_new_checkpoint_the_old_and_the_new_command_go_on(
    config: ConfigDict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    num_epochs: int,
) -> None:
    """Killed when the summary is to be removed, the config to be written, or it is written."""
    original = getattr(folder, moment)

    def die(path: Path, *rest: Any) -> None:
        # This file stays as it was, so writing it is no moment of its own.
        if path.name != "dataset.json":
            raise Killed
        original(path, *rest)

    config.num_epochs = 1
    before = train_and_evaluate(config, tmp_path / "cut")
    config.num_epochs = 2
    with monkeypatch.context() as patch:
        patch.setattr(folder, moment, die)
        with pytest.raises(Killed):
            train_and_evaluate(config, tmp_path / "cut")
    assert (tmp_path / "cut" / "summary.json").exists() == (moment == "remove_file")
    evaluated = evaluate_checkpoint(tmp_path / "cut", "validation").result
    assert evaluated.accuracy == before["validation_accuracy"]
    config.num_epochs = num_epochs
    train_and_evaluate(config, tmp_path / "cut")
    train_and_evaluate(config, tmp_path / "at once")
    assert content_of(tmp_path / "cut") == content_of(tmp_path / "at once")


# More seeds


@pytest.mark.parametrize("together", [False, True])
def test_more_seeds_go_on_and_the_summary_covers_all(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    config.num_epochs, config.num_seeds = 1, 2
    before = train_and_evaluate(config, tmp_path / "in two")
    kept = files_of(tmp_path / "in two" / "seed_1" / "checkpoints")
    monkeypatch.setattr(train, "_accelerated", lambda: together)
    config.num_seeds = 4
    after = train_and_evaluate(config, tmp_path / "in two")
    assert files_of(tmp_path / "in two" / "seed_1" / "checkpoints") == kept
    assert after["num_seeds"] == 4
    values = after["seeds"]["test_loss"]["values"]
    assert values[:2] == before["seeds"]["test_loss"]["values"] and len(values) == 4
    assert len(evaluate_each_seed(tmp_path / "in two")) == 4
    if not together:
        config.seed, config.num_seeds = 3, 1
        train_and_evaluate(config, tmp_path / "alone")
        jax.tree.map(
            np.testing.assert_array_equal,
            restore(tmp_path / "in two" / "seed_3")[1],
            restore(tmp_path / "alone")[1],
        )


def test_killed_before_a_new_seed_begins_both_commands_go_on(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.num_epochs, config.num_seeds = 1, 2
    before = train_and_evaluate(config, tmp_path)
    config.num_seeds = 3
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_together", kill)
        with pytest.raises(Killed):
            train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(UserError, match=r"2 of its 3 seeds have begun\. Run its command again"):
        evaluate_each_seed(tmp_path)
    config.num_seeds = 2
    assert train_and_evaluate(config, tmp_path) == before
    assert len(evaluate_each_seed(tmp_path)) == 2
    config.num_seeds = 3
    assert train_and_evaluate(config, tmp_path)["num_seeds"] == 3


def test_seeds_that_have_begun_are_not_left_out(config: ConfigDict, tmp_path: Path) -> None:
    config.num_epochs, config.num_seeds = 1, 3
    train_and_evaluate(config, tmp_path)
    before = files_of(tmp_path)
    config.num_seeds = 2
    with pytest.raises(UserError, match=r"run of seed 2 already.*Pass --config.num_seeds=3 or"):
        train_and_evaluate(config, tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [(1, 2, "holds a single run, not runs of 2 seeds"), (2, 1, "holds runs of 2 seeds, not a")],
)
def test_a_single_run_and_several_seeds_do_not_share_a_folder(
    config: ConfigDict, tmp_path: Path, first: int, then: int, message: str
) -> None:
    config.num_epochs, config.num_seeds = 1, first
    train_and_evaluate(config, tmp_path)
    before = files_of(tmp_path)
    config.num_seeds = then
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, tmp_path)
    assert files_of(tmp_path) == before


# Messages


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (1_200_000_000, 3_400_000_000, ("1.2 GB", "3.4 GB")),
        (0, 3_400_000_000, ("0.0 GB", "3.4 GB")),
        (1_200_000_000, 1_201_000_000, ("1,200.0 MB", "1,201.0 MB")),
        (20_480, 41_984, ("20.5 kB", "42.0 kB")),
        (12, 345, ("12 bytes", "345 bytes")),
        (1001, 1002, ("1,001 bytes", "1,002 bytes")),
    ],
)
def test_sizes_are_shown_in_a_unit_in_which_they_differ(
    first: int, second: int, shown: tuple[str, str]
) -> None:
    assert folder.distinct_sizes(first, second) == shown
    assert folder.distinct_sizes(second, first) == shown[::-1]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metrics.jsonl", lambda workdir: folder.write_history(workdir, [])),
        ("summary.json", lambda workdir: folder.remove_file(workdir / "summary.json")),
        (".lock", lambda workdir: folder.locked(workdir).__enter__()),
        ("tensorboard", lambda workdir: TensorBoard(workdir, [])),
    ],
)
def test_what_cannot_be_written_is_named(
    tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    """A file is in the way of a folder, or the other way round."""
    if name == "tensorboard":
        (tmp_path / name).touch()
    else:
        (tmp_path / name / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"cannot write to {tmp_path / name}: "):
        write(tmp_path)


def test_a_full_disk_at_tensorboards_end_does_not_hide_an_earlier_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = RecordWriter.close

    def full(writer: Any) -> None:
        close(writer)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "close", full)
    with pytest.raises(UserError, match="tensorboard: No space"), TensorBoard(tmp_path, []):
        pass
    with pytest.raises(KeyError, match="earlier"), TensorBoard(tmp_path, []):
        raise KeyError("earlier")


def test_a_description_that_cannot_be_read_is_named(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path / 'dataset.json'} cannot be read: "):
        train_and_evaluate(config, tmp_path)
