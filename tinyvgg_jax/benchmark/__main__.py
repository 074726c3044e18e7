"""Measures throughput, start-up time, memory and FLOP/s; prints tables and writes JSON.

    python -m tinyvgg_jax.benchmark [--peer torch] [--json FILE] [--cases train,infer,...]

All contestants of a case take turns. The tables show medians over the rounds; the ratio to a peer
is the median of the ratios within each round, so that slow phases of the machine affect both.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyvgg_jax.benchmark.contest import Contestant, Result, contest, ratios
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.runs.files import json_text, writing_to

_JAX_WORKER = "tinyvgg_jax.benchmark.jax_worker"
_TORCH_WORKER = "tinyvgg_jax.benchmark.torch_worker"
_NAME = "tinyvgg_jax"
CASES = ("startup", "train", "infer", "epoch", "stream", "scale")
# Cases that run if none are asked for: scaling is of interest to who has several devices.
_DEFAULT_CASES = CASES[:-1]
# Turns off the convolutions in C.
_XLA_ONLY = {"TINYVGG_JAX_NATIVE": "0"}
# Size of the train split; batch size and number of epochs of the paper's recipe.
_EXAMPLES, _BATCH_SIZE, _EPOCHS = 55_000, 32, 10
# Number of examples in the cases that need no whole split.
_FEW_EXAMPLES = 12_800


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark's command line.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit status: 0, or 2 if the JSON file cannot be written.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    # By default XLA reserves most of a GPU's memory. The other contestants could not use it, and
    # the peak would not show how much is needed.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    platform_name = _platform()
    report: dict[str, Any] = {"environment": _environment(arguments.peer), "cases": []}
    print(json.dumps(report["environment"]))
    for case, contestants in _cases(arguments, platform_name):
        results = contest(contestants, case, arguments.rounds, arguments.seconds)
        entry = _entry(case, results)
        report["cases"].append(entry)
        print("\n" + _table(entry, results), flush=True)
        try:
            # Not replaced atomically, because FILE may be a device such as /dev/stdout.
            with writing_to(arguments.json):
                arguments.json.write_text(json_text(report), encoding="utf-8")
        except UserError as error:
            print(f"tinyvgg_jax: {error}", file=sys.stderr)
            return 2
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyvgg_jax.benchmark", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--cases",
        type=_words,
        default=list(_DEFAULT_CASES),
        help=f"cases to run, from {','.join(CASES)}; default: all but scale",
    )
    parser.add_argument(
        "--batch_sizes",
        type=_numbers,
        help="batch sizes of training; default: 32,256, on a GPU 32,512,4096",
    )
    parser.add_argument(
        "--inference_batch_sizes", type=_numbers, default=[1, 32, 256], help="default: 1,32,256"
    )
    parser.add_argument("--dtypes", type=_words, help="default: float32, on a GPU float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7, help="number of turns of each contestant")
    parser.add_argument("--seconds", type=float, default=1.0, help="approximate length of a turn")
    parser.add_argument("--peer", choices=["torch"], help="a framework to compare with")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmark.json"), help="the file for all results"
    )
    arguments = parser.parse_args(argv)
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {unknown.pop()!r}; choose from {', '.join(CASES)}")
    if arguments.peer and importlib.util.find_spec(arguments.peer) is None:
        parser.error(f"{arguments.peer} is not installed")
    if arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    return arguments


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _platform() -> str:
    import jax

    return str(jax.default_backend())


def _environment(peer: str | None) -> dict[str, Any]:
    libraries = ["jax", "jaxlib", "flax", "optax", *([peer] if peer else [])]
    return {
        "processor": platform.processor() or platform.machine(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


def _cases(
    arguments: argparse.Namespace, device: str
) -> Iterator[tuple[dict[str, Any], list[Contestant]]]:
    """Lists the cases that were asked for, each with its contestants.

    Args:
        arguments: the parsed command line.
        device: JAX's platform, such as "cpu".
    """
    on_cpu = device == "cpu"
    dtypes = arguments.dtypes or (["float32"] if on_cpu else ["float32", "bfloat16"])
    sizes = arguments.batch_sizes or ([32, 256] if on_cpu else [32, 512, 4096])
    first = {"kind": "train", "batch_size": _BATCH_SIZE, "dtype": "float32"}
    if "startup" in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            # Both contestants share a fresh cache, so the second finds what the first compiled.
            fresh = {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
            yield (
                first | {"examples": _FEW_EXAMPLES},
                [
                    Contestant(f"{_NAME}, nothing cached", _JAX_WORKER, environment=fresh),
                    Contestant(f"{_NAME}, cached", _JAX_WORKER, environment=fresh),
                ],
            )
    for dtype in dtypes:
        if "train" in arguments.cases:
            for size in sizes:
                examples = max(_FEW_EXAMPLES, 100 * size)
                case = {"kind": "train", "batch_size": size, "dtype": dtype, "examples": examples}
                product = {"kind": "matmul", "size": 2048 if on_cpu else 8192}
                yield (
                    case,
                    [
                        *_jax_contestants(on_cpu),
                        *_torch_contestants(arguments.peer, on_cpu, training=True),
                        Contestant("a large matrix product", _JAX_WORKER, product),
                    ],
                )
        if "infer" in arguments.cases:
            for size in arguments.inference_batch_sizes:
                case = {"kind": "infer", "batch_size": size, "dtype": dtype}
                peers = _torch_contestants(arguments.peer, on_cpu, training=False)
                yield case, [*_jax_contestants(on_cpu), *peers]
        if "epoch" in arguments.cases:
            case = {"kind": "epoch", "batch_size": _BATCH_SIZE, "dtype": dtype}
            yield case | {"examples": _EXAMPLES}, _epoch_contestants(arguments.peer, on_cpu)
    if "stream" in arguments.cases:
        yield (
            {"kind": "stream", "batch_size": _BATCH_SIZE, "examples": _EXAMPLES},
            [Contestant(f"{_NAME}'s batches from the host, no model", _JAX_WORKER)],
        )
    if "scale" in arguments.cases:
        for size in sizes:
            yield (
                {
                    "kind": "scale",
                    "batch_size": size,
                    "dtype": dtypes[0],
                    "examples": max(_FEW_EXAMPLES, 100 * size),
                },
                _scale_contestants(size, on_cpu),
            )


def _jax_contestants(on_cpu: bool) -> list[Contestant]:
    """Lists this package's contestants: on a CPU with and without the convolutions in C."""
    return [
        Contestant(_NAME, _JAX_WORKER),
        *(
            [Contestant(f"{_NAME}, XLA alone", _JAX_WORKER, environment=_XLA_ONLY)]
            if on_cpu
            else []
        ),
    ]


