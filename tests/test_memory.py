import ctypes
import platform
from pathlib import Path

import pytest

from tinyvgg_jax.system import trim_heap

MIB = 2**20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory so")
def test_freed_memory_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    # The last one stays, or glibc would give back what is above it by itself.
    *blocks, last = [libc.malloc(MIB // 16) for _ in range(64 * 16 + 1)]
    for block in blocks:
        ctypes.memset(block, 1, MIB // 16)
    for block in blocks:
        libc.free(block)
    before = resident_bytes()
    trim_heap()
    assert resident_bytes() < before - 32 * MIB
    libc.free(last)


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    trim_heap()
