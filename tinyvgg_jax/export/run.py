"""Export of a run: from its checkpoint to verified files in `WORKDIR/export/`."""

import contextlib
import importlib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinyvgg_jax.config import suggestion
from tinyvgg_jax.data import DatasetInfo, Split
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.evaluate import Evaluation, evaluate
from tinyvgg_jax.export import card as cards
from tinyvgg_jax.export import loaded, verify
from tinyvgg_jax.export.card import Card
from tinyvgg_jax.export.page import SplitPredictions
from tinyvgg_jax.model import TinyVGG
from tinyvgg_jax.paths import local_path
from tinyvgg_jax.predict import Predictor
from tinyvgg_jax.report.evaluation import AS_IN_CONFIG, DataFolders, load_run_splits
from tinyvgg_jax.runs.files import output_file, subfolder, write_bytes, write_text, writing_to
from tinyvgg_jax.runs.folder import read_dataset
from tinyvgg_jax.runs.restore import restore_checkpoint, single_run_config

# Images of the train split on which the ranges of an int8 network are measured.
_CALIBRATION_IMAGES = 500


class Trained(NamedTuple):
    """A trained network, and what its files say about it.

    Attributes:
        model: the network, in float32.
        params: its parameters.
        info: its dataset's image shape and class names.
        card: its card.
        tested: its predictions on the test split, if they are known.
        verified_on: those on the validation split, if its files are verified.
        title: a title for people, the name of the run's folder.
    """

    model: TinyVGG
    params: Any
    info: DatasetInfo
    card: Card
    tested: SplitPredictions | None = None
    verified_on: SplitPredictions | None = None
    title: str = "Tiny VGG"


class Format(NamedTuple):
    """A format of exported networks.

    Attributes:
        suffix: the suffix of its files.
        libraries: the modules that it needs, besides JAX.
        extra: the extra of this package that installs them.
        export: makes the bytes of a file.
        quantize: makes the bytes of an int8 file from images `[N, H, W, C]` uint8 for
            calibration; None if the format has no int8.
        stem: the name of its files without their suffix.
        tested: whether it needs the network's predictions on the test split.
    """

    suffix: str
    libraries: tuple[str, ...]
    extra: str
    export: Callable[[Trained], bytes]
    quantize: Callable[[Trained, np.ndarray], bytes] | None = None
    stem: str = "model"
    tested: bool = False


def _export_jax(trained: Trained) -> bytes:
    from tinyvgg_jax.export.stablehlo import to_stablehlo

    artifact = to_stablehlo(trained.model, trained.params, trained.info.image_shape)
    return cards.append_card(artifact, trained.card)


def _export_onnx(trained: Trained) -> bytes:
    from tinyvgg_jax.export import onnx

    artifact = onnx.to_onnx(trained.model, trained.params, trained.info.image_shape)
    return onnx.with_card(artifact, trained.card)


def _quantize_onnx(trained: Trained, images: np.ndarray) -> bytes:
    from tinyvgg_jax.export import onnx

    artifact = onnx.to_onnx(trained.model, trained.params, trained.info.image_shape)
    return onnx.with_card(onnx.quantized(artifact, images), trained.card)


def _export_litert(trained: Trained) -> bytes:
    from tinyvgg_jax.export.litert import to_litert

    artifact = to_litert(trained.model, trained.params, trained.info.image_shape)
    return cards.append_card(artifact, trained.card)


def _quantize_litert(trained: Trained, images: np.ndarray) -> bytes:
    from tinyvgg_jax.export import litert

    artifact = litert.to_litert(trained.model, trained.params, trained.info.image_shape)
    return cards.append_card(litert.quantized(artifact, images), trained.card)


def _export_torch(trained: Trained) -> bytes:
    from tinyvgg_jax.export import torch

    tensors = torch.to_torch(trained.model, trained.params, trained.info.image_shape)
    return torch.to_safetensors(tensors, trained.card)


def _export_page(trained: Trained) -> bytes:
    from tinyvgg_jax.export.page import to_page

    assert trained.tested is not None
    model, params, card = trained.model, trained.params, trained.card
    return to_page(model, params, card, trained.tested, trained.title, trained.verified_on)


