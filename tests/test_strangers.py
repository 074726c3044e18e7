"""A run's folder from a stranger: nothing is written elsewhere, and only text is printed."""

import functools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import Done, World, cheap_pictures, complaint, forked, refusal

pytestmark = pytest.mark.slow


def commands(world: World, run: Path) -> dict[str, Callable[[], Any]]:
    """A call of each mode on a finished run."""
    workdir, pictures = f"--workdir={run}", str(world.root / "pictures")
    argv = {
        "eval": ["--mode=eval", workdir],
        "predict": ["--mode=predict", workdir, pictures],
        "predict --json": ["--mode=predict", "--json", workdir, pictures],
        "explain": ["--mode=explain", workdir, f"{pictures}/0.png"],
        "compare": ["--mode=compare", f"--output={world.root / 'c.png'}", str(run), str(run)],
        "train": world.train_flags(run.name),
    }
    return {
        name: world.main(*arguments, hooks=(cheap_pictures,)) for name, arguments in argv.items()
    }


# Links to files and folders outside of the run

# Where a link is planted, and the modes to run: those that would write there, or read it.
LINKS = {
    "evaluation": ("eval",),
    "evaluation/test": ("eval",),
    "evaluation/test.json": ("eval",),
    "evaluation/.test.json.new": ("eval",),
    "evaluation/report.html": ("eval",),
    "evaluation/.report.html.new": ("eval",),
    "evaluation/test/confusion_matrix.png": ("eval",),
    "evaluation/test/calibration.png": ("eval",),
    "evaluation/test/learning_curves.png": ("eval",),
    "evaluation/test/wrong.png": ("eval",),
    "evaluation/test/right.png": ("eval",),
    "evaluation/test/.right.png.new": ("eval",),
    "explain": ("explain",),
    "explain/0.png": ("explain",),
    "explain/.0.png.new": ("explain",),
    "summary.json": ("eval", "explain", "predict", "compare", "resume"),
    ".summary.json.new": ("resume",),
    "metrics.jsonl": ("eval", "resume"),
    ".metrics.jsonl.new": ("resume",),
    ".config.json.new": ("resume",),
    ".dataset.json.new": ("resume",),
    ".lock": ("resume",),
}


@pytest.fixture
def outside(world: World) -> Path:
    """A folder outside of the runs, with a file and a folder that nobody may touch."""
    world.reset()
    folder = world.root / "outside"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "file").write_text("precious")
    (folder / "file").write_text("precious")
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1, 1))
    return folder


def touched(folder: Path) -> list[str]:
    """Lists what was written to, or is new, in the folder of the fixture above; and itself."""
    return [str(path) for path in (folder, *folder.rglob("*")) if path.lstat().st_mtime != 1]


@pytest.mark.parametrize("victim", ["old", "new"])
@pytest.mark.parametrize("place", LINKS)
def test_a_planted_link_is_not_followed(
    world: World, outside: Path, place: str, victim: str
) -> None:
    for run in ("finished", "unfinished"):
        link = world.root / run / place
        link.parent.mkdir(parents=True, exist_ok=True)
        is_folder = link.is_dir()
        if is_folder:
            shutil.rmtree(link)
        else:
            link.unlink(missing_ok=True)
        old = "folder" if is_folder else "file"
        link.symlink_to(outside / (old if victim == "old" else "new"))
    calls = commands(world, world.root / "finished") | {"resume": world.train("unfinished")}
    for mode in LINKS[place]:
        done = forked(calls[mode], world.environment)
        assert not touched(outside), f"{mode} follows the link"
        assert complaint(done) == "" and (done.status == 0 or not refusal(done)), done.stderr


# Nothing answers here, in case that something is to be fetched.
OFFLINE = {"PATH": "/nowhere"} | {
    f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")
}


@pytest.mark.parametrize("field", ["data_dir", "source_dir"])
@pytest.mark.parametrize("mode", ["eval", "predict", "explain", "compare"])
def test_a_runs_config_makes_no_folder(world: World, outside: Path, mode: str, field: str) -> None:
    run = world.root / "finished"
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"name": "fashion_mnist", field: str(outside / "made" / "here")}
    if field == "source_dir":
        config["data"]["data_dir"] = str(outside / "folder")
    (run / "config.json").write_text(json.dumps(config))
    done = forked(commands(world, run)[mode], world.environment | OFFLINE)
    assert not touched(outside)
    assert complaint(done) == "" and (done.status == 0 or not refusal(done)), done.stderr


# Control characters, which a terminal obeys

# Sets the title, clears the screen, colours; turns the direction of text; begins another line.
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b1m\x7f\u202e\u2066\r"
FORGED = "\nFORGED"
_BIDI = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


def obeyed(done: Done) -> str:
    """Finds what a terminal would take for a command, and not for text, in an output; or ""."""
    output = done.stdout + done.stderr
    # Bytes from 0x80 to 0x9f that are no UTF-8 are commands for some terminals as well.
    found = {
        c
        for c in output
        if (unicodedata.category(c) == "Cc" and c not in "\n\t")
        or unicodedata.bidirectional(c) in _BIDI
        or "\udc80" <= c <= "\udc9f"
    }
    forged = "a forged line" if re.search("^FORGED", output, re.MULTILINE) else ""
    return "".join(repr(c) for c in sorted(found)) or forged


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def in_class_names(_: World, run: Path) -> Path:
    edit_json(run / "dataset.json", lambda c: c["class_names"].__setitem__(0, ESCAPES + FORGED))
    return run


