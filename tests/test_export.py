"""Exported networks, in every format, beside the network in JAX."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from tinyvgg_jax import UserError
from tinyvgg_jax.data import DatasetInfo, Split
from tinyvgg_jax.evaluate import evaluate
from tinyvgg_jax.export import card as cards
from tinyvgg_jax.export import layers, litert, loaded, micro, run, verify
from tinyvgg_jax.export.run import FORMATS, export_run, formats_of
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.predict import predict_files
from tinyvgg_jax.runs import files
from tinyvgg_jax.step import to_float

# The libraries of other formats warn about themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
Trained = tuple[Path, dict[str, Any]]
CommandLine = Callable[..., subprocess.CompletedProcess[str]]

NETWORKS = {
    "grey": (TinyVGG(widths=(4, 8), convs_per_block=1, hidden=8, num_classes=5), (16, 16, 1)),
    "colour": (TinyVGG(widths=(4, 6, 8), hidden=16, num_classes=3), (19, 23, 3)),
    "one block": (TinyVGG(widths=(5,), convs_per_block=3, hidden=7, num_classes=2), (9, 8, 3)),
    "bfloat16": (TinyVGG(widths=(4,), hidden=8, dtype=jnp.bfloat16), (12, 12, 1)),
}


def installed(name: str) -> bool:
    return not run._missing(name)


def require(name: str) -> None:
    if not installed(name):
        pytest.skip(f"the libraries of {name} are not installed, or have no wheels here")


def params_of(model: TinyVGG, shape: tuple[int, int, int]) -> Any:
    """Random parameters, biases included."""
    params = model.init(jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree,
        [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)],
    )


def pictures(count: int, shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(2).integers(256, size=(count, *shape)).astype(np.uint8)


def in_jax(model: TinyVGG, params: Any, images: np.ndarray) -> np.ndarray:
    model = model.clone(dtype=jnp.float32)
    return np.asarray(jax.nn.softmax(apply(model, params, to_float(jnp.asarray(images)))))


def trained_network(name: str) -> tuple[run.Trained, np.ndarray]:
    model, shape = NETWORKS[name]
    names = tuple(f"<{label}> é" for label in range(model.num_classes))
    card = cards.make_card(shape, names, step=3)
    info = DatasetInfo(shape, names)
    params = params_of(model, shape)
    return run.Trained(model, params, info, card), in_jax(model, params, pictures(6, shape))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["jax", "onnx", "litert"])
def test_a_file_computes_what_jax_computes(name: str, network: str, tmp_path: Path) -> None:
    require(name)
    trained, expected = trained_network(network)
    path = tmp_path / f"x{FORMATS[name].suffix}"
    path.write_bytes(FORMATS[name].export(trained))
    found = loaded.load(path)
    assert found.card == trained.card
    # Any number of images.
    images = pictures(6, trained.info.image_shape)
    for size in (1, 6):
        np.testing.assert_allclose(found.probabilities(images, size), expected, atol=2e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_pytorchs_layout_there_and_back_is_the_same_network(network: str, tmp_path: Path) -> None:
    require("torch")
    from safetensors.numpy import load_file

    from tinyvgg_jax.export.torch import from_torch, load_call

    trained, expected = trained_network(network)
    path = tmp_path / "x.safetensors"
    path.write_bytes(FORMATS["torch"].export(trained))
    model, params = from_torch(load_file(path), trained.info.image_shape)
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)
    assert model == trained.model.clone(dtype=jnp.float32)
    # Through PyTorch where it is installed.
    call, _ = load_call(path, trained.model, trained.info.image_shape)
    images = pictures(6, trained.info.image_shape)
    np.testing.assert_allclose(call(images), expected, atol=2e-5)


def test_tensors_of_another_network_are_one_line() -> None:
    from tinyvgg_jax.export.torch import from_torch, to_torch

    model, shape = NETWORKS["grey"]
    tensors = to_torch(model, params_of(model, shape), shape)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"conv1_1.weight": None}, "missing or superfluous: conv1_1.weight|no conv1_1|conv1_1"),
        ({"extra.weight": np.zeros(3)}, r"extra\.weight"),
        ({"dense.weight": np.zeros((8, 3))}, "not those of a Tiny VGG"),
        ({"conv2_1.bias": np.zeros(3)}, r"conv2_1's bias is \[3\], not \[8\]"),
        ({"convx.weight": np.zeros(3)}, "not those of a Tiny VGG"),
    ]
    for change, said in changes:
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        with pytest.raises(UserError, match=said):
            from_torch(changed, shape)
    with pytest.raises(UserError, match="not those of a Tiny VGG"):
        from_torch({}, shape)


def test_the_artifact_for_jax_needs_jax_alone(tmp_path: Path) -> None:
    require("jax")
    trained, expected = trained_network("colour")
    (tmp_path / "x.jax").write_bytes(FORMATS["jax"].export(trained))
    np.save(tmp_path / "images.npy", pictures(6, trained.info.image_shape))
    program = (
        "import sys, json, zipfile, numpy as np, jax.export\n"
        "exported = jax.export.deserialize(bytearray(open('x.jax', 'rb').read()))\n"
        "np.save('answers.npy', exported.call(np.load('images.npy')))\n"
        "print(sorted(exported.platforms), 'tinyvgg_jax' in sys.modules)\n"
        "print(json.loads(zipfile.ZipFile('x.jax').read('tinyvgg_jax.json'))['step'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:2] == ["['cpu', 'cuda', 'tpu'] False", "3"], done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), expected, atol=2e-5)


def test_the_graph_of_onnx_is_clean() -> None:
    require("onnx")
    import onnx

    trained, _ = trained_network("colour")
    proto = onnx.load_from_string(FORMATS["onnx"].export(trained))
    operators = [node.op_type for node in proto.graph.node]
    block = ["Conv", "Relu", "Conv", "Relu", "MaxPool"]
    head = ["Flatten", "Gemm", "Relu", "Gemm", "Softmax"]
    assert operators == ["Cast", "Mul", "Transpose", *3 * block, *head]
    assert [output.name for output in proto.graph.output] == ["logits", "probabilities"]


def test_int8_for_litert_is_int8_everywhere() -> None:
    require("litert")
    trained, _ = trained_network("grey")
    quantize = FORMATS["litert"].quantize
    assert quantize is not None
    content = quantize(trained, pictures(20, (16, 16, 1)))
    artifact, card = cards.read_appended(content)
    assert card == trained.card
    graph = micro.inspect(artifact, pictures(3, (16, 16, 1)))
    assert set(graph.operators) <= set(micro._OPERATORS)
    assert graph.operators.count("MAX_POOL_2D") == 2
    (in_scale, in_zero), (out_scale, out_zero) = graph.scales
    assert in_scale == pytest.approx(1 / 255) and in_zero == -128
    assert (out_scale, out_zero) == (1 / 256, -128)


# Runs


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a run in every format that can be made here."""
    workdir = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(trained[0], workdir)
    files, table, module = export_run(workdir, formats_of("all", False))
    assert len(table.splitlines()) == len(files) + 5 and "nn.Conv2d(1, 4, 3, padding=1)" in module
    (said,) = [line for line in table.splitlines() if "not run in PyTorch or a browser" in line]
    assert "page" in said
    assert (": torch, " in said) == (importlib.util.find_spec("torch") is None)
    quantized, *_ = export_run(workdir, formats_of("all", True), int8=True)
    return {path.name: path for path in [*files, *quantized]}


