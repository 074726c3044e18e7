"""The convolutions of `winograd.c` as JAX functions, compiled when first wanted.

They need a C compiler (`$CC`, `cc`, `gcc` or `clang`). Where there is none, `available` is false
and the caller does with XLA's own operations. `TINYVGG_JAX_NATIVE=0` in the environment turns
them off.
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

from tinyvgg_jax.cache import cache_dir

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("winograd.c")
_TARGETS = (
    "tinyvgg_convolution_relu",
    "tinyvgg_input_gradient",
    "tinyvgg_parameter_gradient",
    "tinyvgg_convolution_relu_pool",
    "tinyvgg_pooled_input_gradient",
    "tinyvgg_pooled_parameter_gradient",
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


def input_gradient(gradient: Array, output: Array, kernel: Array) -> Array:
    """Gradient and value `[B, H, W, O]` of the output, and `[3, 3, C, O]`, to `[B, H, W, C]`."""
    shape = (*gradient.shape[:3], kernel.shape[2])
    return _call("tinyvgg_input_gradient", _floats(shape), gradient, output, kernel)


def parameter_gradient(images: Array, gradient: Array, output: Array) -> tuple[Array, Array]:
    """`[B, H, W, C]`, and gradient and value `[B, H, W, O]` of the output, to those of parameters.

    They are the kernel's `[3, 3, C, O]` and the bias's `[O]`.
    """
    results = _parameters(images, gradient)
    return _call("tinyvgg_parameter_gradient", results, images, gradient, output)


def convolution_relu_pool(images: Array, kernel: Array, bias: Array) -> Array:
    """`convolution_relu`, and of each 2x2 square the maximum: `[B, H // 2, W // 2, O]`."""
    shape = _pooled_shape(images, kernel)
    return _call("tinyvgg_convolution_relu_pool", _floats(shape), images, kernel, bias)


def convolution_relu_pool_maxima(images: Array, kernel: Array, bias: Array) -> tuple[Array, Array]:
    """The same, and uint8 of its shape: the bit 2i + j if a square's pixel i, j is its maximum.

    Where the maximum is not positive, so that ReLU lets no gradient through, no bit is set.
    """
    shape = _pooled_shape(images, kernel)
    results = (_floats(shape), jax.ShapeDtypeStruct(shape, jnp.uint8))
    return _call("tinyvgg_convolution_relu_pool", results, images, kernel, bias)


def pooled_input_gradient(
    share: Array, maxima: Array, kernel: Array, shape: tuple[int, ...]
) -> Array:
    """`input_gradient` where each of the maxima has the gradient `share`.

    `shape` is the input's, `[B, H, W, C]`.
    """
    return _call("tinyvgg_pooled_input_gradient", _floats(shape), share, maxima, kernel)


def pooled_parameter_gradient(images: Array, share: Array, maxima: Array) -> tuple[Array, Array]:
    """`parameter_gradient` where each of the maxima has the gradient `share`."""
    results = _parameters(images, share)
    return _call("tinyvgg_pooled_parameter_gradient", results, images, share, maxima)


def _parameters(images: Array, gradient: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a kernel and a bias look like that make `gradient`'s channels of those of `images`."""
    C, O = images.shape[3], gradient.shape[3]  # noqa: E741
    return _floats((3, 3, C, O)), _floats((O,))


def _pooled_shape(images: Array, kernel: Array) -> tuple[int, ...]:
    B, H, W, _ = images.shape
    return (B, H // 2, W // 2, kernel.shape[3])


def _floats(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _call(target: str, results: Any, *arguments: Array) -> Any:
    # One after the other: a call uses all cores already.
    call = jax.ffi.ffi_call(target, results, vmap_method="sequential")
    return call(*arguments)


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
        logger.info(
            "Convolutions run as XLA compiles them, several times slower on a CPU: %s",
            str(error).strip(),
        )
        return False
    return True


def _load() -> ctypes.CDLL:
    """The shared library, from the cache or compiled."""
    compiler = _compiler()
    name = f"{hashlib.sha256(repr(_identity(compiler)).encode()).hexdigest()[:16]}.so"
    kept = cache_dir() / "native" / name
    if kept.exists():
        try:
            return ctypes.CDLL(os.fspath(kept))
        except OSError:  # It is damaged.
            kept.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / name
        _compile(compiler, library)
        loaded = ctypes.CDLL(os.fspath(library))
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
    raise OSError("there is no C compiler (cc, gcc or clang) to compile faster ones")


def _identity(compiler: str) -> list[str]:
    """All that the compiled code depends on, the features of this processor among it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    stat = Path(compiler).stat()
    return [
        _SOURCE.read_text(),
        *_FLAGS,
        compiler,
        str(stat.st_mtime_ns),
        jax.__version__,
        platform.machine(),
        features,
    ]


def _compile(compiler: str, library: Path) -> None:
    include = f"-I{jax.ffi.include_dir()}"
    for processor in (["-march=native"], []):
        command = [compiler, *_FLAGS, *processor, include, str(_SOURCE), "-o", str(library)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False
        )
        if done.returncode == 0:
            return
    raise OSError(f"{compiler} failed: {done.stderr.strip()[-300:]}")
