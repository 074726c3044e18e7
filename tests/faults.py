"""Faults of files, the files that they befall, and a judge of what the package makes of them.

`python tests/faults.py [KIND...]` tries every fault on every file, or on every file of some kinds,
and prints a table. All take an hour or two; `test_faults.py` tries a sample.
"""

import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from worlds import (
    FIRST,
    LAST,
    Done,
    World,
    cheap_pictures,
    complaint,
    final_state,
    forked,
    print_digest,
    refusal,
    snapshot,
)

# Faults


class Fault(NamedTuple):
    """A fault of a file.

    Attributes:
        kind: the column of the table that it counts for.
        name: what it is, exactly.
        inflict: does it to a file.
        json_only: whether only files that hold JSON can have it.
    """

    kind: str
    name: str
    inflict: Callable[[Path], Any]
    json_only: bool = False


def _cut(share: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def _flip(share: float, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[int(share * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _write(content: str, file: Path) -> None:
    file.write_text(content)


def _nest(opening: str, closing: str, file: Path) -> None:
    # Python's parser follows nested JSON by recursion.
    depth = 100_000
    file.write_text(opening * depth + "1" + closing * depth)


_OTHER_JSON = ("[]", "3", '"x"', "null", '{"a": []}')

FAULTS = (
    Fault("deleted", "deleted", Path.unlink),
    Fault("emptied", "emptied", partial(_cut, 0)),
    Fault("half", "cut to half", partial(_cut, 0.5)),
    *(
        Fault("flipped", f"bit flipped at {share:.0%}", partial(_flip, share))
        for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ),
    Fault("folder", "replaced by a folder", _folder),
    Fault("FIFO", "replaced by a FIFO", _fifo),
    *(Fault("JSON", f"replaced by {text}", partial(_write, text), True) for text in _OTHER_JSON),
    Fault("deep", "replaced by nested lists", partial(_nest, "[", "]"), True),
    Fault("deep", "replaced by nested objects", partial(_nest, '{"a":', "}"), True),
)


# Operations


class Operation(NamedTuple):
    """A way to use a run.

    Attributes:
        name: its name.
        run: the run's folder in the world.
        call: makes the call of it in a world; `step` chooses a checkpoint for a reference.
        answer: reads from a process that succeeded what must be the same despite the fault.
        writes: patterns of the files that it may write in any case, below the world.
        rewrites: patterns of the files that it may also write if it succeeds.
    """

    name: str
    run: str
    call: Callable[..., Callable[[], Any]]
    answer: Callable[[World, Done], Any]
    writes: tuple[str, ...] = ()
    rewrites: tuple[str, ...] = ()


def _mode(*flags: str, pictures: str = "") -> Callable[..., Callable[[], Any]]:
    def call(world: World, step: int | None = None) -> Callable[[], Any]:
        argv = [*flags, f"--workdir={world.root / 'finished'}"]
        argv += [f"--step={step}"] if step else []
        argv += [str(world.root / pictures)] if pictures else []
        return world.main(*argv, hooks=(cheap_pictures,))

    return call


def _evaluation(world: World, done: Done) -> Any:
    written = json.loads((world.root / "finished/evaluation/test.json").read_text())
    return done.stdout, written


def _printed(_: World, done: Done) -> Any:
    return done.stdout


def _drawn(_: World, done: Done) -> Any:
    # Another file in the picture's place is left there, and the picture gets another name.
    return Path(done.stdout.strip()).read_bytes()


def _trained(run: str) -> Callable[[World, Done], Any]:
    def answer(world: World, done: Done) -> Any:
        # The last line has the time.
        return done.stdout.splitlines()[:-1], final_state(world.root / run)

    return answer


_REWRITTEN = ("metrics.jsonl", "summary.json", "tensorboard/*")

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "eval", "finished", _mode("--mode=eval"), _evaluation, ("finished/evaluation/*",)
        ),
        Operation(
            "predict", "finished", _mode("--mode=predict", "--json", pictures="pictures"), _printed
        ),
        Operation(
            "explain",
            "finished",
            _mode("--mode=explain", pictures="pictures/0.png"),
            _drawn,
            ("finished/explain/*",),
        ),
        Operation(
            "restore",
            "finished",
            lambda world, step="best": partial(print_digest, world.root / "finished", step),
            _printed,
        ),
        *(
            Operation(
                name,
                run,
                lambda world, run=run: world.train(run),
                _trained(run),
                rewrites=tuple(f"{run}/{pattern}" for pattern in _REWRITTEN),
            )
            for name, run in (("train", "finished"), ("resume", "unfinished"))
        ),
    )
}
_ON_A_RUN = ("eval", "predict", "restore", "train", "resume")


# Targets


class Target(NamedTuple):
    """A kind of file.

    Attributes:
        kind: its row in the table.
        pattern: glob below the world; RUN stands for the operation's run.
        operations: the operations to try with a faulty one.
        named: a regular expression for what an error or a warning must name; STEP stands for the
            checkpoint's step.
    """

    kind: str
    pattern: str
    operations: tuple[str, ...]
    named: str


_CHECKPOINT = r"checkpoints/STEP\b|step STEP\b"
_DATASET = r"\bbars\b"
_ON_DATA = ("eval", "train", "resume")

TARGETS = (
    Target("config.json", "RUN/config.json", _ON_A_RUN, r"config\.json|run of another config"),
    Target("dataset.json", "RUN/dataset.json", _ON_A_RUN, r"dataset\.json"),
    Target("summary.json", "RUN/summary.json", _ON_A_RUN, r"summary\.json"),
    Target("metrics.jsonl", "RUN/metrics.jsonl", _ON_A_RUN, r"metrics\.jsonl"),
    Target(".lock", "RUN/.lock", _ON_A_RUN, r"\.lock"),
    Target("tensorboard/", "RUN/tensorboard/*", _ON_A_RUN, "tensorboard"),
    Target("_CHECKPOINT_METADATA", "RUN/checkpoints/*/_CHECK*", _ON_A_RUN, _CHECKPOINT),
    Target("commit_success.txt", "RUN/checkpoints/**/commit_*", _ON_A_RUN, _CHECKPOINT),
    Target("checkpoint's progress", "RUN/checkpoints/*/progress/meta*", _ON_A_RUN, _CHECKPOINT),
    Target("arrays' _METADATA", "RUN/checkpoints/**/_METADATA", _ON_A_RUN, _CHECKPOINT),
    Target("arrays' _sharding", "RUN/checkpoints/**/_sharding", _ON_A_RUN, _CHECKPOINT),
    Target("arrays' process_0", "RUN/checkpoints/**/process_0", _ON_A_RUN, _CHECKPOINT),
    Target("arrays' manifest", "RUN/checkpoints/**/manifest.ocdbt", _ON_A_RUN, _CHECKPOINT),
    Target("arrays' data", "RUN/checkpoints/**/d/*", _ON_A_RUN, _CHECKPOINT),
    Target("evaluation/*.json", "RUN/evaluation/*.json", ("eval", "train"), "evaluation"),
    Target("evaluation/report.html", "RUN/evaluation/*.html", ("eval", "train"), "evaluation"),
    Target("evaluation/test/", "RUN/evaluation/test/*", ("eval", "train"), "evaluation"),
    Target("explain/", "RUN/explain/*", ("explain", "train"), "explain"),
    Target("cache: native/", "cache/*/native/*", _ON_A_RUN, "native"),
    Target("cache: decoded/", "cache/*/decoded/*", _ON_DATA, "decoded"),
    Target("cache: compiled/", "cache/*/compiled/*", _ON_A_RUN, "compiled"),
    Target("dataset: *.json", "data/bars/*/*.json", _ON_DATA, _DATASET),
    Target("dataset: labels", "data/bars/*/*.txt", _ON_DATA, _DATASET),
    Target("dataset: examples", "data/bars/*/*array_record*", _ON_DATA, _DATASET),
)


# Cases


class Case(NamedTuple):
    """A fault of a file, and the use of a run despite it."""

    target: Target
    file: str
    fault: Fault
    operation: Operation

    def __str__(self) -> str:
        return f"{self.operation.name} with {self.file} {self.fault.name}"


def all_cases(world: World, target: Target) -> list[Case]:
    """Lists all cases of a kind of file."""
    cases = []
    for operation in (OPERATIONS[name] for name in target.operations):
        pattern = target.pattern.replace("RUN", operation.run)
        files = [path for path in sorted(world.root.glob(pattern)) if path.is_file()]
        cases += [
            Case(target, str(path.relative_to(world.root)), fault, operation)
            for path in files
            for fault in FAULTS
            if not fault.json_only or _holds_json(path)
        ]
    if not cases:
        raise AssertionError(f"there is no file {target.pattern}")
    return cases


def _holds_json(path: Path) -> bool:
    try:
        content = path.read_text()
        for part in content.splitlines() if path.suffix == ".jsonl" else [content]:
            json.loads(part)
    except ValueError:
        return False
    return True


def sample(cases: list[Case], count: int) -> list[Case]:
    """Draws cases of a kind of file, each of another kind of fault as long as there are any."""
    drawn: list[Case] = []
    for case in random.Random(cases[0].target.kind).sample(cases, len(cases)):
        if case.fault.kind not in {other.fault.kind for other in drawn}:
            drawn.append(case)
    return drawn[:count]


# The judge


class Judge:
    """Tries cases in a world, and says what is wrong with what happens."""

    def __init__(self, world: World):
        """Learns what each operation answers without a fault, and from other checkpoints."""
        self._world = world
        self._right = {name: self._answer(name) for name in OPERATIONS}
        self._older = {
            name: [self._answer(name, step=step) for step in (FIRST, LAST)]
            for name in ("eval", "predict", "restore")
        }
        if any(older[0] == older[1] for older in self._older.values()):
            raise AssertionError("the checkpoints cannot be told apart by their answers")

    def _answer(self, name: str, **choice: int) -> Any:
        operation = OPERATIONS[name]
        self._world.reset()
        done = forked(operation.call(self._world, **choice), self._world.environment)
        if done.status:
            raise AssertionError(f"{name} fails without a fault: {done.stderr}")
        return operation.answer(self._world, done)

    def try_case(self, case: Case) -> tuple[str, Done]:
        """Inflicts the fault, runs the operation, and returns what is wrong: "" if nothing is."""
        world = self._world
        world.reset()
        case.fault.inflict(world.root / case.file)
        before = snapshot(world.root)
        done = forked(case.operation.call(world), world.environment)
        return self._verdict(case, done, before), done

    def _verdict(self, case: Case, done: Done, before: dict[str, str]) -> str:
        lost = self._lost(case, before, done.status == 0)
        if wrong := complaint(done) or (lost and f"changes or loses {lost}"):
            return wrong
        match = re.search(r"checkpoints/(\d+)", case.file)
        named = case.target.named.replace("STEP", match[1] if match else "")
        if done.status:
            return refusal(done, named)
        try:
            answer = case.operation.answer(self._world, done)
        except (OSError, ValueError, LookupError, TypeError) as error:
            return f"succeeds, but leaves no answer ({error!r:.80})"
        if answer == self._right[case.operation.name]:
            return ""
        if not re.search(named, done.stderr):
            return "answers differently, without a word"
        known = answer in self._older.get(case.operation.name, ())
        return "" if known else "answers differently than any checkpoint"

    def _lost(self, case: Case, before: dict[str, str], succeeded: bool) -> str:
        """Finds a file of the runs or the data that was intact, and is changed or gone."""
        operation, after = case.operation, snapshot(self._world.root)
        # A checkpoint with a damaged file is damaged as a whole, and may be moved away.
        step = re.match(r".*/checkpoints/\d+/", case.file)
        damaged = f"{step[0]}*" if step else f"{case.file}*"
        may_change = ("cache/*", damaged, *operation.writes)
        may_change += operation.rewrites if succeeded else ()
        for path, content in before.items():
            allowed = any(fnmatch(path, pattern) for pattern in may_change)
            # The folder of what may change may go with it.
            if after.get(path) != content and content != "folder" and not allowed:
                return path
        return ""


class Score:
    """Counts what was tried and what was right, and keeps what was wrong."""

    def __init__(self) -> None:
        self.tried: Counter[tuple[str, str]] = Counter()
        self.right: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self._rows: list[str] = []

    def add(self, row: str, column: str, case: object, verdict: str, done: Done) -> None:
        """Counts a case."""
        if row not in self._rows:
            self._rows.append(row)
        self.tried[row, column] += 1
        self.right[row, column] += not verdict
        if verdict:
            said = "\n".join(f"    {line[:300]}" for line in done.stderr.splitlines()[-4:])
            self.wrong.append(f"{case}: {verdict} (status {done.status})\n{said}")

    def table(self) -> str:
        """Formats the counts: a row for each kind of file, right/tried for each kind of fault."""
        columns = list(dict.fromkeys(column for _, column in self.tried))
        width = max(map(len, self._rows))
        lines = [" " * width + "".join(f"{column:>10}" for column in (*columns, "all"))]
        for row in (*self._rows, "all"):
            line = f"{row:<{width}}"
            for column in (*columns, "all"):
                cells = [
                    cell
                    for cell in self.tried
                    if row in ("all", cell[0]) and column in ("all", cell[1])
                ]
                tried = sum(self.tried[cell] for cell in cells)
                right = sum(self.right[cell] for cell in cells)
                line += f"{f'{right}/{tried}' if tried else '':>10}"
            lines.append(line)
        return "\n".join(lines)


def try_cases(judge: Judge, cases: Iterable[Case], score: Score) -> None:
    """Tries cases and counts them."""
    for case in cases:
        verdict, done = judge.try_case(case)
        score.add(case.target.kind, case.fault.kind, case, verdict, done)
        if verdict:
            print(score.wrong[-1], file=sys.stderr, flush=True)


def main(kinds: list[str]) -> int:
    """Tries all cases of some kinds of file, or of all, and prints the table."""
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        world, score = World(Path(folder)), Score()
        judge = Judge(world)
        for target in TARGETS:
            if not kinds or target.kind in kinds:
                world.reset()
                try_cases(judge, all_cases(world, target), score)
                print(f"{score.table()}\n", flush=True)
    print("\n".join(score.wrong))
    return 1 if score.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
