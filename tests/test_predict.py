import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CLASSES, ROOT
from PIL import Image

from tinyvgg_jax import Predictor, UserError, load_predictor, pictures, predict
from tinyvgg_jax.data import DatasetInfo, Split, load_splits
from tinyvgg_jax.evaluate import evaluate
from tinyvgg_jax.model import TinyVGG, apply
from tinyvgg_jax.pictures import Picture
from tinyvgg_jax.predict import FilePrediction, _probabilities, predict_files
from tinyvgg_jax.report.explain import explain_file
from tinyvgg_jax.step import to_float

CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]
Trained = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def predictor(trained: Trained) -> Predictor:
    return load_predictor(trained[0], "latest")


@pytest.fixture(scope="module")
def test_split(data_dir: Path) -> Split:
    return load_splits("bars", {"test": "test"}, str(data_dir))[0]["test"]


@pytest.fixture
def files(test_split: Split, tmp_path: Path) -> Path:
    """The test split as PNG files."""
    folder = tmp_path / "Bilder, größere"
    folder.mkdir()
    for index, image in enumerate(test_split.images):
        Image.fromarray(image[..., 0]).save(folder / f"{index:03}.png")
    return folder


def test_it_predicts_what_eval_counts(
    predictor: Predictor, test_split: Split, trained: Trained
) -> None:
    labels, probabilities, names = predictor(test_split.images)
    assert (labels == test_split.labels).mean() == trained[1]["test_accuracy"]
    assert names == CLASSES
    assert probabilities.shape == (70, 5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    expected = evaluate(predictor.model, predictor.params, test_split).probabilities
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-6)


def test_every_shape_and_dtype_of_the_same_image(predictor: Predictor, test_split: Split) -> None:
    image = test_split.images[3]
    expected = predictor(test_split.images[3:4]).probabilities
    assert expected.shape == (1, 5)
    as_float = image / np.float64(255)
    for given in (image, image[..., 0], as_float, as_float[None], as_float[..., 0].astype("f2")):
        np.testing.assert_allclose(predictor(given).probabilities, expected, atol=2e-3)
    assert predictor(test_split.images[:0]).labels.shape == (0,)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "uint16", "bool", "bfloat16", "f8"])
def test_images_of_any_dtype_give_the_same_answers(
    predictor: Predictor, test_split: Split, dtype: str
) -> None:
    # Each pixel is black or as bright as every one of the dtypes allows.
    bits = (test_split.images[:3, ..., 0] > 100).astype("uint8")
    top = {"int8": 127, "bool": 1, "bfloat16": 1, "f8": 1}.get(dtype, 255)
    given = jnp.asarray(bits * np.uint8(top), dtype) if dtype == "bfloat16" else None
    answers = predictor(given if given is not None else (bits * np.uint8(top)).astype(dtype))
    expected = bits * (np.float32(127 / 255) if dtype == "int8" else np.float32(1))
    assert answers.probabilities.shape == (3, 5)
    np.testing.assert_allclose(
        answers.probabilities, predictor(expected).probabilities, rtol=1e-5, atol=1e-6
    )


