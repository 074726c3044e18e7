import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvgg_jax.checkpoint import Checkpoints, digest
from tinyvgg_jax.errors import UserError


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


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "c", {1: 0.5})
    usage = type(shutil.disk_usage(tmp_path))(1000, 0, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(UserError, match=r"cannot save a checkpoint .* MB needed"),
    ):
        checkpoints.save(2, params(2), opt_state(2), {}, 0.5)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def data_file(item: Path) -> Path:
    """The largest file of an item: it holds the arrays."""
    return max((f for f in item.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_byte(folder: Path) -> None:
    file = data_file(folder / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = data_file(folder / "params")
    file.write_bytes(file.read_bytes()[:100])


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
    lambda folder: (folder / "metrics" / "metrics").write_bytes(b"{"),
]


# Orbax leaves coroutines behind when it fails to read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
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
        # The step can be saved again, and what was damaged is not lost.
        checkpoints.save(2, params(2), opt_state(2), {}, 0.6)
        checkpoints.wait()
        assert_equal(checkpoints.restore_params(2, ABSTRACT[0]).params, params(2))
    assert (tmp_path / "checkpoints.damaged" / "2").is_dir()
    assert "The checkpoint of step 2 is damaged" in caplog.text


def test_flipped_bytes_do_restore_without_our_digest(tmp_path: Path) -> None:
    """The reason for the digest: if this fails, Orbax has learned to see the damage itself."""
    import orbax.checkpoint as ocp

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


def test_reading_names_metrics_that_are_damaged(tmp_path: Path) -> None:
    fill(tmp_path / "c", {1: 0.9})
    (tmp_path / "c" / "1" / "metrics" / "metrics").write_bytes(b"")
    with pytest.raises(UserError, match=r"metrics is damaged; move .*/1 away"):
        Checkpoints(tmp_path / "c", read_only=True)


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
    # Nor when it is tried again, and they are out of the way.
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
