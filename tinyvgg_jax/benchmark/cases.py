"""The cases of the benchmark, and the contestants of each."""

import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from tinyvgg_jax.benchmark.contest import Contestant

NAME = "tinyvgg_jax"
JAX_WORKER = "tinyvgg_jax.benchmark.jax_worker"
TORCH_WORKER = "tinyvgg_jax.benchmark.torch_worker"
CASES = ("startup", "train", "infer", "epoch", "stream", "scale")
# PyTorch's ways to run, by the worker's names for them.
_WAYS = {
    "": "eager",
    "default": "compiled",
    "reduce-overhead": "compiled with reduce-overhead",
    "cuda-graph": "CUDA graph",
}
# Turns off the convolutions in C.
_XLA_ONLY = {"TINYVGG_JAX_NATIVE": "0"}
# Size of the train split; batch size and number of epochs of the paper's recipe.
EXAMPLES, BATCH_SIZE, EPOCHS = 55_000, 32, 10
# Number of examples in the cases that need no whole split.
_FEW_EXAMPLES = 12_800
# All contestants hold their memory at the same time, which from this batch size on is too much for
# one GPU if PyTorch has 16 of them.
_LARGE_BATCH = 4096


class Setting(NamedTuple):
    """The circumstances that all cases share.

    Attributes:
        on_cpu: whether JAX's device is a CPU.
        dtypes: the dtypes of the computation, of this package and of the peer.
        peer: "torch", or None for no peer.
        brief: whether to leave out variants of the peer that hardly ever win, to save time or
            memory.
        network: fields of `TinyVGG` that differ from the defaults.
        product_size: rows and columns of the large matrices; None for a size that suits the device.
        copy_bytes: size of the large array that is copied; None likewise.
    """

    on_cpu: bool
    dtypes: tuple[str, ...]
    peer: str | None = None
    brief: bool = False
    network: dict[str, Any] | None = None
    product_size: int | None = None
    copy_bytes: int | None = None

    def case(self, kind: str, batch_size: int, examples: int | None = None) -> dict[str, Any]:
        """Makes the fields of a case that all its contestants share."""
        case: dict[str, Any] = {"kind": kind, "batch_size": batch_size}
        if examples is not None:
            case["examples"] = examples
        return case if self.network is None else case | {"network": self.network}


Case = tuple[dict[str, Any], list[Contestant]]


def chosen_cases(
    names: list[str], setting: Setting, batch_sizes: list[int], inference_batch_sizes: list[int]
) -> Iterator[Case]:
    """Yields cases, each with its contestants.

    Args:
        names: those of `CASES` that are wanted.
        setting: the circumstances.
        batch_sizes: batch sizes of training steps.
        inference_batch_sizes: batch sizes of inference.
    """
    if "startup" in names:
        yield from startup(setting)
    if "train" in names:
        for size in batch_sizes:
            yield train(setting, size)
    if "infer" in names:
        for size in inference_batch_sizes:
            yield infer(setting, size)
    if "epoch" in names:
        yield epoch(setting)
    if "stream" in names:
        worker = Contestant(f"{NAME}'s batches from the host, no model", JAX_WORKER)
        yield setting.case("stream", BATCH_SIZE, EXAMPLES), [worker]
    if "scale" in names:
        for size in batch_sizes:
            yield scale(setting, size)


