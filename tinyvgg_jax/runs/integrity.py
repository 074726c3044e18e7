"""Integrity of checkpoints: digests and layouts of arrays, readable files, usable paths."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinyvgg_jax.errors import UserError

# Orbax treats a folder's path as a glob pattern and encodes it as UTF-8, so it loses files under
# a path with brackets, or with characters that the locale cannot encode.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._ +,=@%-]*")
# Linux gives every open folder a second path here.
_OPEN_FOLDERS = Path("/proc/self/fd")

# Shape and dtype of each array by its path in a tree, like `{"a/b": [[2, 3], "int32"]}`.
Layout = dict[str, list[Any]]


class DamagedError(Exception):
    """The content of a checkpoint differs from what was saved."""


def digest(tree: Any) -> str:
    """Computes the SHA-256 of a tree of arrays.

    Args:
        tree: arrays on any device.

    Returns:
        64 hexadecimal digits, which depend on the path, dtype, shape and bytes of every array.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]:
        array = np.ascontiguousarray(leaf)
        header = [jax.tree_util.keystr(path), str(array.dtype), list(array.shape)]
        sha.update(json.dumps(header).encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def layout_of(tree: Any) -> Layout:
    """Lists the shape and dtype of each array of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            list(leaf.shape),
            str(np.dtype(leaf.dtype)),
        ]
        for path, leaf in leaves
    }


def check_layout(where: str, item: str, expected: Layout, stored: Layout) -> None:
    """Checks that a checkpoint stores the arrays that this process expects.

    Orbax would convert another dtype silently, and the digest would no longer match.

    Args:
        where: names the checkpoint, for the message.
        item: "params" or "opt_state".
        expected: layout of the arrays to restore into.
        stored: layout of the arrays in the checkpoint.

    Raises:
        UserError: if paths, shapes or dtypes differ.
    """
    shapes = {path: shape for path, (shape, _) in stored.items()}
    for path in sorted({*shapes, *expected}):
        here, there = expected.get(path, [None])[0], shapes.get(path)
        if here == there:
            continue
        if item == "params":
            raise UserError(
                f"{where} holds another network than config.json describes: {path} is {there} "
                f"there, not {here}."
            )
        raise UserError(
            f"{where} has another optimizer state than this version makes: {path} is "
            f"{there} there, not {here}. Continue with the package versions that began "
            "the run, or only evaluate it."
        )
    for path, (_, dtype) in stored.items():
        if dtype != expected[path][1]:
            raise UserError(
                f"{where} has {path} in {dtype}, but this process would make it "
                f"{expected[path][1]}. Is JAX_ENABLE_X64 set differently than for the run?"
            )


def require_regular_files(folder: Path, besides: str) -> None:
    """Checks that everything below a folder is a file or a folder.

    Opening a named pipe, for example, would wait for ever.

    Args:
        folder: the folder.
        besides: name of a folder in it that is not checked.

    Raises:
        DamagedError: if something else is there.
    """
    for path in folder.rglob("*"):
        checked = path.relative_to(folder).parts[0] != besides
        if checked and not (path.is_file() or path.is_dir()):
            raise DamagedError(f"{path} is not a regular file")


def read_all_files(folder: Path) -> None:
    """Reads every file below a folder to its end.

    Raises:
        OSError: if a file or folder cannot be read.
    """

    def stop(error: OSError) -> None:
        raise error

    for where, _, names in os.walk(folder, onerror=stop):
        for name in names:
            path = Path(where) / name
            try:
                with path.open("rb") as file:
                    while file.read(1 << 20):
                        pass
            except OSError as error:
                # A failing read names no file, as a failing open does.
                error.filename = error.filename or str(path)
                raise


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Provides a path to an existing folder that Orbax can use, valid within the context.

    Raises:
        UserError: if the folder's own path is not plain, and the system offers no other.
    """
    if _PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        path = _OPEN_FOLDERS / str(descriptor)
        if not path.is_dir():
            raise UserError(
                f"Orbax cannot keep checkpoints in {folder}, because of the characters in its "
                "path. Pass a --workdir with plain letters, digits, dots and dashes."
            )
        yield path
    finally:
        os.close(descriptor)
