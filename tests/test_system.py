from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tinyvgg_jax.system import cache_dir, enable_compilation_cache


@pytest.fixture
def no_folder_set() -> Iterator[None]:
    """As in a fresh process, where JAX has not been told where to keep programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_where_the_desktop_standard_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "tinyvgg_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "tinyvgg_jax"


def test_programs_are_kept_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_folder_set: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    folder = tmp_path / "tinyvgg_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(folder)  # type: ignore[attr-defined]
    assert folder.is_dir()


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
