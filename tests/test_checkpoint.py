import errno
import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT

from tinyvgg_jax import errors
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.runs import checkpoint, files, integrity
from tinyvgg_jax.runs.checkpoint import Checkpoints
from tinyvgg_jax.runs.integrity import digest

# When Orbax fails to read, it leaves coroutines behind, about which Python warns later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def find_coroutines_now() -> Iterator[None]:
    """Lets Python find them within these tests, not in a later one."""
    yield
    gc.collect()


def params(step: int) -> dict[str, jax.Array]:
    return {"a": jax.random.normal(jax.random.key(step), (50, 7)), "b": jnp.full(3, step, "int32")}


def opt_state(step: int) -> tuple[dict[str, jax.Array], jax.Array]:
    return params(step + 1000), jnp.int32(step)


ABSTRACT = jax.eval_shape(lambda: (params(0), opt_state(0)))


def fill(folder: Path, accuracies: dict[int, float | None]) -> None:
    with Checkpoints(folder) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(step, params(step), opt_state(step), {"note": step}, accuracy)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_what_is_saved_is_restored(tmp_path: Path) -> None:
    fill(tmp_path / "c", {5: 0.5})
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore_newest(*ABSTRACT)
    assert restored is not None and (restored.step, restored.progress) == (5, {"note": 5})
    assert_equal((restored.params, restored.opt_state), (params(5), opt_state(5)))


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_newest(*ABSTRACT) is None
        with pytest.raises(UserError, match="holds no checkpoint yet"):
            checkpoints.restore_params("latest", ABSTRACT[0])


def test_the_latest_two_and_the_best_are_kept_also_over_restarts(tmp_path: Path) -> None:
    fill(tmp_path / "c", {1: 0.5, 2: 0.9, 3: 0.6})
    fill(tmp_path / "c", {4: 0.7, 5: 0.8, 6: None})
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.restore_params("best", ABSTRACT[0]).step == 2
        assert checkpoints.restore_params("latest", ABSTRACT[0]).step == 6
        assert_equal(checkpoints.restore_params(5, ABSTRACT[0]).params, params(5))
        with pytest.raises(UserError, match=r"no checkpoint of step 3; there are: 2, 5, 6\."):
            checkpoints.restore_params(3, ABSTRACT[0])


def test_saving_copies_what_is_donated_next(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        state = params(1)
        expected = jax.device_get(state)
        checkpoints.save(1, state, opt_state(1), {}, 0.5)
        jax.jit(lambda t: jax.tree.map(lambda a: a * 0, t), donate_argnums=0)(state)
        checkpoints.wait()
        assert_equal(checkpoints.restore_params(1, ABSTRACT[0]).params, expected)


def test_saving_copies_what_grows_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_over = []
    original = ocp.CheckpointManager.save

    def save(manager: Any, step: int, args: Any, **options: Any) -> Any:
        handed_over.append(args["progress"].item)
        return original(manager, step, args=args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    history = [1]
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, params(1), opt_state(1), {"history": history}, 0.5)
        # Orbax may not have written it yet.
        history.append(2)
        assert handed_over[0]["history"] == [1]
        restored = checkpoints.restore_newest(*ABSTRACT)
    assert restored is not None and restored.progress == {"history": [1]}


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "c", {1: 0.5})
    usage = type(shutil.disk_usage(tmp_path))(1000, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(UserError, match=r"cannot save a checkpoint .*: 1\.0 kB free, .* kB needed"),
    ):
        checkpoints.save(2, params(2), opt_state(2), {}, 0.5)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "c") as checkpoints:
        shutil.rmtree(tmp_path / "c")
        with pytest.raises(UserError, match=r"cannot save a checkpoint in .*No such file"):
            checkpoints.save(1, params(1), opt_state(1), {}, 0.5)
        (tmp_path / "c").mkdir()