def in_class_names_of_the_dataset_too(world: World, run: Path) -> Path:
    # The file has a class a line.
    (labels,) = (world.root / "data").rglob("label.labels.txt")
    names = [name + ESCAPES.rstrip() for name in labels.read_text().splitlines()]
    labels.write_text("\n".join(names))
    edit_json(run / "dataset.json", lambda c: c.__setitem__("class_names", names))
    return run


def in_the_folders_name(_: World, run: Path) -> Path:
    return run.rename(run.with_name(f"run{ESCAPES}{FORGED}"))


def in_pictures_names(world: World, run: Path) -> Path:
    pictures = world.root / "pictures"
    shutil.copy(pictures / "1.png", pictures / f"{ESCAPES}{FORGED}.png")
    (pictures / f"{ESCAPES}{FORGED} is no picture.png").write_text("no picture")
    return run


def in_the_summary(_: World, run: Path) -> Path:
    text = ESCAPES + FORGED
    changes = {"device": text, "dataset": text, "versions": {text: text, "jax": text}}
    edit_json(run / "summary.json", lambda c: c.update(changes))
    return run


def in_a_checkpoints_name(_: World, run: Path) -> Path:
    (run / "checkpoints" / f"9{ESCAPES}{FORGED}").write_text("")
    return run


def in_a_config_field(name: str, _: World, run: Path) -> Path:
    text = ESCAPES + FORGED
    section, _dot, field = name.rpartition(".")
    edit_json(
        run / "config.json",
        lambda c: (c[section] if section else c).__setitem__(text if field == "?" else field, text),
    )
    return run


PLACES: dict[str, Callable[[World, Path], Path]] = {
    "class names": in_class_names,
    "class names of the dataset too": in_class_names_of_the_dataset_too,
    "the folder's name": in_the_folders_name,
    "pictures' names": in_pictures_names,
    "the summary": in_the_summary,
    "a checkpoint's name": in_a_checkpoints_name,
}
for field in ("data.name", "data.data_dir", "data.test_split", "optimizer", "num_epochs", "?"):
    PLACES[f"config {field}"] = functools.partial(in_a_config_field, field)


def assert_only_text(world: World, calls: dict[str, Callable[[], Any]]) -> None:
    wrong = []
    for name, call in calls.items():
        done = forked(call, world.environment)
        if found := complaint(done) or obeyed(done):
            wrong.append(f"{name!r}: {found} in {(done.stdout + done.stderr)[-400:]!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("place", PLACES)
def test_control_characters_are_not_sent_to_the_terminal(world: World, place: str) -> None:
    world.reset()
    run = PLACES[place](world, world.root / "finished")
    assert_only_text(world, commands(world, run))


def damage_checkpoints(steps: str, run: Path) -> None:
    for file in (run / "checkpoints").glob(f"{steps}/**/d/*"):
        file.write_bytes(file.read_bytes()[::-1])


def put_a_folder_in_the_way(run: Path) -> None:
    (run / ".lock").unlink()
    (run / ".lock").mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no config.json": lambda run: (run / "config.json").unlink(),
    "no dataset.json": lambda run: (run / "dataset.json").unlink(),
    "another dataset.json": lambda run: (run / "dataset.json").write_text("[]"),
    "another config.json": lambda run: (run / "config.json").write_text("[]"),
    "no checkpoints": lambda run: shutil.rmtree(run / "checkpoints"),
    "a damaged checkpoint": functools.partial(damage_checkpoints, "16"),
    "damaged checkpoints": functools.partial(damage_checkpoints, "*"),
    "a folder in the way": put_a_folder_in_the_way,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_errors_and_warnings_send_no_control_characters(world: World, damage: str) -> None:
    world.reset()
    run = in_the_folders_name(world, world.root / "finished")
    DAMAGES[damage](run)
    calls = commands(world, run)
    # The others read the run as these do.
    assert_only_text(world, {mode: calls[mode] for mode in ("eval", "predict", "train")})


def test_arguments_are_repeated_without_control_characters(world: World) -> None:
    world.reset()
    text, workdir = ESCAPES + FORGED, f"--workdir={world.root / 'finished'}"
    picture = str(world.root / "pictures" / "0.png")
    arguments = (
        [f"--mode={text}"],
        ["--mode=eval", f"--workdir={text}"],
        ["--mode=eval", workdir, f"--split={text}"],
        ["--mode=eval", workdir, f"--step={text}"],
        ["--mode=predict", workdir, text],
        ["--mode=predict", workdir, picture, f"--invert={text}"],
        ["--mode=explain", workdir, picture, f"--output={world.root}/{text}/x.png"],
        [f"--config={text}"],
        [f"--config={text}.py"],
        ["--config=default", f"--config.optimizer={text}"],
        ["--config=default", f"--config.{text}=1"],
        ["--config=default", f"--{text}=1"],
        ["--config=default", text],
    )
    assert_only_text(world, {str(argv): world.main(*argv) for argv in arguments})
