"""What the README shows is run."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from tinyvgg_jax import TinyVGG

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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


def test_every_link_into_the_repository_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_every_file_is_in_the_layout() -> None:
    for path in (ROOT / "tinyvgg_jax").glob("*.py"):
        assert path.name == "__init__.py" or f"tinyvgg_jax/{path.name})" in README, path
    for path in (ROOT / "configs").glob("*.py"):
        assert path.name == "__init__.py" or f"configs/{path.name})" in README, path
