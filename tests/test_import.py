"""The names of the package, imported on first use."""

import builtins
import inspect
import re
import sys
import types

import pytest

import tinyvgg_jax


def test_every_public_name_is_there() -> None:
    for name in tinyvgg_jax.__all__:
        assert getattr(tinyvgg_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'TinyVgg'"):
        tinyvgg_jax.TinyVgg  # noqa: B018


def test_a_dependencys_fault_is_not_taken_for_a_missing_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            raise AttributeError(f"module 'flax' has no attribute {name!r}")

    # An old version of a library can be imported, but lacks its newer names.
    monkeypatch.setitem(sys.modules, "flax.linen", Broken("flax.linen"))
    monkeypatch.setitem(sys.modules, "flax", types.ModuleType("flax"))
    monkeypatch.setattr(sys.modules["flax"], "linen", sys.modules["flax.linen"], raising=False)
    monkeypatch.delitem(sys.modules, "tinyvgg_jax.model", raising=False)
    with pytest.raises(ImportError, match=r"tinyvgg_jax.model cannot be imported: .*'flax'"):
        from tinyvgg_jax import TinyVGG  # noqa: F401


def test_every_exception_that_a_public_docstring_names_is_public() -> None:
    for name in tinyvgg_jax.__all__:
        _, _, raises = (inspect.getdoc(getattr(tinyvgg_jax, name)) or "").partition("Raises:\n")
        for error in re.findall(r"^ {4}(\w+):", raises, re.MULTILINE):
            assert hasattr(builtins, error) or error in tinyvgg_jax.__all__, (name, error)
