"""Files of a run's folder: each is written whole or not at all, and checked when it is read."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import local_path, open_regular, status_of

# The key of a JSON file's digest, which is its last entry.
_DIGEST = "sha256"


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turns an OSError within the context into a UserError.

    Args:
        path: the file or folder to name in the message.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}.") from error


def output_file(name: str | os.PathLike[str]) -> Path:
    """Resolves the name of a file that a user wants written, and makes its folder.

    Returns:
        The path, where a link leads to.

    Raises:
        UserError: if the folder cannot be made, or something is there that is no file, such as a
            device, which `write_bytes` would replace.
    """
    path = local_path(name)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    status = status_of(path)
    if status is not None and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise UserError(f"cannot write to {path}: what is there is no file.")
    return path.resolve() if path.is_symlink() else path


def subfolder(folder: Path, *names: str) -> Path:
    """Makes a folder within a run's folder, unless it exists.

    A run's folder may come from a stranger, and a link in it would lead elsewhere.

    Args:
        folder: an existing folder.
        names: names of folders, each within the one before.

    Returns:
        The path of the last one.

    Raises:
        UserError: if one of them is a link, or cannot be made.
    """
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            raise UserError(f"{folder} is a link, through which nothing is written. Remove it.")
        with writing_to(folder):
            folder.mkdir(exist_ok=True)
    return folder


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file atomically: readers see the old file or the new one, never a part.

    The content is on the disk when this returns. A link in the file's place is replaced, not
    followed.

    Args:
        path: the file.
        content: its new content.

    Raises:
        UserError: if the file cannot be written.
    """
    scratch = path.with_name(f".{path.name[:100]}.{os.getpid()}.new")
    with writing_to(path):
        try:
            scratch.unlink(missing_ok=True)
            with scratch.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Replaces a text file, in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def json_text(content: dict[str, Any]) -> str:
    """Formats JSON with an indentation of two and a final newline, as in all files of a run."""
    return json.dumps(content, indent=2) + "\n"


def digest_json(content: dict[str, Any]) -> str:
    """Computes the SHA-256 of JSON content; the order of its keys has no effect."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces a JSON file, as `write_bytes` does, and adds the digest that `read_json` checks.

    Args:
        path: the file.
        content: what JSON can hold; no key is "sha256".

    Raises:
        UserError: if the file cannot be written.
    """
    write_text(path, json_text({**content, _DIGEST: digest_json(content)}))


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file, and checks its digest; files of earlier versions have none.

    Args:
        path: the file.

    Returns:
        Its content without the digest; None if there is no such file.

    Raises:
        UserError: if it cannot be read, holds no JSON object, or differs from what was written.
    """
    try:
        with open_regular(path) as file:
            content = json.loads(file.read())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. Put the original back.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. Put the original back.")
    digest = content.pop(_DIGEST, None)
    if digest is not None and digest != digest_json(content):
        raise UserError(
            f"{path} is damaged, or was edited: it does not match its {_DIGEST}. Put the original "
            f"back; or, if the change was meant, delete its line {_DIGEST!r}."
        )
    return content
