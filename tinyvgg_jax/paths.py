"""Paths of files and folders as people write them."""

import os
import re
import urllib.parse
from pathlib import Path

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
        address = urllib.parse.urlsplit(text)
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
