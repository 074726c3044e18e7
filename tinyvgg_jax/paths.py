"""Paths of files and folders as people write them."""

import errno
import os
import re
import stat
import urllib.parse
from pathlib import Path
from typing import BinaryIO

from tinyvgg_jax.errors import UserError


def local_path(name: str | os.PathLike[str]) -> Path:
    """Resolves the name of a local file or folder: `~`, `~user` and `file://` are understood.

    Args:
        name: a path, which may begin with `~` or `~user`, or a `file://` address.

    Returns:
        The path; a relative one stays relative.

    Raises:
        UserError: if the name is empty, is an address on another machine, like `gs://...`, or
            begins with the home folder of a user who does not exist.
    """
    text = os.fspath(name)
    if not text:
        raise UserError("the name of a file or folder is empty.")
    # `Path("gs://bucket")` has already turned the two slashes into one. A name like `data:/x` is
    # an address, too, unless a folder `data:` exists.
    scheme = re.match(r"([A-Za-z][\w+.-]+):(//?)", text)
    if scheme and (scheme[2] == "//" or not Path(f"{scheme[1]}:").exists()):
        try:
            address = urllib.parse.urlsplit(text)
        except ValueError:  # The brackets of an address may hold what is none of IPv6.
            address = urllib.parse.SplitResult("", "", "", "", "")
        if address.scheme != "file" or address.netloc not in ("", "localhost"):
            raise UserError(
                f"{text} is not on this machine. Only local files and folders are read and "
                "written: mount it, or copy it here."
            )
        text = urllib.parse.unquote(address.path)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        pass
    first = Path(text).parts[0]
    if first == "~":
        raise UserError(f"{text}: this user has no home folder; give an absolute path.")
    raise UserError(f"{text}: there is no user {first[1:]} on this machine.")


def status_of(path: Path) -> os.stat_result | None:
    """Asks the system what there is at a path that a user gave.

    Returns:
        What `os.stat` returns; None if nothing is there.

    Raises:
        UserError: if the system does not tell, for example because the name is too long.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # No file's name has a zero byte, which is a ValueError.
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def is_folder(path: Path) -> bool:
    """Tells whether there is a folder at a path that a user gave; raises as `status_of` does."""
    status = status_of(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading bytes, without ever waiting.

    Opening or reading a FIFO may wait for ever for a process that writes to it, and opening a
    device may have effects. So everything that is not a regular file is refused.

    Args:
        path: the file.

    Returns:
        The open file, whose `name` is the path.

    Raises:
        OSError: if there is no such file, if it must not be read, or if it is not a regular file.
    """
    # `Path.open` takes no opener.
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    """Opens a file as `os.open` does, if it is a regular one."""
    # A device is not opened at all. What is opened is checked again, because another process may
    # have replaced the file in between.
    _require_regular(Path(path).stat(), path)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    try:
        _require_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(status: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
