"""The convolutions of `winograd.c` as JAX functions, compiled when first wanted.

They need a C compiler (`$CC`, `cc`, `gcc` or `clang`). Where there is none, or it fails, which is
warned of, `available` is false and the caller does with XLA's own operations.
`TINYVGG_JAX_NATIVE=0` in the environment turns them off.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from tinyvgg_jax.system import cache_dir

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("winograd.c")
_TARGETS = (
    "tinyvgg_convolution_relu",
    "tinyvgg_convolution_relu_pool",
    "tinyvgg_input_gradient",
    "tinyvgg_parameter_gradient",
)
_FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
_COMPILE_SECONDS = 120


def convolution_relu(images: Array, kernel: Array, bias: Array) -> Array:
    """relu(SAME convolution + bias): float32 `[B, H, W, C]`, `[3, 3, C, O]`, `[O]`."""
    shape = (*images.shape[:3], kernel.shape[3])
    return _call("tinyvgg_convolution_relu", _floats(shape), images, kernel, bias)


def convolution_relu_pool(images: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
    """`convolution_relu`, of each 2x2 square the maximum, and which of the square's pixels have it.

    Both are `[B, H // 2, W // 2, O]`, the second uint8: the bit 2i + j is set if pixel i, j has the
    maximum, and none if that is not positive, so that ReLU lets no gradient through.
    """
    B, H, W, _ = images.shape
    shape = (B, H // 2, W // 2, kernel.shape[3])
    results = (_floats(shape), jax.ShapeDtypeStruct(shape, jnp.uint8))
    return _call("tinyvgg_convolution_relu_pool", results, images, kernel, bias)


def input_gradient(gradient: Array, passed: Array, kernel: Array, shape: tuple[int, ...]) -> Array:
    """From the gradient of one of the two operations above to that of its images.

    Args:
        gradient: of the output; of a pooled one each maximum's share of it.
        passed: of the same shape, the output of `convolution_relu`, float32, or the second of
            `convolution_relu_pool`, uint8.
        kernel: `[3, 3, C, O]`.
        shape: of the images, `[B, H, W, C]`.
    """
    return _call("tinyvgg_input_gradient", _floats(shape), gradient, passed, kernel)


def parameter_gradient(images: Array, gradient: Array, passed: Array) -> tuple[Array, Array]:
    """Likewise to those of its kernel `[3, 3, C, O]` and bias `[O]`."""
    C_in, C_out = images.shape[3], gradient.shape[3]
    results = (_floats((3, 3, C_in, C_out)), _floats((C_out,)))
    return _call("tinyvgg_parameter_gradient", results, images, gradient, passed)


def _floats(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(target: str, results: Any, *arguments: Array) -> Any:
    # One after the other: a call uses all cores already.
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return call(*arguments)


class _NoCompilerError(OSError):
    """There is no C compiler on this machine."""


@functools.cache
def available() -> bool:
    """Whether the functions above can be used; the first call compiles and registers them."""
    if os.environ.get("TINYVGG_JAX_NATIVE") == "0":
        return False
    try:
        library = _load()
        for target in _TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        # Nobody expects what needs a compiler where there is none; one that fails is a defect.
        logger.log(
            logging.INFO if isinstance(error, _NoCompilerError) else logging.WARNING,
            "Convolutions run as XLA compiles them, several times slower on a CPU: %s",
            str(error).strip(),
        )
        return False
    return True


def _load() -> ctypes.CDLL:
    """The shared library, from the cache or compiled."""
    compiler = _compiler()
    name = f"{hashlib.sha256(repr(_identity(compiler)).encode()).hexdigest()[:16]}.so"
    root = cache_dir()
    kept = None if root is None else root / "native" / name
    if kept is not None and kept.exists():
        try:
            return ctypes.CDLL(os.fspath(kept))
        except OSError:  # It is damaged.
            kept.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / name
        _compile(compiler, library)
        loaded = ctypes.CDLL(os.fspath(library))
        if kept is None:
            return loaded
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}")
            shutil.copyfile(library, partial)
            partial.replace(kept)
        except OSError as error:
            logger.info("What was compiled for the convolutions is not kept: %s", error)
    return loaded


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise _NoCompilerError("there is no C compiler (cc, gcc or clang) to compile faster ones")


def _identity(compiler: str) -> list[str]:
    """All that the compiled code depends on, the features of this processor among it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    stat = Path(compiler).stat()
    return [
        _SOURCE.read_text(encoding="utf-8"),
        *_FLAGS,
        compiler,
        str(stat.st_mtime_ns),
        jax.__version__,
        platform.machine(),
        features,
    ]


def _compile(compiler: str, library: Path) -> None:
    include = f"-I{jax.ffi.include_dir()}"
    # A compiler's messages are searched for the word "error".
    environment = os.environ | {"LC_ALL": "C"}
    for processor in (["-march=native"], []):
        command = [compiler, *_FLAGS, *processor, include, str(_SOURCE), "-o", str(library)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_COMPILE_SECONDS,
            check=False,
            env=environment,
        )
        if done.returncode == 0:
            return
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    first = next((line for line in lines if "error:" in line), lines[-1])
    raise OSError(f"{compiler} failed: {first}")
