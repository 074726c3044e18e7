import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import in_its_place
from jax._src import compilation_cache

from tinyvgg_jax import cache
from tinyvgg_jax.system import enable_compilation_cache


@pytest.fixture
def no_folder_set() -> Iterator[None]:
    """As in a fresh process, where JAX has not been told where to keep programs."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    programs = compilation_cache._cache
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    compilation_cache._cache = programs
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_folder_set: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    folder = tmp_path / "tinyvgg_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)  # type: ignore[attr-defined]
    assert folder.is_dir()
    # XLA keeps nothing beside them, which it would do without a digest.
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"  # type: ignore[attr-defined]


def flip(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:50] + bytes([raw[50] ^ 1]) + raw[51:])


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        in_its_place(lambda path: path.mkdir()),
        in_its_place(os.mkfifo),
    ],
    ids=["flipped", "half", "empty", "zeros", "folder", "fifo"],
)
@pytest.mark.usefixtures("no_folder_set")
def test_a_damaged_program_is_compiled_again_and_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

    def program(values: jax.Array) -> jax.Array:
        return jnp.sin(values) * 3

    values = jnp.arange(5.0)
    expected = np.asarray(jax.jit(program)(values))
    (path,) = (tmp_path / "tinyvgg_jax" / "compiled").glob("jit_program-*")
    damage(path)
    for function in (lambda values: program(values), lambda values: program(values)):
        function.__name__ = "program"
        np.testing.assert_array_equal(jax.jit(function)(values), expected)
        assert cache.find(f"compiled/{path.name}") == path


def test_a_folder_that_the_user_chose_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_folder_set: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "/chosen"  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_folder_set: None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]