FORMATS = {
    "jax": Format(".jax", ("flatbuffers",), "export", _export_jax),
    "onnx": Format(".onnx", ("onnx", "onnxruntime"), "onnx", _export_onnx, _quantize_onnx),
    "litert": Format(
        ".tflite",
        ("litert_converter", "litert_quantizer", "ai_edge_litert"),
        "litert",
        _export_litert,
        _quantize_litert,
    ),
    "torch": Format(".safetensors", ("safetensors",), "export", _export_torch),
    "page": Format(".html", (), "", _export_page, stem="page", tested=True),
}


class Exported(NamedTuple):
    """Result of `export_run`.

    Attributes:
        files: the files.
        table: the table of their verification; empty without one.
        torch_module: the code of the PyTorch module that a safetensors file loads into; empty if
            there is none.
    """

    files: list[Path]
    table: str
    torch_module: str


def formats_of(names: str, int8: bool) -> list[str]:
    """Parses the names of formats, and checks that their libraries are there.

    Args:
        names: names from `FORMATS` with commas between them; or "all", for those whose libraries
            are there.
        int8: whether int8 files are wanted.

    Returns:
        The names.

    Raises:
        UserError: if a name is unknown, its libraries are missing, or it has no int8.
    """
    if names == "all":
        usable = [name for name, kind in FORMATS.items() if not int8 or kind.quantize]
        found = [name for name in usable if not _missing(name)]
        if not found:
            raise UserError(
                "no format has its libraries: pip install 'tinyvgg-jax[export,onnx,litert]'."
            )
        return found
    wanted = list(dict.fromkeys(names.split(",")))
    if "all" in wanted:
        raise UserError(f"{names!r} names formats beside all, but all stands alone.")
    for name in wanted:
        if name not in FORMATS:
            known = ", ".join([*FORMATS, "all"])
            raise UserError(f"unknown format {name!r}; one of {known}{suggestion(name, FORMATS)}")
        if int8 and not FORMATS[name].quantize:
            with_int8 = ", ".join(name for name, kind in FORMATS.items() if kind.quantize)
            raise UserError(f"the format {name} has no int8; {with_int8} have.")
        if missing := _missing(name):
            raise UserError(missing)
    return wanted


def _missing(name: str) -> str:
    """Says which library of a format is missing; "" if none is."""
    kind = FORMATS[name]
    try:
        with loaded.quiet():
            for library in kind.libraries:
                importlib.import_module(library)
        return ""
    except ImportError as error:
        message = (
            f"the format {name} needs {' and '.join(kind.libraries)} ({error}): "
            f"pip install 'tinyvgg-jax[{kind.extra}]'."
        )
    if name == "litert":
        message += (
            " They exist for Python 3.11, 3.13 and 3.14 on Linux x86-64 and macOS arm64 only."
        )
    return message


def export_run(
    workdir: str | Path,
    formats: list[str],
    step: int | str = "best",
    *,
    int8: bool = False,
    output: str | Path | None = None,
    verified: bool = True,
    folders: DataFolders = AS_IN_CONFIG,
) -> Exported:
    """Exports a run's network to files, and verifies them on the validation split.

    Args:
        workdir: the folder that `train_and_evaluate` wrote.
        formats: as from `formats_of`.
        step: the checkpoint, as in `restore`.
        int8: whether the files are quantized to int8.
        output: the file to write, of a single format; None for files in `WORKDIR/export`.
        verified: whether the files are verified.
        folders: folders of the data that replace those of the run's config.

    Returns:
        The files, and what there is to say about them.

    Raises:
        UserError: if there is no such run or checkpoint; if the data cannot be loaded; if a file
            cannot be written, or is not the same network, in which case it is not kept.
    """
    workdir, formats = local_path(workdir), formats_of(",".join(formats), int8)
    if output is not None and len(formats) > 1:
        raise UserError(f"one file is named, and {len(formats)} formats are to be written.")
    single_run_config(workdir)  # Nothing is written to a folder that holds no run.
    targets = {name: _target(workdir, name, int8, output) for name in formats}
    wanted = {*(("validation", "test") if verified else ()), *(("train", "test") if int8 else ())}
    if any(FORMATS[name].tested for name in formats):
        wanted.add("test")
    # By default a GPU multiplies float32 numbers in TF32, with ten bits after the point.
    with jax.default_matmul_precision("highest"):
        return _export(workdir, step, int8, targets, wanted, verified, folders)