def data_file(item: Path) -> Path:
    """Finds the largest file of an item, which holds the arrays."""
    return max((f for f in item.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_byte(folder: Path) -> None:
    file = data_file(folder / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = data_file(folder / "params")
    file.write_bytes(file.read_bytes()[:100])


def replace_by_fifo(folder: Path) -> None:
    path = data_file(folder / "params")
    path.unlink()
    os.mkfifo(path)


DAMAGES: list[Callable[[Path], Any]] = [
    flip_byte,
    truncate,
    lambda folder: data_file(folder / "opt_state").unlink(),
    lambda folder: (folder / "params" / "_METADATA").write_bytes(b"\xff{"),
    lambda folder: data_file(folder / "progress").write_bytes(b'{"no'),
    lambda folder: data_file(folder / "progress").write_bytes(b"{}"),
    lambda folder: data_file(folder / "progress").write_bytes(
        data_file(folder / "progress").read_bytes().replace(b'"note": 2', b'"note": 3')
    ),
    lambda folder: data_file(folder / "progress").write_bytes(b"[" * 100_000),
    replace_by_fifo,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_next_older_taken(
    tmp_path: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "checkpoints", {1: 0.5, 2: 0.6})
    damage(tmp_path / "checkpoints" / "2")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore_newest(*ABSTRACT)
        assert restored is not None and restored.step == 1
        assert_equal((restored.params, restored.opt_state), (params(1), opt_state(1)))
        # The step can be saved again, and the damaged checkpoint is not lost.
        checkpoints.save(2, params(2), opt_state(2), {}, 0.6)
        checkpoints.wait()
        assert_equal(checkpoints.restore_params(2, ABSTRACT[0]).params, params(2))
    assert (tmp_path / "checkpoints.damaged" / "2").is_dir()
    assert "The checkpoint of step 2 is damaged" in caplog.text


ODD_NAMES = [
    "[a]",
    "a[",
    "*?",
    "back\\slash",
    "größe",
    "new\nline",
    "{x}$HOME",
    os.fsdecode(b"\xff"),
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "checkpoints"
    for steps in ({1: 0.9, 2: 0.5}, {3: 0.6}):
        fill(folder, dict(steps))
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_newest(*ABSTRACT)
    assert restored is not None and restored.step == 3
    assert_equal((restored.params, restored.opt_state), (params(3), opt_state(3)))
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore_params("best", ABSTRACT[0]).step == 1
    assert [path.name for path in (tmp_path / name).iterdir()] == ["checkpoints"]


def test_a_folder_that_no_plain_path_leads_to_is_refused_before_anything_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_OPEN_FOLDERS", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"because of the characters in its path"):
        Checkpoints(tmp_path / "[a]")


def test_a_save_that_cannot_be_read_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Orbax treats the brackets as a pattern and loses what it saves.
    monkeypatch.setattr(integrity, "_PLAIN_PATH", re.compile(".*"))
    with (
        Checkpoints(tmp_path / "[a]") as checkpoints,
        pytest.raises(UserError, match=r"what was saved cannot be read back in .*\[a\]"),
    ):
        checkpoints.save(1, params(1), opt_state(1), {}, 0.5)


def assert_left_alone(folder: Path, said: str, wanted: Any = ABSTRACT) -> None:
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(UserError, match=said):
            checkpoints.restore_newest(*wanted)
        assert checkpoints.steps() == [1, 2]
    assert not (folder.parent / "checkpoints.damaged").exists()


def forget_arrays(folder: Path) -> None:
    """Makes a checkpoint like those of earlier versions, which did not record their arrays."""
    file = folder / "progress" / "metadata"
    progress = json.loads(file.read_text())
    digests = progress.pop("digests")
    del progress["arrays"]
    digests["progress"] = files.digest_json(progress)
    file.write_text(json.dumps({**progress, "digests": digests}))


@pytest.mark.parametrize("recorded", [True, False])
def test_another_dtype_or_optimizer_is_no_damage(tmp_path: Path, recorded: bool) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.5, 2: 0.6})
    if not recorded:
        forget_arrays(folder / "2")
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float16"), ABSTRACT[0])
    assert_left_alone(folder, "has a in float32, but this .* float16", (half, ABSTRACT[1]))
    more = (*ABSTRACT[1], jax.ShapeDtypeStruct((), "int32"))
    assert_left_alone(folder, r"another optimizer state .*: 2 is None there", (ABSTRACT[0], more))
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_newest(*ABSTRACT)
    assert restored is not None and restored.step == 2
    assert restored.progress == {"note": 2}


def test_what_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.5, 2: 0.6})

    def refuse(where: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(where / "params"))

    truncate(folder / "2")
    monkeypatch.setattr(checkpoint, "read_all_files", refuse)
    assert_left_alone(
        folder, r"cannot be read, and is left as it is: .*2/params: permission denied"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("item", ["params", "opt_state", "progress"])
def test_a_file_without_permission_is_left_alone(tmp_path: Path, item: str) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.5, 2: 0.6})
    data_file(folder / "2" / item).chmod(0)
    with (
        pytest.raises(UserError, match=r"[Pp]ermission denied"),
        Checkpoints(folder) as checkpoints,
    ):
        checkpoints.restore_newest(*ABSTRACT)
    assert not (tmp_path / "checkpoints.damaged").exists()