def _torch_contestants(peer: str | None, on_cpu: bool, training: bool) -> list[Contestant]:
    """Lists PyTorch's contestants: each way to compile, in both memory layouts."""
    if peer != "torch":
        return []
    ways = ["", "default"]
    if not on_cpu:
        ways += ["reduce-overhead", *(["cuda-graph"] if training else [])]
    return [
        Contestant(
            f"PyTorch {way or 'eager'}, {'channels last' if last else 'contiguous'}",
            _TORCH_WORKER,
            {"compile": way, "channels_last": last},
            is_peer=True,
        )
        for way in ways
        for last in (True, False)
    ]


def _scale_contestants(batch_size: int, on_cpu: bool) -> list[Contestant]:
    """Lists 1, 2, 4, ... devices that share each batch; on a CPU, four that share its cores."""
    import jax

    available = 4 if on_cpu else jax.device_count()
    counts = [2**i for i in range(available.bit_length())]
    return [
        Contestant(
            f"{count} device{'s' if count > 1 else ''}",
            _JAX_WORKER,
            {"num_devices": count},
            {"JAX_NUM_CPU_DEVICES": str(count)},
        )
        for count in counts
        if batch_size % count == 0
    ]


def _epoch_contestants(peer: str | None, on_cpu: bool) -> list[Contestant]:
    """Lists the contestants that train epochs of the paper's recipe, with data and augmentation."""
    contestants = [Contestant(f"{_NAME}, device pipeline", _JAX_WORKER, {"pipeline": "device"})]
    contestants.append(Contestant(f"{_NAME}, stream pipeline", _JAX_WORKER, {"pipeline": "stream"}))
    if on_cpu:
        case = {"pipeline": "stream"}
        contestants.append(Contestant(f"{_NAME}, stream, XLA alone", _JAX_WORKER, case, _XLA_ONLY))
    if peer != "torch":
        return contestants
    loader = {"compile": "", "channels_last": False, "pipeline": "dataloader"}
    ways = ["", "default"] if on_cpu else ["default", "reduce-overhead", "cuda-graph"]
    return [
        *contestants,
        Contestant("PyTorch, DataLoader, eager", _TORCH_WORKER, loader, is_peer=True),
        *(
            Contestant(
                f"PyTorch, data on the device, {way or 'eager'}",
                _TORCH_WORKER,
                {"compile": way, "channels_last": True},
                is_peer=True,
            )
            for way in ways
        ),
    ]