def test_it_computes_in_whole_float32_on_a_gpu_too(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("jax")
    precisions = []

    def spy(*arguments: Any, **others: Any) -> Any:
        precisions.append(jax.config.jax_default_matmul_precision)  # type: ignore[attr-defined]
        return evaluate(*arguments, **others)

    monkeypatch.setattr(run, "evaluate", spy)
    path = tmp_path / "model.jax"
    export_run(trained[0], ["jax"], output=path)
    assert set(precisions) == {"highest"}
    content, _ = cards.read_appended(path.read_bytes())
    module = jax.export.deserialize(bytearray(content)).mlir_module()
    assert "precision HIGHEST" in module and "precision DEFAULT" not in module


def test_every_format_is_written_and_verified(exported: dict[str, Path]) -> None:
    assert {"model.jax", "model.onnx", "model.int8.onnx", "model.safetensors"} <= set(exported)
    if installed("litert"):
        assert {"model.tflite", "model.int8.tflite", "model_int8.h"} <= set(exported)
    (folder,) = {path.parent for path in exported.values()}
    assert sorted(path.name for path in folder.iterdir()) == sorted(exported)


@pytest.mark.parametrize(
    "name", ["model.jax", "model.onnx", "model.int8.onnx", "model.tflite", "model.int8.tflite"]
)
def test_a_damaged_file_is_one_line(exported: dict[str, Path], name: str, tmp_path: Path) -> None:
    if name not in exported:
        pytest.skip("litert is not installed here")
    content = exported[name].read_bytes()
    found = loaded.load(exported[name])
    assert found.card["step"] == 24 and found.class_names[0] == "top"
    flipped = [bytearray(content) for _ in range(8)]
    for i, copy in enumerate(flipped):
        copy[(2 * i + 1) * len(content) // 16] ^= 16
    damaged = [b"", b"x", content[: len(content) // 2], content[:-10], *map(bytes, flipped)]
    path = tmp_path / name
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is no exported network, or is damaged"):
            loaded.load(path)


def test_what_is_no_model_is_one_line(exported: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(exported["model.onnx"], tmp_path / "x.jax")
    for path, said in [
        (tmp_path / "x.jax", "is no exported network"),
        (tmp_path / "y.onnx", "cannot be read"),
        (exported["model.safetensors"], "a model to run ends in .jax, .onnx, .tflite"),
    ]:
        with pytest.raises(UserError, match=said):
            loaded.load(path)
    os.mkfifo(tmp_path / "z.onnx")
    with pytest.raises(UserError, match="not a regular file"):
        loaded.load(tmp_path / "z.onnx")


def test_an_exported_network_predicts_as_the_run_does(
    exported: dict[str, Path], trained: Trained
) -> None:
    from tinyvgg_jax import load_predictor

    pictures_folder = [ROOT / "tests" / "pictures"]
    expected = list(predict_files(load_predictor(trained[0]), pictures_folder))
    for name in ("model.jax", "model.onnx", "model.tflite"):
        if name in exported:
            found = list(predict_files(loaded.load(exported[name]), pictures_folder))
            assert len(found) == len(expected) > 1
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a.probabilities, b.probabilities, atol=2e-5)  # type: ignore[union-attr]


def test_the_pair_for_microcontrollers_compiles_and_tells_all(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    if "model_int8.h" not in exported:
        pytest.skip("litert is not installed here")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    (tmp_path / "main.cc").write_text(
        """
#include "model_int8.h"
#include <cstdio>
struct Resolver {
  void AddConv2D() { ++n; } void AddMaxPool2D() { ++n; } void AddReshape() { ++n; }
  void AddFullyConnected() { ++n; } void AddSoftmax() { ++n; } void AddDepthwiseConv2D() { ++n; }
  int n = 0;
};
int main() {
  Resolver resolver;
  tiny_vgg::AddOperators(resolver);
  std::printf("%d %d %zu %d %s\\n", resolver.n, tiny_vgg::kNumOperators, tiny_vgg::kModelSize,
              tiny_vgg::kNumTests, tiny_vgg::kClassNames[1]);
  std::fwrite(tiny_vgg::kModel, 1, tiny_vgg::kModelSize, stderr);
}
"""
    )
    folder = exported["model_int8.h"].parent
    for standard in ("c++11", "c++17"):
        subprocess.run(
            [
                compiler,
                f"-std={standard}",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-pedantic",
                f"-I{folder}",
                "main.cc",
                str(folder / "model_int8.cc"),
                "-o",
                "main",
            ],
            cwd=tmp_path,
            check=True,
        )
    done = subprocess.run([tmp_path / "main"], capture_output=True, check=True)
    operators, number, size, tests, name = done.stdout.split()
    assert operators == number and tests == b"10" and name == b"upper"
    artifact, _ = cards.read_appended(exported["model.int8.tflite"].read_bytes())
    assert done.stderr == artifact and int(size) == len(artifact)


def test_tensorflow_lite_micro_gives_the_outputs_in_the_header(exported: dict[str, Path]) -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro has no wheel here")
    from tflite_micro import runtime

    if "model.int8.tflite" not in exported:
        pytest.skip("litert is not installed here")
    artifact, _ = cards.read_appended(exported["model.int8.tflite"].read_bytes())
    test = micro.inspect(artifact, pictures(10, (16, 16, 1))).test
    arena = micro.measure_arena(artifact, test)
    assert arena is not None and arena < 48 << 10
    assert f"kArenaSize = {arena};" in exported["model_int8.h"].read_text()
    interpreter = runtime.Interpreter.from_bytes(artifact, arena_size=arena)
    for image, expected in zip(test.images, test.outputs, strict=True):
        interpreter.set_input(image[None], 0)
        interpreter.invoke()
        np.testing.assert_array_equal(interpreter.get_output(0)[0], expected)


def test_tensorflow_lite_micro_finds_the_weights_of_large_networks() -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro has no wheel here")
    require("litert")
    images = pictures(10, (8, 8, 1))
    model = TinyVGG(widths=(64, 64, 64), hidden=2000, num_classes=3)
    params = model.init(jax.random.key(0), images[:1] / 255)["params"]
    artifact = litert.quantized(litert.to_litert(model, params, (8, 8, 1)), images)
    assert len(artifact) > 256 << 10
    test = micro.inspect(artifact, images).test
    assert len(np.unique(test.outputs)) > 2
    # Weights are read where they are, so the arena is for activations alone.
    arena = micro.measure_arena(artifact, test)
    assert arena is not None and arena < 64 << 10
    with pytest.raises(UserError, match="TensorFlow Lite Micro computes other outputs"):
        micro.measure_arena(artifact, test._replace(outputs=test.outputs[:, ::-1]))


def test_what_tensorflow_lite_micro_cannot_run_is_an_error() -> None:
    pytest.importorskip("tflite_micro", reason="tflite-micro has no wheel here")
    test = micro.MicroTest(np.zeros((1, 8, 8, 1), np.int8), np.zeros((1, 3), np.int8))
    with pytest.raises(UserError, match=r"TensorFlow Lite Micro cannot run this network: .*16 MiB"):
        micro.measure_arena(b"no network" * 100, test)


def test_a_file_says_nothing_of_the_machine_that_trained(exported: dict[str, Path]) -> None:
    card = loaded.load(exported["model.jax"]).card
    assert card["config"]["data"]["data_dir"] is None and card["config"]["init_from"] is None
    assert card["test_accuracy"] > 0.1
    quantized = loaded.load(exported["model.int8.onnx"]).card
    assert "test_accuracy" not in quantized
    assert quantized["float32_test_accuracy"] == card["test_accuracy"]


def test_names_are_safe_in_c() -> None:
    assert micro._string('a"b\\?é\n') == r'"a\042b\134\077\303\251\012"'


def test_the_header_names_no_size_of_the_arena_that_it_does_not_know() -> None:
    card = cards.make_card((8, 8, 1), ("a", "b"), step=1)
    test = micro.MicroTest(np.zeros((1, 8, 8, 1), np.int8), np.zeros((1, 2), np.int8))
    graph = micro.Graph(["CONV_2D"], ((0.1, -128), (0.1, -128)), test)
    assert "kArenaSize" not in micro._header(graph, card, None, 100, "x")
    known = micro._header(graph, card, 4096, 100, "x")
    assert "kArenaSize bytes are enough" in known and "kArenaSize = 4096;" in known


def test_the_table_names_the_batches_that_were_run() -> None:
    row = verify.Verified("JAX", None, 0, 0.9, 0, 0.0, (1.0, 0.5))
    small, large = verify.table([row], "validation", 80), verify.table([row], "test", 5000)
    assert "ms, 80" in small and "of 1 on one thread (JAX: on all cores) and of 80." in small
    assert "ms, 256" in large and "and of 256." in large


@pytest.mark.parametrize("name", ["onnx", "litert"])
def test_libraries_print_nothing(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    require(name)
    trained = trained_network("grey")[0]
    images = pictures(600, trained.info.image_shape)
    run._made(FORMATS[name], trained, Split(images, np.zeros(600, np.int32)), True)
    assert capfd.readouterr() == ("", "")


# Errors


@pytest.mark.parametrize("name", ["jax", "onnx", "litert", "torch"])
@pytest.mark.parametrize("shape", [(12, 16, 1), (16, 16, 3)])
def test_parameters_of_another_network_are_refused(name: str, shape: tuple[int, int, int]) -> None:
    require(name)
    trained = trained_network("grey")[0]
    other = trained._replace(info=DatasetInfo(shape, trained.info.class_names))
    with pytest.raises(ValueError, match=r"'s kernel is \[.*\], not \[.*\] as for images of \["):
        FORMATS[name].export(other)


def test_a_network_that_is_not_the_same_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("jax")
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    right = layers.layers_of

    def wrong(*network: Any) -> list[layers.Layer]:
        result = right(*network)
        return [*result[:-1], result[-1]._replace(bias=result[-1].bias[::-1])]

    monkeypatch.setattr("tinyvgg_jax.export.stablehlo.layers_of", wrong)
    with pytest.raises(UserError, match="otherwise than JAX, and not by rounding"):
        export_run(workdir, ["jax"])
    assert list((workdir / "export").iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(trained: Trained, tmp_path: Path) -> None:
    require("jax")
    path = tmp_path / f"{'a' * 250}.jax"
    with pytest.raises(UserError, match=f"cannot write to {path}: File name too long"):
        export_run(trained[0], ["jax"], output=path, verified=False)


def test_nothing_is_written_to_what_holds_no_run(tmp_path: Path) -> None:
    require("jax")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(UserError, match=f"{name} holds no run"):
            export_run(tmp_path / name, ["jax"])
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: what is there is no file"):
        files.output_file(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "target").touch()
    assert files.output_file(tmp_path / "link") == (tmp_path / "target").resolve()
    assert files.output_file(tmp_path / "new" / "file") == tmp_path / "new" / "file"
    assert (tmp_path / "new").is_dir()


def test_what_the_function_is_given_is_checked(trained: Trained, tmp_path: Path) -> None:
    require("jax")
    require("torch")
    with pytest.raises(UserError, match="the format torch has no int8"):
        export_run(trained[0], ["torch"], int8=True)
    with pytest.raises(UserError, match="one file is named, and 2 formats"):
        export_run(trained[0], ["jax", "torch"], output=tmp_path / "x.jax")


def test_int8_that_loses_too_much_is_an_error() -> None:
    reference = np.eye(10, dtype=np.float32)
    row = verify.Verified("onnx int8", Path("x"), 1, 0.9, 1, 0.1)
    verify.require_same(row, None, reference, 0.902)
    with pytest.raises(UserError, match="int8 loses too much"):
        verify.require_same(row, None, reference, 0.904)
    # 15 of 5,000 are 0.3 points, but 0.95 - 0.947 is a little more than 0.003.
    verify.require_same(row._replace(accuracy=0.947), None, reference, 0.95)


def test_classes_change_places_by_rounding_only() -> None:
    reference = np.array([[0.5, 0.5, 0.0], [0.6, 0.4, 0.0]], np.float32)
    row = verify.Verified("onnx", Path("x"), 1, 0.9, 1, 0.01)
    verify.require_same(row, np.array([[0.49, 0.5, 0], [1, 0, 0]]), reference, 0.9)
    with pytest.raises(UserError, match="classifies 1 of 2 images otherwise"):
        verify.require_same(row, np.array([[0.5, 0.5, 0], [0, 1, 0]]), reference, 0.9)


@pytest.mark.parametrize("largest", [0.02, float("nan")])
def test_other_probabilities_are_an_error_though_the_classes_are_the_same(largest: float) -> None:
    reference = np.array([[0.5, 0.3, 0.2]], np.float32)
    row = verify.Verified("onnx", Path("x"), 1, 1.0, 0, largest)
    with pytest.raises(UserError, match="computes probabilities that differ"):
        verify.require_same(row, reference, reference, 1.0)


@pytest.mark.parametrize(
    ("names", "int8", "said"),
    [
        ("onxx", False, r"unknown format 'onxx'; one of .*did you mean 'onnx'"),
        ("", False, "unknown format ''"),
        ("jax,torch", True, "the format jax has no int8; onnx, litert have"),
        ("page,all", False, "all stands alone"),
    ],
)
def test_formats_are_known(names: str, int8: bool, said: str) -> None:
    with pytest.raises(UserError, match=said):
        formats_of(names, int8)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in FORMATS.items():
        if name == "page":  # It needs none.
            continue
        for library in kind.libraries:
            monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=rf"tinyvgg-jax\[{kind.extra}\]"):
            formats_of(name, False)
    assert formats_of("all", False) == ["page"]
    with pytest.raises(UserError, match="no format has its libraries"):
        formats_of("all", True)