def _export(
    workdir: Path,
    step: int | str,
    int8: bool,
    targets: dict[str, Path],
    wanted: set[str],
    verified: bool,
    folders: DataFolders,
) -> Exported:
    """Exports a run's network to the files of each format, as `export_run` does."""
    trained, splits, evaluated = _load(workdir, step, int8, wanted, folders)
    check = Check(trained, splits["validation"], evaluated["validation"]) if verified else None
    files: list[Path] = []
    for name in targets:
        content = _content(name, trained, splits.get("train"), int8)
        _write(targets[name], content, partial(check.verify, name, int8) if check else None)
        files.append(targets[name])
        if name == "litert" and int8:
            files += _write_micro(targets[name], content, trained, splits["test"])
    from tinyvgg_jax.export.torch import torch_module

    module = torch_module(trained.model, trained.info.image_shape) if "torch" in targets else ""
    return Exported(files, check.table() if check else "", module)


def _load(
    workdir: Path, step: int | str, int8: bool, wanted: set[str], folders: DataFolders
) -> tuple[Trained, dict[str, Split], dict[str, Evaluation]]:
    """Restores a run's network, loads splits, evaluates it on those held out, makes its card."""
    config, info = single_run_config(workdir), read_dataset(workdir)
    model, restored = restore_checkpoint(workdir, config, info, step)
    # Files compute in float32, so that is what they are compared with.
    model = model.clone(dtype=jnp.float32, native=False)
    # The train split calibrates, and images of the test split become a test on the board.
    splits = load_run_splits(config, sorted(wanted), folders)[0] if wanted else {}
    evaluated = {
        name: evaluate(model, restored.params, split)
        for name, split in splits.items()
        if name != "train"
    }
    # An int8 file's card names the accuracies of the float32 network, before it is quantized.
    known = {
        f"{'float32_' if int8 else ''}{name}_accuracy": result.accuracy
        for name, result in evaluated.items()
    }
    card = cards.make_card(
        info.image_shape,
        info.class_names,
        info.fit,
        config=_public(config),
        step=restored.step,
        dtype="int8" if int8 else "float32",
        **known,
    )
    predictions = {
        name: SplitPredictions(splits[name].images, splits[name].labels, result.probabilities)
        for name, result in evaluated.items()
    }
    tested, verified_on = predictions.get("test"), predictions.get("validation")
    title = workdir.resolve().name
    trained = Trained(model, restored.params, info, card, tested, verified_on, title)
    return trained, splits, evaluated


def _public(config: ConfigDict) -> dict[str, Any]:
    """Makes a dict of a config, without the folders of the machine that trained."""
    content = config.to_dict()
    content["data"] |= {"data_dir": None, "source_dir": None}
    return content | {"init_from": None}


def _target(workdir: Path, name: str, int8: bool, output: str | Path | None) -> Path:
    """Names the file of a format; checks `output` before anything is computed."""
    suffix = FORMATS[name].suffix
    if output is None:
        file = f"{FORMATS[name].stem}{'.int8' if int8 else ''}{suffix}"
        return subfolder(workdir, "export") / file
    if local_path(output).suffix != suffix:
        raise UserError(f"{output}: a file of the format {name} ends in {suffix}.")
    return output_file(output)


def _content(name: str, trained: Trained, train: Split | None, int8: bool) -> bytes:
    """Makes the bytes of a file."""
    kind = FORMATS[name]
    try:
        return _made(kind, trained, train, int8)
    except Exception as error:
        # Each library raises its own exceptions for a network that it cannot hold.
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"this network cannot be exported as {name}{' int8' if int8 else ''}: {what}"
        ) from error


