"""Where this package keeps what can be made again."""

import os
from pathlib import Path


def cache_dir() -> Path | None:
    """The user's cache folder for this package (`$XDG_CACHE_HOME`, or `~/.cache`).

    None for a user without a home folder. It is not made, and nobody can rely on being allowed to
    make it: what is kept here must be optional.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        # A relative folder would be another one for each current folder.
        return (Path(root).absolute() if root else Path.home() / ".cache") / "tinyvgg_jax"
    except RuntimeError:
        return None


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiled for the next process, unless it was told where already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        root = cache_dir()
        if root is None:
            return  # Then each process compiles.
        try:
            (root / "compiled").mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        jax.config.update("jax_compilation_cache_dir", os.fspath(root / "compiled"))
        # By default, what compiles within a second is not kept; a run has several of those.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
