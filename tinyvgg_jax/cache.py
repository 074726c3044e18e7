"""Files in the user's cache folder, each verified by a digest before it is used.

Each file ends with the SHA-256 of its name and content. So what was cut short by a loss of power,
has decayed on the disk, or was copied from another name is not used, but made again. The digest
stands at the end because loaders of libraries and arrays ignore what follows their content.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tinyvgg_jax.paths import open_regular

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size
_CHUNK_BYTES = 1 << 20


def cache_dir() -> Path | None:
    """Finds the user's cache folder for this package, in `$XDG_CACHE_HOME` or `~/.cache`.

    It does not create the folder, and the user may not be allowed to. So whatever is kept there
    must be optional.

    Returns:
        The folder, or None for a user without a home folder.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The standard says to ignore a relative path, and an address like gs://... is one as well.
        return (root if root.is_absolute() else Path.home() / ".cache") / "tinyvgg_jax"
    except RuntimeError:
        return None


def find(name: str) -> Path | None:
    """Finds a file in the cache, and checks that it is what `keep` wrote under this name.

    Args:
        name: the file's path within the cache folder.

    Returns:
        The file, which ends with 32 bytes of digest; None if it is not there or cannot be read, or
        if it is damaged, which is logged.
    """
    root = cache_dir()
    if root is None:
        return None
    path = root / name
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
            intact = _digest(name, file, size) == file.read()
    except OSError:
        return None
    if not intact:
        logger.warning("%s is damaged, or of an earlier version, and is made again.", path)
    return path if intact else None


def read(name: str) -> bytes | None:
    """Reads the content of a file that `find` finds; None if it finds none."""
    path = find(name)
    return None if path is None else path.read_bytes()[:-_DIGEST_BYTES]


def keep(name: str, write: Callable[[BinaryIO], object]) -> Path:
    """Writes a file into the cache, in the place of whatever has its name.

    Other processes see it whole or not at all, and it is on the disk when this returns.

    Args:
        name: the file's path within the cache folder.
        write: writes the content to an open file.

    Returns:
        The file, which ends with 32 bytes of digest.

    Raises:
        OSError: if it cannot be written.
    """
    root = cache_dir()
    if root is None:
        raise FileNotFoundError("this user has no home folder")
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        with partial.open("w+b") as file:
            write(file)
            file.write(_digest(name, file, file.seek(0, os.SEEK_END)))
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():  # A file cannot replace a folder.
            shutil.rmtree(path)
        partial.replace(path)
    return path


def _digest(name: str, file: BinaryIO, size: int) -> bytes:
    """Computes the SHA-256 of a name and the first `size` bytes of a file, and stops after them."""
    sha = hashlib.sha256(name.encode() + b"\0")
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, _CHUNK_BYTES))):
        sha.update(chunk)
        size -= len(chunk)
    return sha.digest()
