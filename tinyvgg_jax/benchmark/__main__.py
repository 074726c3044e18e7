"""Measures throughput, start-up time, memory and FLOP/s; prints tables and writes JSON.

    python -m tinyvgg_jax.benchmark [--peer torch] [--json FILE] [--cases train,infer,...]
    python -m tinyvgg_jax.benchmark [--peer torch] --report FILE.md [--parts epochs,train,...]

All contestants of a case take turns. The tables show medians over the rounds; the ratio to a peer
is the median of the ratios within each round, so that slow phases of the machine affect both.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from tinyvgg_jax.benchmark.cases import CASES, Setting, chosen_cases
from tinyvgg_jax.benchmark.contest import contest
from tinyvgg_jax.benchmark.parts import (
    REHEARSAL,
    Size,
    all_parts,
    check_fields,
    chosen_parts,
)
from tinyvgg_jax.benchmark.processor import Processor, find_processor
from tinyvgg_jax.benchmark.report import Report, circumstances
from tinyvgg_jax.benchmark.results import entry_of, table
from tinyvgg_jax.config import FIELDS
from tinyvgg_jax.errors import InterruptedRunError, UserError
from tinyvgg_jax.runs.files import json_text, writing_to
from tinyvgg_jax.signals import raised_signals

# Cases that run if none are asked for: scaling is of interest to who has several devices.
_DEFAULT_CASES = CASES[:-1]
DTYPES = ("float32", "bfloat16")


_WITHOUT_BFLOAT16 = (
    "bfloat16 is left out: this processor has no instructions for it, and software that imitates "
    "them is slow. --dtypes float32,bfloat16 measures it all the same."
)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark's command line.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit status: 0; 1 if a part of the report failed; 2 for a file that cannot be written,
        or a field that is not right; 128 + signal after SIGINT or SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parse(argv)
    # By default XLA reserves most of a GPU's memory. The other contestants could not use it, and
    # the peak would not show how much is needed.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        with raised_signals("finished parts are written."):
            if arguments.report is not None:
                return _run_report(arguments, argv)
            _run_cases(arguments)
    except UserError as error:
        print(f"tinyvgg_jax: {error}", file=sys.stderr)
        return 2
    except InterruptedRunError as error:
        print(f"tinyvgg_jax: {error}", file=sys.stderr)
        return 128 + error.signal_number
    return 0


def _run_cases(arguments: argparse.Namespace) -> None:
    """Runs the cases that were asked for; prints their tables, and writes them after each case."""
    processor = find_processor()
    setting = _setting(arguments, processor)
    environment = _environment(setting, processor)
    report: dict[str, Any] = {"environment": environment, "cases": []}
    print(json.dumps(environment))
    where = str(processor) if setting.on_cpu else environment["device"]
    if _lacks_bfloat16(setting, processor):
        print(_WITHOUT_BFLOAT16)
    sizes = arguments.batch_sizes or ([32, 256] if setting.on_cpu else [32, 512, 4096])
    inference_sizes = arguments.inference_batch_sizes or [1, 32, 256]
    names = arguments.cases or list(_DEFAULT_CASES)
    rounds, seconds = arguments.rounds or 7, arguments.seconds or 1.0
    for case, contestants in chosen_cases(names, setting, sizes, inference_sizes):
        results = contest(contestants, case, rounds, seconds)
        entry = entry_of(case, results)
        report["cases"].append(entry)
        print("\n" + table(entry, results, where), flush=True)
        # Not replaced atomically, because FILE may be a device such as /dev/stdout.
        with writing_to(arguments.json):
            arguments.json.write_text(json_text(report), encoding="utf-8")


def _run_report(arguments: argparse.Namespace, argv: list[str]) -> int:
    """Measures the parts of a report; returns the exit status."""
    processor = find_processor()
    size = REHEARSAL if arguments.rehearse else Size()
    names = ("batch_sizes", "inference_batch_sizes", "rounds", "seconds")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    size = size._replace(fields=size.fields | arguments.set, **given)
    check_fields(size)
    setting = _setting(arguments, processor)._replace(brief=True, **size.setting)
    parts = chosen_parts(arguments.parts, all_parts(size, setting))
    command = shlex.join(["python", "-m", "tinyvgg_jax.benchmark", *argv])
    environment, minutes = _environment(setting, processor), arguments.budget_minutes
    head = circumstances(command, environment, arguments.rehearse, minutes)
    if _lacks_bfloat16(setting, processor):
        head += f"\n{_WITHOUT_BFLOAT16}\n"
    report = Report(arguments.report, head, parts, 60 * minutes)
    report.measure()
    if report.failed:
        print(f"tinyvgg_jax: failed: {', '.join(report.failed)}", file=sys.stderr)
    return 1 if report.failed else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tinyvgg_jax.benchmark", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--cases", type=_words, help=f"cases to run, from {','.join(CASES)}; default: all but scale"
    )
    parser.add_argument(
        "--batch_sizes",
        type=_numbers,
        help="batch sizes of training; default: 32,256, on a GPU and in a report 32,512,4096",
    )
    parser.add_argument("--inference_batch_sizes", type=_numbers, help="default: 1,32,256")
    parser.add_argument(
        "--dtypes",
        type=_words,
        help="dtypes of the computation, the peer's too; default: float32,bfloat16, but only "
        "float32 on a processor without bfloat16 instructions",
    )
    parser.add_argument(
        "--rounds", type=int, help="number of turns of each contestant; default: 7, in a report 5"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="approximate length of a turn; default: 1, in a report 0.5",
    )
    parser.add_argument("--peer", choices=["torch"], help="a framework to compare with")
    parser.add_argument(
        "--json", type=Path, default=Path("benchmark.json"), help="the file for all results"
    )
    _add_report_arguments(parser)
    arguments = parser.parse_args(argv)
    for kind, given, known in (
        ("case", arguments.cases or [], CASES),
        ("dtype", arguments.dtypes or [], DTYPES),
    ):
        unknown = [word for word in given if word not in known]
        if unknown:
            parser.error(f"unknown {kind} {unknown[0]!r}; choose from {', '.join(known)}")
    if arguments.peer and importlib.util.find_spec(arguments.peer) is None:
        parser.error(f"{arguments.peer} is not installed")
    if any(given is not None and given <= 0 for given in (arguments.rounds, arguments.seconds)):
        parser.error("--rounds and --seconds must be positive")
    if arguments.report is not None and arguments.cases is not None:
        parser.error("--cases are not for --report, which has --parts")
    if arguments.report is None and (arguments.parts or arguments.set or arguments.rehearse):
        parser.error("--parts, --set and --rehearse are for --report")
    arguments.set = dict(arguments.set)
    return arguments


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "report", "All that there is to measure on a machine, such as a GPU, in one Markdown file."
    )
    group.add_argument(
        "--report", type=Path, metavar="FILE.md", help="the file, which is replaced after each part"
    )
    group.add_argument(
        "--parts",
        type=_words,
        help="parts to measure: epochs, default, train, fast, fast-at-once, infer, best-at-once, "
        "best; default: all, in this order",
    )
    group.add_argument(
        "--budget_minutes",
        type=float,
        default=25.0,
        help="time after which no new part begins; default: 25",
    )
    group.add_argument(
        "--set",
        type=_field,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a config field of all recipes, like data.data_dir=FOLDER",
    )
    group.add_argument(
        "--rehearse",
        action="store_true",
        help="do everything with a tiny network and few steps, in a minute, to see that it works",
    )


def _field(text: str) -> tuple[str, Any]:
    """Splits FIELD=VALUE; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or name not in FIELDS:
        raise argparse.ArgumentTypeError(f"{text!r} does not set a config field")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _setting(arguments: argparse.Namespace, processor: Processor) -> Setting:
    """Makes the circumstances that all cases share, on JAX's default device."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    dtypes = arguments.dtypes
    if dtypes is None:
        dtypes = DTYPES if processor.has_bfloat16 or not on_cpu else DTYPES[:1]
    return Setting(on_cpu, tuple(dtypes), arguments.peer)


def _lacks_bfloat16(setting: Setting, processor: Processor) -> bool:
    """Tells whether a case lacks bfloat16 because it would be slow."""
    return setting.on_cpu and not processor.has_bfloat16 and "bfloat16" not in setting.dtypes


def _environment(setting: Setting, processor: Processor) -> dict[str, Any]:
    libraries = ["jax", "jaxlib", "flax", "optax", *([setting.peer] if setting.peer else [])]
    import jax

    devices = jax.devices()
    runtime = " ".join(str(devices[0].client.platform_version).split())
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "runtime": f"{devices[0].platform}, {runtime}",
        "description": str(processor),
        "processor": processor.model,
        "cpu_count": processor.cores,
        "instructions": processor.instructions,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


if __name__ == "__main__":
    sys.exit(main())