def test_where_not_even_a_fresh_checkpoint_restores_none_is_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.5, 2: 0.6})

    def fail(_: Any) -> None:
        raise RuntimeError("this machine has lost its mind")

    truncate(folder / "2")
    monkeypatch.setattr(checkpoint, "_round_trip", fail)
    assert_left_alone(folder, "cannot be restored on this machine, nor can a fresh one")


def test_a_fresh_checkpoint_does_restore_here() -> None:
    checkpoint._round_trip({"params": ABSTRACT[0], "opt_state": ABSTRACT[1]})


def test_a_read_error_that_passes_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.5, 2: 0.6})
    original = Checkpoints._restore
    failed: list[bool] = []

    def fail_once(checkpoints: Any, *arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            raise OSError(errno.EIO, "Input/output error")
        return original(checkpoints, *arguments)

    monkeypatch.setattr(Checkpoints, "_restore", fail_once)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_newest(*ABSTRACT)
    assert failed and restored is not None and restored.step == 2
    assert not (tmp_path / "checkpoints.damaged").exists()


def test_what_was_moved_before_is_not_overwritten(tmp_path: Path) -> None:
    folder, damaged = tmp_path / "checkpoints", tmp_path / "checkpoints.damaged"
    for accuracies in ({1: 0.5, 2: 0.6}, {2: 0.6}):
        fill(folder, dict(accuracies))
        flip_byte(folder / "2")
        with Checkpoints(folder) as checkpoints:
            checkpoints.restore_newest(*ABSTRACT)
    assert sorted(path.name for path in damaged.iterdir()) == ["2", "2.2"]


def test_a_file_in_the_place_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "c", {1: 0.5})
    (tmp_path / "c" / "2").write_text("")
    with pytest.raises(UserError, match=r"c/2 is in the way of a checkpoint"):
        Checkpoints(tmp_path / "c")


def test_flipped_bytes_do_restore_without_our_digest(tmp_path: Path) -> None:
    """The reason for the digest: if this test fails, Orbax now detects the damage itself."""
    fill(tmp_path / "c", {1: 0.5})
    flip_byte(tmp_path / "c" / "1")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), ABSTRACT[0]
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "c" / "1" / "params", target)
    assert digest(restored) != digest(params(1))


def test_reading_neither_moves_nor_uses_what_is_damaged(tmp_path: Path) -> None:
    fill(tmp_path / "checkpoints", {1: 0.9, 2: 0.6})
    flip_byte(tmp_path / "checkpoints" / "1")
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.restore_params("best", ABSTRACT[0]).step == 2
        with pytest.raises(UserError, match=r"step 1 .* is damaged"):
            checkpoints.restore_params(1, ABSTRACT[0])
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_steps_are_numbers_latest_or_best(tmp_path: Path) -> None:
    fill(tmp_path / "c", {1: 0.9, 2: 0.8})
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.restore_params(np.int64(1), ABSTRACT[0]).step == 1  # type: ignore[arg-type]
        with pytest.raises(UserError, match="must be a number, latest or best, not 'lastest'"):
            checkpoints.restore_params("lastest", ABSTRACT[0])


METRICS = [b"", b"{", b"[]", b"[" * 100_000, b'{"validation_accuracy": 2.0}', "folder", "fifo"]


@pytest.mark.parametrize("name", ["array_metadatas/process_0", "manifest.ocdbt"])
def test_a_damaged_checkpoint_leaves_no_traceback_behind(tmp_path: Path, name: str) -> None:
    """Orbax leaves coroutines and tasks, which Python prints wherever it finds them."""
    fill(tmp_path / "c", {1: 0.5, 2: 0.9})
    (tmp_path / "c" / "2" / "params" / name).write_bytes(b"")
    code = (
        "import gc, sys; from pathlib import Path;"
        "from test_checkpoint import ABSTRACT, Checkpoints;"
        "checkpoints = Checkpoints(Path(sys.argv[1]), read_only=True).__enter__();"
        "print(checkpoints.restore_params('latest', ABSTRACT[0]).step); gc.collect()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "c")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1\n", done.stderr
    assert "is damaged" in done.stderr and "Traceback" not in done.stderr


def test_only_coroutines_of_orbax_are_hidden() -> None:
    """Someone's own coroutine that fails is for them to see."""

    async def nothing() -> None:
        pass

    code = nothing.__code__.replace(co_filename="/site-packages/orbax/checkpoint/reader.py")
    of_orbax = types.FunctionType(code, {})()
    own = nothing()
    try:
        for coroutine in own, of_orbax:
            seen = types.SimpleNamespace(object=coroutine, exc_value=RuntimeError("closed"))
            assert errors.is_leftover(seen) == (coroutine is of_orbax)
    finally:
        own.close()
        of_orbax.close()
    errors.hide_leftovers()
    for words, shown in (("coro=<read() at orbax/a.py>", False), ("coro=<read() at a.py>", True)):
        record = logging.makeLogRecord({"msg": f"Task exception was never retrieved {words}"})
        assert bool(logging.getLogger("asyncio").filter(record)) == shown


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "[" * 100_000, '{"a":' * 100_000, None])
def test_damaged_times_of_a_checkpoint_are_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    """Orbax reads them when it opens a folder; None stands for a named pipe."""
    fill(tmp_path / "c", {1: 0.5, 2: 0.9})
    path = tmp_path / "c" / "1" / "_CHECKPOINT_METADATA"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    fill(tmp_path / "c", {3: 0.7})
    assert f"Removed {path}, which is damaged and not needed" in caplog.text
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.restore_params("best", ABSTRACT[0]).step == 2