def _made(kind: Format, trained: Trained, train: Split | None, int8: bool) -> bytes:
    with (
        loaded.quiet(),
        Path(os.devnull).open("w") as null,
        # The libraries show bars of their own.
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        if int8 and kind.quantize and train is not None:
            # Images from everywhere in the split, whatever its order is.
            chosen = np.linspace(0, len(train) - 1, _CALIBRATION_IMAGES).astype(int)
            return kind.quantize(trained, train.images[np.unique(chosen)])
        return kind.export(trained)


def _write(path: Path, content: bytes, check: Callable[[Path], None] | None) -> None:
    """Writes a file, and gives it its name when it is verified."""
    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write_bytes(scratch, content)
        if check:
            check(scratch)
        with writing_to(path):
            scratch.replace(path)
    except UserError as error:
        raise UserError(str(error).replace(str(scratch), str(path))) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def _write_micro(path: Path, content: bytes, trained: Trained, data: Split) -> list[Path]:
    """Writes the C++ pair of an int8 network, with images of the test split."""
    from tinyvgg_jax.export import micro

    artifact, _ = cards.read_appended(content)
    # The name stands in the code, too.
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    images, labels = data.images[: micro.TESTS], data.labels[: micro.TESTS]
    texts: dict[str, str] = {}
    try:
        with loaded.quiet():
            texts = micro.to_micro(artifact, images, labels, trained.card, name)
        for file, text in texts.items():
            write_text(path.with_name(file), text)
    except UserError:
        # The three files belong together. Those of an earlier export would be of another network.
        for file in (path.name, f"{name}.h", f"{name}.cc"):
            with contextlib.suppress(OSError):
                path.with_name(file).unlink(missing_ok=True)
        raise
    return [path.with_name(file) for file in texts]


class Check:
    """Verification of the files of a run, one after another."""

    def __init__(self, trained: Trained, data: Split, result: Evaluation):
        """Prepares the comparisons.

        Args:
            trained: the network.
            data: the validation split.
            result: the network's evaluation on it.
        """
        self._trained, self._data, self._reference = trained, data, result.probabilities
        self._accuracy = result.accuracy
        predictor = Predictor(
            trained.model, trained.params, trained.info.image_shape, trained.info.class_names
        )
        one, many = data.images[:1], data.images[: verify.LARGE_BATCH]
        times = (
            verify.milliseconds(lambda images: predictor.probabilities(images, 1), one),
            verify.milliseconds(lambda images: predictor.probabilities(images, len(many)), many),
        )
        self._rows = [verify.Verified("JAX", None, 0, self._accuracy, 0, 0.0, times)]

    def verify(self, name: str, int8: bool, path: Path) -> None:
        """Verifies a file of a format, and adds it to the table.

        Raises:
            UserError: as `verify.require_same`.
        """
        call, timed = _calls(path, self._trained)
        found = verify.probabilities(call, self._data.images)
        row = verify.compare(
            f"{name} int8" if int8 else name, path, found, self._data.labels, self._reference
        )
        verify.require_same(row, None if int8 else found, self._reference, self._accuracy)
        one, many = self._data.images[:1], self._data.images[: verify.LARGE_BATCH]
        if timed:
            times = verify.milliseconds(timed, one), verify.milliseconds(call, many)
            row = row._replace(milliseconds=times)
        self._rows.append(row)

    def table(self) -> str:
        """Formats the comparisons so far."""
        return verify.table(self._rows, "validation", len(self._data))


def _calls(path: Path, trained: Trained) -> tuple[loaded.Call, loaded.Call | None]:
    """Loads a file: on all cores, and on one thread for its timing, if it can be timed."""
    if path.suffix == ".safetensors":
        from tinyvgg_jax.export import torch

        return torch.load_call(path, trained.model, trained.info.image_shape)
    if path.suffix == ".html":
        from tinyvgg_jax.export.page import read_page

        model, params, _ = read_page(path.read_text(encoding="utf-8"))
        # Only a browser runs the page itself.
        return loaded.call_in_jax(model, params), None
    return loaded.load(path).call, loaded.load(path, threads=1).call
