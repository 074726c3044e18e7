import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from tinyvgg_jax.benchmark import __main__ as command
from tinyvgg_jax.benchmark.cases import Setting, epoch, infer, train
from tinyvgg_jax.benchmark.contest import Contestant, Result, contest, ratios
from tinyvgg_jax.benchmark.processor import Processor, from_cpuinfo
from tinyvgg_jax.benchmark.results import entry_of, table
from tinyvgg_jax.benchmark.roofline import layers, roofline, step_bytes, step_flops

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
        if len(ran) == case.get("dies_after"):
            sys.exit("out of memory")
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
        # One turn finds the number of steps, and the next is the first that counts.
        Contestant("dying", "paced", {"pace": 0.5, "dies_after": 2}, worker, is_peer=True),
    ]
    whole, broken, dying = contest(contestants, {"size": 7}, rounds=2, seconds=0.5)
    assert whole.seconds == [0.5, 0.5]
    assert broken.seconds == dying.seconds == []
    assert broken.error == "the reason"
    assert dying.error == "out of memory"
    entry = entry_of({"kind": "infer", "batch_size": 1}, [whole, broken, dying])
    assert "comparisons" not in entry


def test_each_dtype_is_compared_with_the_best_peer_of_all_dtypes() -> None:
    def result(name: str, seconds: list[float], mebibytes: int, **role: Any) -> Result:
        facts = {"peak_host_bytes": mebibytes * 2**20}
        return Result(name, seconds=seconds, facts=facts, first_step_seconds=1.0, **role)

    results = [
        result("float32", [1.0, 2.0, 1.0], 5, is_compared=True),
        result("bfloat16", [0.5, 0.5, 0.5], 5, is_compared=True),
        result("XLA alone", [9.0, 9.0, 9.0], 5),
        result("peer, float32", [9.0, 9.0, 9.0], 3, is_peer=True),
        result("peer, bfloat16", [3.0, 4.0, 2.5], 4, is_peer=True),
        Result("peer, broken", is_peer=True, error="the reason"),
    ]
    entry = entry_of({"kind": "infer", "batch_size": 1}, results)
    assert entry["comparisons"] == [
        {"name": "float32", "peer": "peer, bfloat16", "ratio": 2.5, "rounds": [3.0, 2.0, 2.5]},
        {"name": "bfloat16", "peer": "peer, bfloat16", "ratio": 6.0, "rounds": [6.0, 8.0, 5.0]},
    ]
    assert entry["least_memory"] == {"name": "peer, float32", "bytes": 3 * 2**20}
    shown = table(entry, results, "a processor")
    assert shown.startswith("infer, batch 1, on a processor\n")
    assert "float32: 2.50 times as fast as the fastest peer, peer, bfloat16 (rounds" in shown
    assert "3 MiB, peer, float32" in shown
    assert "peer, broken" in shown and "failed: the reason" in shown


def test_the_peer_takes_part_in_every_dtype() -> None:
    setting = Setting(on_cpu=True, dtypes=("float32", "bfloat16"), peer="torch")
    for _, contestants in (train(setting, 32), infer(setting, 1), epoch(setting)):
        peers = [one.case for one in contestants if one.is_peer]
        for dtype in setting.dtypes:
            own = [case for case in peers if case["dtype"] == dtype]
            assert {case["compile"] for case in own} == {"", "default"}
        compared = [one.case["dtype"] for one in contestants if one.is_compared]
        assert compared == ["float32", "bfloat16"]
    alone = Setting(on_cpu=True, dtypes=("float32",))
    assert not any(one.is_peer for one in train(alone, 32)[1] + epoch(alone)[1])


def test_all_contestants_of_a_large_batch_have_room_on_a_gpu() -> None:
    setting = Setting(False, ("float32", "bfloat16"), "torch")
    counts = {size: sum(c.is_peer for c in train(setting, size)[1]) for size in (512, 4096)}
    assert counts == {512: 16, 4096: 4}