@pytest.mark.parametrize("content", METRICS)
def test_the_best_is_known_by_what_has_a_digest(tmp_path: Path, content: bytes | str) -> None:
    """Earlier versions wrote metrics without a digest, which Orbax reads when it opens."""
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.9, 2: 0.5})
    path = folder / "2" / "metrics" / "metrics"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore_params("best", ABSTRACT[0]).step == 1
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_newest(*ABSTRACT)
        assert restored is not None and restored.step == 2
        for step in (3, 4):
            checkpoints.save(step, params(step), opt_state(step), {}, 0.6)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3, 4]
    assert not (tmp_path / "checkpoints.damaged").exists()


def test_the_best_of_an_earlier_version_stands_in_its_history(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: None, 2: None, 3: None})
    for step, accuracy in ((2, 0.9), (3, 0.5)):
        file = data_file(folder / str(step) / "progress")
        progress = json.loads(file.read_text())
        del progress["digests"]["progress"], progress["validation_accuracy"]
        progress["history"] = [{"step": step, "validation_accuracy": accuracy}]
        digests = progress.pop("digests")
        digests["progress"] = files.digest_json(progress)
        file.write_text(json.dumps({**progress, "digests": digests}))
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore_params("best", ABSTRACT[0]).step == 2


def test_a_checkpoint_that_may_be_the_best_is_not_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.9, 2: 0.5})
    data_file(folder / "1" / "progress").write_bytes(b"null")
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.restore_params("best", ABSTRACT[0]).step == 2
    assert "The checkpoint of step 1 is damaged" in caplog.text


def test_a_checkpoint_whose_accuracy_cannot_be_read_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fill(folder, {1: 0.9, 2: 0.5})
    data_file(folder / "1" / "progress").write_bytes(b"{")
    fill(folder, {3: 0.6, 4: 0.7})
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 3, 4]


def test_a_checkpoint_of_another_network_is_not_called_damaged(tmp_path: Path) -> None:
    fill(tmp_path / "checkpoints", {1: 0.9})
    other = {**ABSTRACT[0], "a": jax.ShapeDtypeStruct((50, 8), "float32")}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(
            UserError, match=r"another network .* a is \[50, 7\] there, not \[50, 8"
        ):
            checkpoints.restore_newest(other, ABSTRACT[1])
        assert checkpoints.steps() == [1]
    assert not (tmp_path / "checkpoints.damaged").exists()


def test_if_all_are_damaged_nothing_is_overwritten(tmp_path: Path) -> None:
    fill(tmp_path / "checkpoints", {1: 0.9, 2: 0.6})
    for step in ("1", "2"):
        flip_byte(tmp_path / "checkpoints" / step)
    # The second attempt, when they have been moved away, saves nothing either.
    for _ in range(2):
        with (
            pytest.raises(UserError, match=r"all checkpoints .* are damaged"),
            Checkpoints(tmp_path / "checkpoints") as checkpoints,
        ):
            checkpoints.restore_newest(*ABSTRACT)
        assert (tmp_path / "checkpoints.damaged" / "1").is_dir()


@pytest.mark.parametrize(
    "other",
    [
        {"a": jnp.zeros((2, 3)), "b": jnp.ones(2)},
        {"x": jnp.zeros((3, 2)), "b": jnp.ones(2)},
        {"a": jnp.zeros((3, 2), "int32"), "b": jnp.ones(2)},
        {"a": jnp.zeros((3, 2)).at[0, 0].set(1e-30), "b": jnp.ones(2)},
    ],
)
def test_the_digest_sees_paths_dtypes_shapes_and_values(other: dict[str, jax.Array]) -> None:
    tree = {"a": jnp.zeros((3, 2)), "b": jnp.ones(2)}
    assert digest(tree) == digest(jax.tree.map(jnp.copy, tree))
    assert digest(tree) != digest(other)
