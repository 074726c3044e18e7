import contextlib
import ctypes
import os
import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyvgg_jax import pictures
from tinyvgg_jax.system import MemoryBudget, available_memory, trim_heap

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


def until(condition: Callable[[], bool]) -> None:
    """Waits for threads to get somewhere."""
    for _ in range(10_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never happens")


class Holders:
    """Threads that each hold a part of a budget until they are released."""

    def __init__(self, total: int):
        self.budget = MemoryBudget(total)
        self._pool = ThreadPoolExecutor(8)
        self.held: list[str] = []

    def ask(self, name: str, size: int) -> tuple[threading.Event, Future[None]]:
        """Starts a thread; returns once it holds its part, or waits in the queue for it."""
        release, queue = threading.Event(), self.budget._queue
        waiting = len(queue)

        def run() -> None:
            with self.budget.take(size):
                self.held.append(name)
                release.wait()
                self.held.remove(name)

        future = self._pool.submit(run)
        until(lambda: name in self.held or len(queue) > waiting)
        return release, future

    def end(self, holder: tuple[threading.Event, Future[None]]) -> None:
        holder[0].set()
        holder[1].result(10)


def test_a_budget_is_never_exceeded_and_serves_threads_in_their_order() -> None:
    holders = Holders(10)
    first, second = holders.ask("a", 6), holders.ask("b", 4)
    large, small = holders.ask("large", 8), holders.ask("small", 1)
    assert holders.held == ["a", "b"]
    holders.end(second)
    # There are 4 free, but the large one came before the small one.
    assert holders.held == ["a"]
    holders.end(first)
    until(lambda: len(holders.held) == 2)
    assert sorted(holders.held) == ["large", "small"]
    for holder in (large, small):
        holders.end(holder)


def test_what_is_larger_than_the_budget_is_alone() -> None:
    holders = Holders(10)
    small = holders.ask("small", 1)
    giant, last = holders.ask("giant", 10**12), holders.ask("last", 1)
    assert holders.held == ["small"]
    holders.end(small)
    until(lambda: holders.held == ["giant"])
    holders.end(giant)
    until(lambda: holders.held == ["last"])
    holders.end(last)


def test_an_error_gives_its_memory_back() -> None:
    budget = MemoryBudget(10)
    for _ in range(2):
        with pytest.raises(KeyError), budget.take(10):
            raise KeyError


def test_a_closed_budget_lets_nobody_wait() -> None:
    holders = Holders(10)
    holder, waiting = holders.ask("a", 10), holders.ask("b", 10)
    holders.budget.close()
    with pytest.raises(CancelledError):
        waiting[1].result(10)
    with pytest.raises(CancelledError), holders.budget.take(1):
        pass
    holders.end(holder)


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        # Version 2, where a group above sets the limit; version 1, seen from within a container.
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/memory.max": "4096\n"}, 4096),
        ("4:cpu,memory:/docker/1\n", {"memory/memory.limit_in_bytes": "8192\n"}, 8192),
        ("3:cpu:/\n0::/\n", {}, 5 * 2**20),
        (None, {}, 5 * 2**20),
    ],
)
def test_a_containers_limit_bounds_the_available_memory(
    groups: str | None, limits: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"/sys/fs/cgroup/{name}": text for name, text in limits.items()}
    files["/proc/meminfo"] = "MemTotal: 9000 kB\nMemAvailable:    5120 kB\n"
    if groups is not None:
        files["/proc/self/cgroup"] = groups

    def read_text(path: Path) -> str:
        try:
            return files[str(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_memory() == expected


def test_where_the_system_does_not_tell_all_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return 1024 * int(line.split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells peaks")
def test_decoding_takes_no_more_memory_than_it_reserves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = 2000
    grey = np.full((side, side), 240, np.uint8)
    grey[side // 4 : side // 2, side // 3 : side // 2] = 30
    image = Image.fromarray(grey).convert("RGB")
    cut = image.copy()
    cut.putalpha(Image.fromarray((grey < 128).astype(np.uint8) * 255))
    reserved = []

    @contextlib.contextmanager
    def reserve(size: int) -> Iterator[None]:
        reserved.append(size)
        yield

    cut.save(tmp_path / "RGBA.png")
    cut.convert("LA").save(tmp_path / "LA.png")
    cut.quantize(16).save(tmp_path / "P.png", transparency=bytes(range(0, 256, 16)))
    image.convert("CMYK").save(tmp_path / "CMYK.tif", compression="tiff_lzw")
    image.save(tmp_path / "progressive.jpg", progressive=True, subsampling=0)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "F.tif")
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "I;16.png")
    Image.init()
    for name, suffix in (("WEBP", "webp"), ("JPEG2000", "jp2"), ("AVIF", "avif")):
        if name in Image.SAVE:
            cut.save(tmp_path / f"RGBA.{suffix}")
    for path in sorted(tmp_path.iterdir()):
        trim_heap()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes()
        pictures.load_picture(path, reserve=reserve)
        # The memory of the decoders' own code is not reserved, so it is allowed for here.
        assert peak_bytes() - before < reserved[-1] + 16 * MIB, path.name
