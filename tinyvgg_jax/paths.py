"""Files and folders as people name them."""

import os
import re
import urllib.parse
from pathlib import Path

from tinyvgg_jax.errors import UserError


def local_path(name: str | os.PathLike[str]) -> Path:
    """Finds the path on this machine that a person means.

    Args:
        name: a path, which may begin with `~` or `~user`, or a `file://` address.

    Returns:
        The path, as absolute or relative as it was given.

    Raises:
        UserError: if the name is empty, is an address on another machine, like `gs://...`, or
            begins with the home folder of nobody.
    """
    text = os.fspath(name)
    if not text:
        raise UserError("the name of a file or folder is empty.")
    # A Path has made one slash of two.
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
        raise UserError(f"{text}: this user has no home folder; give a whole path.")
    raise UserError(f"{text}: {first} is the home folder of nobody here.")
