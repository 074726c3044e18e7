"""The contents of a wheel and an sdist, and recipes by their bare names."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from tinyvgg_jax import main

RECIPES = {path.stem for path in (ROOT / "configs").glob("[!_]*.py")}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of this checkout, unpacked."""
    tools, folder = tmp_path_factory.mktemp("tools"), tmp_path_factory.mktemp("sdist")
    pip("install", "--target", tools, "hatchling>=1.27")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tools)},
        check=True,
        capture_output=True,
    )
    (archive,) = folder.iterdir()
    subprocess.run(["tar", "--extract", "--file", archive, "--directory", folder], check=True)
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, unpacked."""
    return unpacked_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def unpacked_wheel(source: Path, folder: Path) -> Path:
    """Builds a wheel as `pip install` does, in an environment of its own."""
    pip("wheel", "--no-deps", "--wheel-dir", folder, source)
    (archive,) = folder.iterdir()
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "unpacked")
    return folder / "unpacked"


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("pip cannot fetch hatchling, which builds the package")
    assert done.returncode == 0, done.stderr


def files(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "__pycache__" not in name}


def test_a_wheel_holds_the_package_with_its_recipes_and_nothing_else(wheel: Path) -> None:
    package = {name for name in files(wheel) if ".dist-info/" not in name}
    # A glob does not follow the link to the recipes.
    expected = {f"tinyvgg_jax/{name}" for name in files(ROOT / "tinyvgg_jax")}
    expected |= {f"tinyvgg_jax/configs/{name}" for name in files(ROOT / "configs")}
    assert package == expected
    assert {"py.typed", "ops/winograd.c", "report/page.html", "configs/quick.py"} <= {
        name.removeprefix("tinyvgg_jax/") for name in package
    }


def test_a_wheel_trains_by_a_recipes_name_without_a_clone(
    wheel: Path, data_dir: Path, tmp_path: Path
) -> None:
    run = in_folder(tmp_path, wheel, data_dir)
    done = run("--config", "quick", "--config.num_epochs=1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "quick" / "summary.json").exists()
    # The second goes on with the first, because it has the same workdir.
    again = run("--config=quick", "--config.num_epochs=1")
    assert "finished already" in again.stderr


def test_a_config_of_ones_own_needs_no_clone(wheel: Path, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tinyvgg_jax.configs import default\n"
        "def get_config():\n"
        "    c = default.get_config(); c.data.test_split = 'test[:12]'; return c\n"
    )
    done = in_folder(tmp_path, wheel, data_dir)("--mode", "prepare", "--config", "mine.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[:2] == ["test", "12"]


def in_folder(
    folder: Path, package: Path, data_dir: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line of an unpacked wheel in another folder, on the small dataset."""
    fields = {
        "model.widths": "(4,8)",
        "data.name": "bars",
        "data.data_dir": data_dir,
        "data.train_split": "train[:250]",
        "data.validation_split": "train[250:]",
    }
    small = [f"--config.{name}={value}" for name, value in fields.items()]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tinyvgg_jax.main", *arguments, *small],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(package)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_an_sdist_holds_the_tests_with_all_they_need(sdist: Path) -> None:
    names = files(sdist)
    assert {f"tests/{name}" for name in files(ROOT / "tests")} <= names
    assert {"README.md", "LICENSE", "pyproject.toml", ".ci/run", ".github/report.png"} <= names
    assert {f"configs/{name}.py" for name in RECIPES} <= names


def test_an_sdists_wheel_is_the_clones(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    assert files(unpacked_wheel(sdist, tmp_path)) == files(wheel)


@pytest.mark.parametrize(
    "arguments",
    [["--config", "quick"], ["--config=quick"], ["-config", "quick"], ["-config=quick"]],
)
def test_a_bare_name_is_a_recipe(arguments: list[str]) -> None:
    *_, path = " ".join(main._with_recipes(["main.py", *arguments])).replace("=", " ").split()
    assert Path(path).samefile(ROOT / "configs" / "quick.py")


@pytest.mark.parametrize("path", ["configs/quick.py", "quick.py", "./quick", "quick.py:x", ""])
def test_a_path_of_a_config_stays_as_it_is(path: str) -> None:
    arguments = ["main.py", "--config", path, f"--config={path}", "--", "--config", "quick"]
    assert main._with_recipes(arguments) == arguments


def test_an_unknown_recipe_is_one_line_with_the_nearest(
    command_line: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = command_line("--config", "qick", "--config.num_epochs=1")
    assert result.returncode == 2
    assert result.stderr == (
        "tinyvgg_jax: unknown recipe 'qick'; one of best, default, fast, micro, photos, quick, "
        "or a .py file; did you mean 'quick'?\n"
    )


def test_the_help_names_every_recipe(
    command_line: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert ", ".join(sorted(RECIPES)) in command_line("--help").stdout
    assert set(main._RECIPES) == RECIPES