def test_what_is_no_image_is_refused(predictor: Predictor) -> None:
    for shape in [(28, 28), (16, 16, 3), (2, 16, 17), (16,), (1, 1, 16, 16, 1), (1, 1, 16, 16)]:
        with pytest.raises(ValueError, match=r"must be \[16, 16, 1\]"):
            predictor(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="integers, floating or bool, not complex64"):
        predictor(np.zeros((16, 16), np.complex64))
    for number in (-1, 256):
        with pytest.raises(ValueError, match="in 0 to 255"):
            predictor(np.full((16, 16), number))
    for value in (2.0, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            predictor(np.full((16, 16), value))


def test_parameters_are_cast_once_for_bfloat16(
    predictor: Predictor, test_split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = predictor.model.clone(dtype=jnp.bfloat16)
    narrow = Predictor(model, predictor.params, predictor.image_shape, predictor.class_names)
    given: list[Any] = []
    original = predict._probabilities

    def record(model: TinyVGG, mesh: Any, params: Any, images: Any) -> Any:
        given.append(params)
        return original(model, mesh, params, images)

    monkeypatch.setattr(predict, "_probabilities", record)
    images = test_split.images[:3]
    first, again = narrow(images).probabilities, narrow(images).probabilities
    assert {leaf.dtype for leaf in jax.tree.leaves(given[0])} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.leaves(given[0])[0] is jax.tree.leaves(given[1])[0]
    # The answers are those of float32 parameters, which each call would cast itself, but for the
    # rounding of sums, whose order depends on the program.
    logits = apply(model.clone(native=True), predictor.params, to_float(jnp.asarray(images)))
    np.testing.assert_allclose(first, jax.nn.softmax(logits), atol=0.01)
    np.testing.assert_array_equal(first, again)


def test_any_number_of_images_compiles_once(predictor: Predictor, test_split: Split) -> None:
    predictor(test_split.images[:2])
    before = _probabilities._cache_size()  # type: ignore[attr-defined]
    for number in (3, 64, 65, 70):
        predictor(test_split.images[:number])
    assert _probabilities._cache_size() == before  # type: ignore[attr-defined]


def test_files_give_what_the_array_gives_to_the_image(
    predictor: Predictor, test_split: Split, files: Path
) -> None:
    answers = list(predict_files(predictor, [files]))
    assert all(isinstance(answer, FilePrediction) for answer in answers)
    from_files = np.stack([answer.probabilities for answer in answers])  # type: ignore[union-attr]
    np.testing.assert_array_equal(from_files, predictor(test_split.images).probabilities)
    assert [answer.path.name for answer in answers[:2]] == ["000.png", "001.png"]  # type: ignore[union-attr]


def test_real_images_as_files_are_predicted_as_from_the_array(
    real_data: tuple[dict[str, Split], DatasetInfo], tmp_path: Path
) -> None:
    splits, info = real_data
    images = splits["test"].images[:300]
    model = TinyVGG(widths=(4, 8), convs_per_block=1, hidden=8)
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    predictor = Predictor(model, params, info.image_shape, info.class_names)
    for index, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{index:03}.png")
    answers = list(predict_files(predictor, [tmp_path]))
    from_files = np.stack([answer.probabilities for answer in answers])  # type: ignore[union-attr]
    np.testing.assert_array_equal(from_files, predictor(images).probabilities)


def test_the_command_line_prints_a_table_and_goes_on_after_a_bad_file(
    trained: Trained, files: Path, command_line: CommandLine
) -> None:
    (files / "001.png").write_text("no picture")
    (files / "000.png").rename(files / "00\n0.png")
    done = command_line("--mode=predict", f"--workdir={trained[0]}", files, files / "nowhere")
    assert done.returncode == 1
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 2
    assert "001.png: not an image" in errors[0]
    assert "nowhere: no such file" in errors[1]
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["prediction", "second", "choice", "file"]
    assert len(rows) == 69
    assert rows[0].endswith("00\\n0.png")
    assert rows[1].endswith("002.png")
    assert rows[0].split()[0] in CLASSES


def test_the_command_line_prints_json(
    trained: Trained, files: Path, command_line: CommandLine, predictor: Predictor
) -> None:
    image = files / "000.png"
    Image.open(image).resize((40, 40)).save(image)
    run = ("--mode=predict", f"--workdir={trained[0]}", "--json", "--step=latest")
    done = command_line(*run, image, "--invert=yes")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    content = json.loads(line)
    assert content["file"] == str(image)
    assert content["inverted"] is True
    assert content["class"] in CLASSES
    assert content["second_class"] in CLASSES
    assert 1 >= content["probability"] >= content["second_probability"] >= 0


def test_what_is_no_picture_in_a_folder_is_counted_and_no_failure(
    trained: Trained, files: Path, command_line: CommandLine
) -> None:
    for name in ("notes.txt", "film.mpg", ".hidden", "empty"):
        (files / name).touch()
    for path in list(files.glob("0[1-9]*.png")):
        path.unlink()
    (files / "000.png").rename(files / "000.tif")
    arguments = ("--mode=predict", f"--workdir={trained[0]}", files)
    for json_lines in (True, False):
        done = command_line(*arguments, *["--json"] * json_lines)
        assert done.returncode == 0, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith(f"tinyvgg_jax: {files}: 3 files are no pictures and were skipped")
        lines = done.stdout.splitlines()
        assert len(lines) == (10 if json_lines else 11)
        if json_lines:
            assert json.loads(lines[0])["file"] == str(files / "000.tif")


def test_wrong_arguments_are_said(
    trained: Trained, files: Path, command_line: CommandLine, tmp_path: Path
) -> None:
    run = f"--workdir={trained[0]}"
    for arguments, said in [
        (("--mode=predict", run), "needs IMAGE"),
        (("--mode=predict", files), "needs --workdir"),
        (("--mode=predict", run, files, "--invert=maybe"), "--invert must be auto, yes or no"),
        (("--mode=predict", run, files, "--step=7"), "no checkpoint of step 7"),
        (("--mode=predict", f"--workdir={tmp_path}", files), "holds no run"),
        (("--mode=explain", run, files, files), "takes one picture"),
        (("--mode=explain", run, files / "nowhere.png"), "no such file"),
        (("--mode=compare", trained[0]), "two runs or more"),
        (("--mode=eval", run, files), "unexpected argument"),
    ]:
        done = command_line(*arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_without_a_checkpoint_is_said(trained: Trained, tmp_path: Path) -> None:
    for name in ("config.json", "dataset.json"):
        shutil.copy(trained[0] / name, tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load_predictor(tmp_path)


def test_a_fifo_is_an_error_beside_the_pictures(
    trained: Trained, predictor: Predictor, files: Path
) -> None:
    os.mkfifo(files / "x.png")
    *answers, in_folder, by_name = predict_files(predictor, [files, files / "x.png"])
    assert len(answers) == 70
    assert all(isinstance(answer, FilePrediction) for answer in answers)
    said = f"{files}/x.png: cannot be read: not a regular file."
    assert [str(in_folder), str(by_name)] == [said, said]
    with pytest.raises(UserError, match="not a regular file"):
        explain_file(trained[0], files / "x.png")


def test_an_empty_name_is_an_error(
    trained: Trained, files: Path, command_line: CommandLine
) -> None:
    done = command_line("--mode=predict", f"--workdir={trained[0]}", "", files / "000.png")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["tinyvgg_jax: the name of a file or folder is empty."]
    assert len(done.stdout.splitlines()) == 2
    with pytest.raises(UserError, match=r"the name of a file or folder is empty\."):
        explain_file(trained[0], "")


def test_a_subfolder_that_cannot_be_read_is_an_error_beside_the_pictures(
    predictor: Predictor, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "closed").mkdir()
    scandir = os.scandir

    def refuse(folder: Path) -> Any:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    error, *answers = predict_files(predictor, [files])
    assert isinstance(error, UserError)
    assert str(error) == f"{files}/closed: permission denied."
    assert len(answers) == 70
    assert all(isinstance(answer, FilePrediction) for answer in answers)


def test_an_error_keeps_no_pixels_alive(predictor: Predictor, files: Path) -> None:
    png = (files / "000.png").read_bytes()
    (files / "000.png").write_bytes(png[: len(png) // 2])
    (error,) = predict_files(predictor, [files / "000.png"])
    assert isinstance(error, UserError)
    assert "truncated" in str(error)
    # They would lead to the frames in which the picture was decoded.
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


def test_pictures_that_do_not_fit_in_the_memory_are_decoded_one_by_one(
    predictor: Predictor, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, under_way, together = pictures._decode, [], threading.Event()

    def slow(*arguments: Any) -> Any:
        under_way.append(1)
        if len(under_way) > 1:
            together.set()
        together.wait(0.02)
        under_way.pop()
        return decode(*arguments)

    monkeypatch.setattr(pictures, "_decode", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    # Half of it is for pictures: one of 16x16 pixels fits, two do not.
    monkeypatch.setattr(predict, "available_memory", lambda: 2 * 25 * 16 * 16 + 2)
    assert len(list(predict_files(predictor, [files]))) == 70
    assert not together.is_set()
    monkeypatch.setattr(predict, "available_memory", lambda: 2**30)
    assert len(list(predict_files(predictor, [files]))) == 70
    assert together.is_set()


def test_who_has_seen_enough_waits_for_no_picture(
    predictor: Predictor, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []
    release, pixels = threading.Event(), np.zeros((16, 16, 1), np.uint8)

    def stuck(path: Path, **_: Any) -> Picture:
        begun.append(path)
        if len(begun) > 64:
            release.wait()
        return Picture(pixels, False)

    monkeypatch.setattr(predict, "load_picture", stuck)
    monkeypatch.setattr(predict, "_AHEAD", 65)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    before = set(threading.enumerate())
    answers = predict_files(predictor, [files])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert not release.is_set()
    release.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    assert len(begun) <= 66


SLOW_PICTURES = """
import atexit, os, sys, time
from pathlib import Path
from tinyvgg_jax import main, predict
os.cpu_count = lambda: 2
read = []
def slow(path, **_):
    read.append(path)
    if len(read) == 1:
        Path(sys.argv[1]).touch()
    time.sleep(0.5)
    raise predict.UserError("slow")
predict.load_picture = slow
atexit.register(lambda: Path(sys.argv[1]).write_text(str(len(read))))
sys.exit(main.main(["main", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_prediction_of_thousands_of_pictures(
    trained: Trained, files: Path, tmp_path: Path
) -> None:
    for index in range(70, 2000):
        (files / f"{index}.png").hardlink_to(files / "000.png")
    begun = tmp_path / "begun"
    with subprocess.Popen(
        [
            *(sys.executable, "-c", SLOW_PICTURES, str(begun)),
            *("--mode=predict", f"--workdir={trained[0]}", str(files)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not begun.exists():
            assert process.poll() is None
            threading.Event().wait(0.02)
        process.send_signal(signal.SIGINT)
        # To read what has been asked for would take two minutes.
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1
    assert errors.startswith("tinyvgg_jax: interrupted")
    assert int(begun.read_text()) < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "utf-8:strict"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "1"},
    ],
    ids=lambda environment: " ".join(environment.values()),
)
def test_a_name_that_is_no_text_is_shown_on_any_terminal(
    trained: Trained,
    files: Path,
    tmp_path: Path,
    command_line: CommandLine,
    environment: dict[str, str],
) -> None:
    folder, run = tmp_path / os.fsdecode(b"f\xe9"), tmp_path / "run"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    shutil.copytree(trained[0], run)
    picture = folder / os.fsdecode(b"lat\xe9.png")
    shutil.copy(files / "000.png", picture)
    (folder / os.fsdecode(b"broken\xe9.png")).touch()
    (folder / os.fsdecode(b"x.t\xe9")).touch()
    options = {"env": os.environ | environment}
    for flag in ("--json", "--nojson"):
        done = command_line("--mode=predict", flag, f"--workdir={run}", folder, **options)
        assert done.returncode == 1, done.stderr
        assert "lat\\udce9.png" in done.stdout
        skipped, broken = done.stderr.splitlines()
        assert "1 file is no picture and was skipped (.t\\udce9)" in skipped
        assert "broken\\udce9.png: not an image" in broken
    done = command_line("--mode=explain", f"--workdir={run}", picture, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("explain/lat\\udce9.png\n")
    assert (run / "explain" / picture.name).exists()
