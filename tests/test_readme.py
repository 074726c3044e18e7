"""The READMEs: their code runs, and their commands, links and layout are right."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from tinyvgg_jax import TinyVGG

PACKAGE = ROOT / "tinyvgg_jax"
README = (ROOT / "README.md").read_text()
# `rglob` does not follow the link from the package to the recipes, so no file comes twice.
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted((ROOT / "configs").glob("*.md")),
    *sorted(PACKAGE.rglob("*.md")),
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH = {
    str(path.relative_to(ROOT)): re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    for path in DOCUMENTS
}
# Commands on a finished run, which take seconds.
CHEAP = re.findall(
    r"^\.venv/bin/python -m tinyvgg_jax\.main (--mode (?:eval|explain|compare|predict) .*)$",
    README,
    re.MULTILINE,
)
LINK = re.compile(r"\]\(([^)]+)\)")

# Stands for every program in `.venv/bin`, and for python3. It checks the flags of the package's
# commands, their recipes and fields, and does nothing; other commands succeed.
STAND_IN = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
module, arguments = sys.argv[2:3], sys.argv[3:]
if module == ["tinyvgg_jax.main"]:
    from absl import flags
    from tinyvgg_jax import config, main

    def check(paths):
        if flags.FLAGS.config is not None:
            config.validated(flags.FLAGS.config)
        return 0

    for name, mode in main.MODES.items():
        main.MODES[name] = mode._replace(run=check)
    print(*arguments)
    sys.exit(main.main(["main.py", *arguments]))
if module == ["tinyvgg_jax.benchmark"]:
    import importlib.util
    from tinyvgg_jax.benchmark import __main__ as benchmark

    # Where PyTorch is not installed, the command is valid all the same.
    importlib.util.find_spec = lambda name: name
    benchmark._parse(arguments)
"""


def test_the_python_snippets_run(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed; only the config that they import trains on the small dataset."""
    from tinyvgg_jax.configs import quick

    monkeypatch.setattr(quick, "get_config", lambda: config)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    names: dict[str, Any] = {}
    assert len(SNIPPETS) == 5
    for snippet in SNIPPETS:
        exec(snippet, names)
    assert names["get_config"]().num_epochs == 3
    assert names["logits"].shape == (8, 3)
    assert names["views"].shape == (10, 4, 28, 28, 1)
    assert isinstance(names["model"], TinyVGG)
    assert names["labels"].shape == (8,)
    assert names["shirt"].inverted
    assert (tmp_path / "runs" / "notebook" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name, blocks in BASH.items() if blocks])
def test_the_commands_are_valid(document: str, tmp_path: Path) -> None:
    """Loops, quotes, flags, fields and recipes, as bash and the command line read them."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "python3", "pip", "ruff", "mypy"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    for block in BASH[document]:
        # A loop ends with the status of its last round, so the errors are looked at as well.
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0 and not done.stderr, block + done.stderr
        # The shell, too, has left no argument behind.
        assert "$" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", CHEAP)
def test_the_commands_on_a_finished_run_do_what_they_say(
    arguments: str, trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for name in ("quick", "quick-1"):
        shutil.copytree(trained[0], tmp_path / "runs" / name)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "-m", "tinyvgg_jax.main", *arguments.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--mode eval" in arguments:
        assert (tmp_path / "runs" / "quick" / "evaluation" / "report.html").exists()
    if "--mode compare" in arguments:
        assert (tmp_path / "comparison.png").exists() == ("--output" in arguments)


def test_there_is_a_cheap_command_of_every_mode() -> None:
    assert {command.split()[1] for command in CHEAP} == {"eval", "explain", "compare", "predict"}


@pytest.mark.parametrize("mark", ["run", "test"])
def test_a_set_up_command_is_one_line_that_makes_its_environment(mark: str) -> None:
    (command,) = re.findall(rf"<!-- {mark}-command -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert "\n" not in command
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")


@pytest.mark.parametrize(
    ("script", "variable", "lines"),
    [
        (
            "run",
            "command",
            [
                "python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[dev]' && "
                ".venv/bin/python -m tinyvgg_jax.main --mode prepare --config default && "
                '.venv/bin/python -m pytest -m "not slow"'
            ],
        ),
        (
            "trixie",
            "install",
            ["python3 -m venv .venv", ".venv/bin/pip install --quiet -e '.[dev]'"],
        ),
    ],
)
def test_the_checks_take_the_test_command_from_the_readme(
    script: str, variable: str, lines: list[str]
) -> None:
    content = (ROOT / ".ci" / script).read_text()
    found = re.search(rf"^{variable}=\$\(\n?(?:.*?\n\)|.*?\)$)", content, re.DOTALL | re.MULTILINE)
    assert found is not None
    printed = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'{found[0]}\necho "${variable}"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.splitlines() == lines


@pytest.mark.parametrize("document", BASH)
def test_every_link_into_the_repository_leads_somewhere(document: str) -> None:
    folder = (ROOT / document).parent
    links = [link for link in LINK.findall((ROOT / document).read_text()) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = folder / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {anchor_of(heading) for heading in headings}, link


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def layout() -> dict[Path, str]:
    """The layout's files and folders, each with its row and the README of the folder, if any."""
    rows = {}
    for line in README.partition("| file | subject |")[2].splitlines():
        if line.startswith("| [`"):
            for link in LINK.findall(line):
                path = ROOT / link
                rows[path] = line
                if (path / "README.md").exists():
                    rows[path] += (path / "README.md").read_text()
    return rows


def is_named(path: Path, rows: dict[Path, str]) -> bool:
    return path in rows or f"`{path.name}`" in rows.get(path.parent, "")


def test_every_file_is_in_the_layout() -> None:
    rows = layout()
    suffixes = ("py", "c", "html", "css", "js")
    sources = [path for suffix in suffixes for path in PACKAGE.rglob(f"*.{suffix}")]
    sources += (ROOT / "configs").glob("*.py")
    assert len(sources) > 30
    missing = [path for path in sources if path.name != "__init__.py" and not is_named(path, rows)]
    assert not missing


def test_the_layout_names_no_file_that_is_gone() -> None:
    for path, row in layout().items():
        if path.is_dir():
            line = row.splitlines()[0]
            for name in re.findall(r"`(\w+\.\w+)`", line):
                assert (path / name).exists(), f"{path}: {name}"
