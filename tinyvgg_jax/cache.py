"""Where this package keeps what can be made again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder for this package (`$XDG_CACHE_HOME`, or `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tinyvgg_jax"


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiled for the next process, unless it was told where already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = cache_dir() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # Then each process compiles.
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        # By default, what compiles within a second is not kept; a run has several of those.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