def startup(setting: Setting) -> Iterator[Case]:
    """Yields the case of the first step, without and with compiled programs in the cache."""
    case = setting.case("train", BATCH_SIZE, _FEW_EXAMPLES) | {"dtype": setting.dtypes[0]}
    with tempfile.TemporaryDirectory() as folder:
        # Both contestants share a fresh cache, so the second finds what the first compiled.
        fresh = {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": None}
        yield (
            case,
            [
                Contestant(f"{NAME}, nothing cached", JAX_WORKER, environment=fresh),
                Contestant(f"{NAME}, cached", JAX_WORKER, environment=fresh),
            ],
        )


def train(setting: Setting, batch_size: int) -> Case:
    """Makes the case of training steps on images that are ready, with the roofs of the device."""
    case = setting.case("train", batch_size, max(_FEW_EXAMPLES, 100 * batch_size))
    if not setting.on_cpu and batch_size >= _LARGE_BATCH:
        setting = setting._replace(brief=True)
    return case, [*_jax(setting), *_torch(setting, training=True), *_roofs(setting)]


def infer(setting: Setting, batch_size: int) -> Case:
    """Makes the case of inference: the logits of a batch."""
    return setting.case("infer", batch_size), [*_jax(setting), *_torch(setting, training=False)]


def _jax(setting: Setting) -> list[Contestant]:
    """Lists this package's contestants; on a CPU also without the convolutions in C."""
    found = [
        Contestant(f"{NAME}, {dtype}", JAX_WORKER, {"dtype": dtype}, is_compared=True)
        for dtype in setting.dtypes
    ]
    if setting.on_cpu and not setting.brief:
        case = {"dtype": setting.dtypes[0]}
        found.append(Contestant(f"{NAME}, {case['dtype']}, XLA alone", JAX_WORKER, case, _XLA_ONLY))
    return found


def _torch(setting: Setting, training: bool) -> list[Contestant]:
    """Lists PyTorch's contestants: ways to compile, dtypes and memory layouts."""
    if setting.peer != "torch":
        return []
    if setting.on_cpu:
        # Compiled with contiguous images, no case was fastest.
        variants = [("", True), ("", False), ("default", True)]
    else:
        ways = ["", "default", "reduce-overhead", *(["cuda-graph"] if training else [])]
        variants = [(way, last) for way in ways for last in (True, False)]
    if setting.brief:
        # On a GPU, eager steps wait for Python, and "reduce-overhead" is "default" that does not.
        slow = () if setting.on_cpu else ("", "default")
        variants = [(way, last) for way, last in variants if last and way not in slow]
    return [
        Contestant(
            f"PyTorch {dtype}, {_WAYS[way]}, {'channels last' if last else 'contiguous'}",
            TORCH_WORKER,
            {"dtype": dtype, "compile": way, "channels_last": last},
            is_peer=True,
        )
        for dtype in setting.dtypes
        for way, last in variants
    ]


def _roofs(setting: Setting) -> list[Contestant]:
    """Lists the contestants that measure the device's highest rates."""
    size = setting.product_size or (2048 if setting.on_cpu else 8192)
    copied = setting.copy_bytes or (2**28 if setting.on_cpu else 2**31)
    return [
        *(
            Contestant(
                f"a large matrix product, {dtype}",
                JAX_WORKER,
                {"kind": "matmul", "size": size, "dtype": dtype},
            )
            for dtype in setting.dtypes
        ),
        Contestant("a large copy", JAX_WORKER, {"kind": "copy", "bytes": copied}),
    ]


def epoch(setting: Setting, examples: int = EXAMPLES) -> Case:
    """Makes the case of epochs of the paper's recipe, with data order and augmentation."""
    case = setting.case("epoch", BATCH_SIZE, examples)
    first = setting.dtypes[0]
    found = [
        Contestant(
            f"{NAME}, {dtype}, device pipeline",
            JAX_WORKER,
            {"dtype": dtype, "pipeline": "device"},
            is_compared=True,
        )
        for dtype in setting.dtypes
    ]
    if not setting.brief:
        stream = {"dtype": first, "pipeline": "stream"}
        found.append(Contestant(f"{NAME}, {first}, stream pipeline", JAX_WORKER, stream))
        if setting.on_cpu:
            name = f"{NAME}, {first}, stream, XLA alone"
            found.append(Contestant(name, JAX_WORKER, stream, _XLA_ONLY))
    return case, [*found, *(_torch_epochs(setting) if setting.peer == "torch" else [])]


def _torch_epochs(setting: Setting) -> list[Contestant]:
    """Lists PyTorch's contestants in epochs: a DataLoader, and loops with the data on the device.

    The layout is that of the faster steps: channels last.
    """
    first = setting.dtypes[0]
    loader = {"dtype": first, "compile": "", "channels_last": False, "pipeline": "dataloader"}
    ways = ["", "default"] if setting.on_cpu else ["", "default", "reduce-overhead", "cuda-graph"]
    variants = [(dtype, way) for dtype in setting.dtypes for way in ways]
    if setting.brief and not setting.on_cpu:
        # The same loops in the paper's dtype, and only the fastest of them in another.
        variants = [
            (dtype, way)
            for dtype, way in variants
            if way != "reduce-overhead" and (dtype == first or way == "cuda-graph")
        ]
    return [
        Contestant(f"PyTorch {first}, DataLoader, eager", TORCH_WORKER, loader, is_peer=True),
        *(
            Contestant(
                f"PyTorch {dtype}, data on the device, {_WAYS[way]}",
                TORCH_WORKER,
                {"dtype": dtype, "compile": way, "channels_last": True},
                is_peer=True,
            )
            for dtype, way in variants
        ),
    ]


def scale(setting: Setting, batch_size: int) -> Case:
    """Makes the case of 1, 2, 4, ... devices that share each batch; a CPU is divided into four."""
    import jax

    case = setting.case("scale", batch_size, max(_FEW_EXAMPLES, 100 * batch_size))
    available = 4 if setting.on_cpu else jax.device_count()
    counts = [2**i for i in range(available.bit_length())]
    return (
        case | {"dtype": setting.dtypes[0]},
        [
            Contestant(
                f"{count} device{'s' if count > 1 else ''}",
                JAX_WORKER,
                {"num_devices": count},
                {"JAX_NUM_CPU_DEVICES": str(count)},
            )
            for count in counts
            if batch_size % count == 0
        ],
    )