@pytest.mark.parametrize(
    ("text", "model", "instructions"),
    [
        (
            "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n"
            "model name\t: Intel(R) Xeon(R)\npower management:\n"
            "flags\t\t: fpu avx2 amx_bf16 avx512f avx512_bf16\n\n"
            "processor\t: 1\nmodel name\t: another\nflags\t\t: fpu\n",
            "Intel(R) Xeon(R), family 6 model 143",
            ("AVX2", "AVX-512F", "AVX512_BF16", "AMX_BF16"),
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 sve\n", "", ("NEON", "SVE", "BF16")),
        ("", "", ()),
    ],
)
def test_the_processor_is_named(text: str, model: str, instructions: tuple[str, ...]) -> None:
    assert from_cpuinfo(text) == (model, instructions)
    has_bfloat16 = "bf16" in text
    assert Processor(model, 2, instructions).has_bfloat16 == has_bfloat16


@pytest.mark.parametrize("instructions", [("AVX2",), ("AVX2", "AMX_BF16")])
def test_bfloat16_is_left_out_where_it_would_be_imitated(
    instructions: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The command sets it for its workers.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(command, "find_processor", lambda: Processor("Alpha", 2, instructions))
    dtypes: list[str] = []

    def run(contestants: list[Contestant], *_: Any) -> list[Result]:
        dtypes.extend(one.case["dtype"] for one in contestants if one.is_compared)
        return []

    monkeypatch.setattr(command, "contest", run)
    arguments = ["--cases=infer", "--inference_batch_sizes=1", f"--json={tmp_path / 'b.json'}"]
    assert command.main(arguments) == 0
    shown = capsys.readouterr().out
    assert ("bfloat16 is left out" in shown) == (dtypes == ["float32"]) == (len(instructions) == 1)
    assert f"on 2 cores of Alpha ({', '.join(instructions)})" in shown
    dtypes.clear()
    assert command.main([*arguments, "--dtypes=float32,bfloat16"]) == 0
    assert dtypes == ["float32", "bfloat16"]
    assert "left out" not in capsys.readouterr().out


def test_shares_are_of_the_rates_of_a_product_and_a_copy() -> None:
    case = {"kind": "train", "batch_size": 32, "dtype": "float32"}
    flops, traffic = step_flops(32), step_bytes(32, 4)
    product = {"kind": "matmul", "size": 1000, "dtype": "float32"}
    for seconds, bound in ((1.0, "compute"), (1e-9, "memory")):
        # The product takes `seconds`, and the copy moves as many bytes as a step in one second.
        results = [
            Result("ours", is_compared=True, case=case, seconds=[2.0]),
            Result("product", case=product, seconds=[seconds]),
            Result("copy", case={"kind": "copy", "bytes": traffic // 2}, seconds=[1.0]),
        ]
        (roof,) = entry_of(case, results)["rooflines"]
        assert roof["bound"] == bound
        rate = 2 * 1000**3 / seconds
        assert roof["share_of_matmul"] == pytest.approx(flops / 2 / rate)
        assert roof["share_of_roof"] == pytest.approx(max(flops / rate, 1.0) / 2)
    assert roofline(case, 1.0, None)["bound"] == "compute"


def test_scaling_is_the_median_of_the_rounds() -> None:
    one, two = (
        Result(name, False, seconds=seconds, facts={"devices": devices, "platform": "gpu"})
        for name, seconds, devices in (
            ("1 device", [3.0, 4.0, 2.0], 1),
            ("2 devices", [2.0, 2.0, 2.0], 2),
        )
    )
    entry = entry_of({"kind": "scale", "batch_size": 1}, [one, two])
    assert entry["scaling"][1] == {"devices": 2, "speed_up": 1.5, "efficiency": 0.75}
    # Without one device there is nothing to compare with.
    one.seconds = []
    assert "scaling" not in entry_of({"kind": "scale", "batch_size": 1}, [one, two])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells peaks")
def test_the_peak_of_a_worker_is_its_own() -> None:
    # This process has more memory than the worker.
    np.ones(300 << 20, np.uint8).sum()
    code = "from tinyvgg_jax.benchmark import worker; print(worker.peak_host_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert 2**20 < int(done.stdout) < 200 << 20


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


def test_the_layers_have_the_parameters_of_the_network() -> None:
    assert sum(layer.parameters for layer in layers()[0]) == 1_736_906
    # One convolution of 1 to 2 channels at 28x28, pooled to 14x14; 392 to 3 to 10 features.
    network = {"widths": [2], "convs_per_block": 1, "hidden": 3}
    images, maps, pooled = 28 * 28, 28 * 28 * 2, 14 * 14 * 2
    convolution = 2 * images + 3 * maps
    values = convolution + 3 * maps + 2 * pooled + (3 * pooled + 4 * 3) + (3 * 3 + 4 * 10)
    parameters = (9 * 2 + 2) + (pooled + 1) * 3 + 4 * 10
    assert step_bytes(5, 2, network) == 5 * values * 2 + 8 * 4 * parameters


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
        "--dtypes=float32",
        "--rounds=2",
        "--seconds=0.05",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "infer, batch 2, on " in done.stdout
    assert "failed" not in done.stdout
    report = json.loads((tmp_path / "benchmark.json").read_text())
    infer, stream = report["cases"]
    assert [result["name"] for result in infer["results"]] == [
        "tinyvgg_jax, float32",
        "tinyvgg_jax, float32, XLA alone",
    ]
    assert all(len(result["seconds"]) == 2 for result in infer["results"])
    assert stream["case"]["kind"] == "stream"
    environment = report["environment"]
    assert environment["versions"]["jax"]
    assert environment["processor"] in done.stdout
    assert environment["cpu_count"] >= 1


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("--cases=swim", "swim"),
        ("--dtypes=float64", "float64"),
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