def _entry(case: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """Makes the JSON entry of a case.

    Args:
        case: the case.
        results: the results of its contestants; this package's own comes first.

    Returns:
        `case` and `results`; with a peer `best_peer`, `ratios` and `ratio`; with a matrix product
        `matmul_flops_per_second`, `step_flops`, `flops_per_second` and `share_of_matmul`; for
        several devices `scaling`, a list of their `devices`, `speed_up` and `efficiency`.
    """
    entry: dict[str, Any] = {"case": case, "results": [dataclasses.asdict(r) for r in results]}
    ran = [result for result in results if result.seconds]
    peers = [result for result in ran if result.is_peer]
    if peers and ran[0].name.startswith(_NAME):
        best = min(peers, key=lambda result: result.median)
        pairs = ratios(ran[0], best)
        entry["best_peer"] = best.name
        entry["ratios"] = pairs
        entry["ratio"] = statistics.median(pairs)
    if case["kind"] == "scale" and ran:
        entry["scaling"] = [_scaling(ran[0], result) for result in ran]
    product = next((result for result in ran if "matrix product" in result.name), None)
    if product and ran[0] is not product:
        size = 2048 if product.facts["platform"] == "cpu" else 8192
        flops = step_flops(case["batch_size"])
        entry["matmul_flops_per_second"] = 2 * size**3 / product.median
        entry["step_flops"] = flops
        entry["flops_per_second"] = flops / ran[0].median
        entry["share_of_matmul"] = entry["flops_per_second"] / entry["matmul_flops_per_second"]
    return entry


def _scaling(one: Result, several: Result) -> dict[str, Any]:
    """Compares several devices with one: speed-up is t(1) / t(n), efficiency t(1) / (n t(n))."""
    speed_up = statistics.median(ratios(several, one))
    devices = several.facts["devices"]
    return {"devices": devices, "speed_up": speed_up, "efficiency": speed_up / devices}


def step_flops(batch_size: int) -> int:
    """Counts the floating-point operations of a training step of the default network.

    A convolution with C input channels and F filters on an output of H x W takes
    2 * H * W * 9 * C * F operations for each image (multiplications and additions), a dense layer
    from n to m features 2 * n * m. The gradients take twice as many as the forward pass, except for
    the first layer, since no gradient with respect to the images is needed.
    """
    sides, channels = (28, 28, 14, 14, 7, 7), (1, 64, 64, 128, 128, 256, 256)
    layers = [2 * side**2 * 9 * channels[i] * channels[i + 1] for i, side in enumerate(sides)]
    layers += [2 * 2304 * 256, 2 * 256 * 10]
    return batch_size * (3 * sum(layers) - layers[0])


def _table(entry: dict[str, Any], results: list[Result]) -> str:
    """Formats the results of a case for the terminal."""
    case = entry["case"]
    batch = case["batch_size"]
    title = f"{case['kind']}, batch {batch}, {case.get('dtype', 'uint8')}"
    columns = (
        f"{'images/s':>12}{'ms per step':>12}{'host MiB':>10}{'device MiB':>12}{'first step':>12}"
    )
    lines = [title, f"  {'':<44}{columns}" + ("  ten epochs" if case["kind"] == "epoch" else "")]
    for result in results:
        if not result.seconds:
            lines.append(f"  {result.name:<44} failed: {result.error}")
            continue
        host = result.facts["peak_host_bytes"] / 2**20
        device = result.facts.get("peak_device_bytes")
        rate = f"{batch / result.median:,.0f}" if "matrix" not in result.name else ""
        line = f"  {result.name:<44}{rate:>12}{1e3 * result.median:>12.2f}{host:>12,.0f}"
        line += f"{device / 2**20:>12,.0f}" if device else f"{'':>12}"
        line += f"{result.first_step_seconds:>10.1f} s"
        if case["kind"] == "epoch":
            line += f"{_EPOCHS * (_EXAMPLES // batch) * result.median:>10.1f} s"
        lines.append(line)
    if "ratio" in entry:
        low, high = min(entry["ratios"]), max(entry["ratios"])
        lines.append(
            f"  {entry['ratio']:.2f} times as fast as the best peer, {entry['best_peer']} "
            f"(rounds from {low:.2f} to {high:.2f})"
        )
    for one in entry.get("scaling", [])[1:]:
        line = f"  {one['devices']} devices: {one['speed_up']:.2f} times as fast as one"
        lines.append(f"{line}, efficiency {one['efficiency']:.0%}")
    if "scaling" in entry and results[0].facts.get("platform") == "cpu":
        lines.append("  These devices share the cores of one CPU, so together they have no more.")
    if "share_of_matmul" in entry:
        step, rate = entry["step_flops"] / 1e9, entry["flops_per_second"] / 1e9
        product = entry["matmul_flops_per_second"] / 1e9
        lines.append(
            f"  {step:.1f} GFLOP per step by formula: {rate:,.0f} GFLOP/s, "
            f"{entry['share_of_matmul']:.0%} of the matrix product's {product:,.0f} GFLOP/s"
        )
        counted = results[0].facts.get("counted_flops")
        if counted:
            lines.append(f"  XLA counts {counted / 1e9:.1f} GFLOP, without those of the C code")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
