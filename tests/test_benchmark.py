import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tinyvgg_jax.benchmark.__main__ import _entry, step_flops
from tinyvgg_jax.benchmark.contest import Contestant, Result, contest, ratios

# A worker that reports the time per step that its case asks for.
_WORKER = """
import sys
from tinyvgg_jax.benchmark.worker import Prepared, serve

def prepare(case):
    print("what a library prints must not disturb")
    if case.get("broken"):
        sys.exit("the reason")
    ran = []

    def run(steps):
        ran.append(steps)
        return steps * case["pace"]

    return Prepared(run, lambda: {"ran": ran, "size": case["size"]})

serve(prepare)
"""


@pytest.fixture
def worker(tmp_path: Path) -> dict[str, str]:
    """The environment in which `python -m paced` runs the worker above."""
    (tmp_path / "paced.py").write_text(_WORKER)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


def test_contestants_run_their_case_in_turns_of_the_same_length(worker: dict[str, str]) -> None:
    contestants = [
        Contestant("fast", "paced", {"pace": 0.01}, worker),
        Contestant("slow", "paced", {"pace": 0.05}, worker, is_peer=True),
    ]
    fast, slow = contest(contestants, {"size": 7}, rounds=3, seconds=1.0)
    assert (fast.name, fast.is_peer, slow.name, slow.is_peer) == ("fast", False, "slow", True)
    assert fast.seconds == pytest.approx([0.01] * 3)
    assert slow.seconds == pytest.approx([0.05] * 3)
    assert fast.facts["ran"][-3:] == [100] * 3
    assert slow.facts["ran"][-3:] == [20] * 3
    assert fast.facts["size"] == 7
    assert fast.facts["peak_host_bytes"] > 2**20
    assert fast.first_step_seconds > 0
    assert ratios(fast, slow) == pytest.approx([5.0] * 3)


def test_a_contestant_that_fails_leaves_the_others_alone(worker: dict[str, str]) -> None:
    contestants = [
        Contestant("whole", "paced", {"pace": 0.5}, worker),
        Contestant("broken", "paced", {"broken": True}, worker, is_peer=True),
    ]
    whole, broken = contest(contestants, {"size": 7}, rounds=2, seconds=0.5)
    assert whole.seconds == [0.5, 0.5]
    assert broken.seconds == []
    assert broken.error == "the reason"
    entry = _entry({"kind": "infer", "batch_size": 1}, [whole, broken])
    assert "ratio" not in entry


def test_the_ratio_is_to_the_best_peer_and_the_median_of_the_rounds() -> None:
    ours = Result("tinyvgg_jax", False, seconds=[1.0, 2.0, 1.0])
    plain = Result("eager", True, seconds=[9.0, 9.0, 9.0])
    best = Result("compiled", True, seconds=[3.0, 4.0, 2.5])
    entry = _entry({"kind": "infer", "batch_size": 1}, [ours, plain, best])
    assert entry["best_peer"] == "compiled"
    assert entry["ratios"] == [3.0, 2.0, 2.5]
    assert entry["ratio"] == 2.5


def test_the_share_of_a_matrix_product_is_of_rates() -> None:
    flops = step_flops(32)
    ours = Result("tinyvgg_jax", False, seconds=[2.0])
    product = Result("a large matrix product", False, seconds=[1.0], facts={"platform": "cpu"})
    entry = _entry({"kind": "train", "batch_size": 32}, [ours, product])
    assert entry["matmul_flops_per_second"] == 2 * 2048**3
    assert entry["share_of_matmul"] == pytest.approx(flops / 2 / (2 * 2048**3))


def test_scaling_is_the_median_of_the_rounds() -> None:
    one, two = (
        Result(name, False, seconds=seconds, facts={"devices": devices, "platform": "gpu"})
        for name, seconds, devices in (
            ("1 device", [3.0, 4.0, 2.0], 1),
            ("2 devices", [2.0, 2.0, 2.0], 2),
        )
    )
    entry = _entry({"kind": "scale", "batch_size": 1}, [one, two])
    assert entry["scaling"][1] == {"devices": 2, "speed_up": 1.5, "efficiency": 0.75}


@pytest.mark.slow
def test_it_measures_how_devices_scale(tmp_path: Path) -> None:
    done = _run("--cases=scale", "--batch_sizes=4", "--rounds=1", "--seconds=0.05", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "  4 devices: " in done.stdout and "  1 device: " not in done.stdout
    (case,) = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert [one["devices"] for one in case["scaling"]] == [1, 2, 4]


def test_a_step_has_three_times_the_operations_of_a_forward_pass() -> None:
    # Multiplications of each layer on one image: size of its output times size of its kernel.
    first = 28 * 28 * 64 * 9
    others = (
        28 * 28 * 64 * 9 * 64
        + 14 * 14 * 128 * 9 * (64 + 128)
        + 7 * 7 * 256 * 9 * (128 + 256)
        + 2304 * 256
        + 256 * 10
    )
    # The gradient with respect to the images is not needed.
    assert step_flops(2) == 2 * 2 * (2 * first + 3 * others)


def _run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinyvgg_jax.benchmark", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_measures_prints_and_writes(tmp_path: Path) -> None:
    done = _run(
        "--cases=infer,stream",
        "--inference_batch_sizes=2",
        "--rounds=2",
        "--seconds=0.05",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "infer, batch 2, float32" in done.stdout
    assert "failed" not in done.stdout
    report = json.loads((tmp_path / "benchmark.json").read_text())
    infer, stream = report["cases"]
    assert [result["name"] for result in infer["results"]] == [
        "tinyvgg_jax",
        "tinyvgg_jax, XLA alone",
    ]
    assert all(len(result["seconds"]) == 2 for result in infer["results"])
    assert stream["case"]["kind"] == "stream"
    assert report["environment"]["versions"]["jax"]


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("--cases=swim", "swim"),
        ("--peer=caffe", "caffe"),
        ("--rounds=0", "--rounds"),
        ("--batch_sizes=big", "--batch_sizes"),
    ],
)
def test_a_wrong_argument_is_named(argument: str, word: str, tmp_path: Path) -> None:
    done = _run(argument, folder=tmp_path)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr
