"""Reading and verifying the IDX files of MNIST and its relatives."""

import gzip
import hashlib
import logging
import re
import zlib
from pathlib import Path

import numpy as np

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import open_regular

logger = logging.getLogger(__name__)

# SHA-256 of FashionMNIST's files, decompressed, because each distributor compresses them anew.
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FILE_NAMES = tuple(FASHION_MNIST_SHA256)
_PREFIXES = {"train": "train", "test": "t10k"}
_NUM_CLASSES = 10
# Names of classes, one a line, beside the four files.
_CLASSES = "classes.txt"


def find(folder: Path, name: str) -> Path | None:
    """Finds one of the four files in a folder; None if it is not there.

    Args:
        folder: the folder.
        name: the file's name as MNIST has it. It may end in `.gz`, have a dot before "idx", and
            begin with the name of a dataset, as in `emnist-letters-test-images-idx3-ubyte.gz`.
    """
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    prefix, kind, rank, _ = name.split("-")
    split = "(t10k|test)" if prefix == "t10k" else prefix
    pattern = re.compile(rf"(.*-)?{split}-{kind}[.-]{rank}-ubyte(\.gz)?")
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    return found[0] if found and found[0].is_file() else None


def is_idx_folder(folder: Path) -> bool:
    """Tells whether a folder holds any of the four files.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return any(find(folder, name) for name in FILE_NAMES)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}.") from error


def _read_bytes(path: Path) -> bytes:
    """Reads a file, and decompresses it if its name ends in `.gz`.

    Raises:
        UserError: if it cannot be read or decompressed.
    """
    try:
        with open_regular(path) as file:
            raw = file.read()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); fetch it again.") from error


def read(path: Path, rank: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes.

    Args:
        path: the file, gzipped if its name ends in `.gz`.
        rank: the number of dimensions that it must have.

    Returns:
        A uint8 array of `rank` dimensions.

    Raises:
        UserError: if the file cannot be read, is not IDX, is truncated or too long, or has
            another rank.
    """
    content = _read_bytes(path)
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an IDX file of unsigned bytes; fetch it again.")
    if content[3] != rank:
        raise UserError(f"{path} has {content[3]} dimensions where {rank} are expected.")
    header = 4 + 4 * rank
    if len(content) < header:
        raise UserError(f"{path} is truncated; fetch it again.")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, 4))
    if len(content) - header != int(np.prod(shape, dtype=np.int64)):
        raise UserError(
            f"{path} is damaged: its header promises {shape}, {len(content) - header:,} bytes "
            "follow; fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_folder(
    folder: Path, num_classes: int = _NUM_CLASSES
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads and checks the four files of MNIST or a dataset of the same layout.

    Args:
        folder: holds `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, see `find`.
        num_classes: number of classes.

    Returns:
        Images `[N, H, W]` uint8 and labels `[N]` uint8, for each of "train" and "test".

    Raises:
        UserError: if a file is missing or damaged, if the numbers of images and labels differ, if
            the images of the two splits differ in shape, or if a label has no class.
    """
    splits = {}
    for split, prefix in _PREFIXES.items():
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        paths = [find(folder, name) for name in names]
        for name, path in zip(names, paths, strict=True):
            if path is None:
                raise UserError(f"{folder} holds neither {name}.gz nor {name}.")
        images, labels = (
            read(path, rank) for path, rank in zip(paths, (3, 1), strict=True) if path
        )
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images)} {split} images, {len(labels)} labels.")
        if not len(labels) or labels.max() >= num_classes:
            raise UserError(f"{folder}: the {split} labels are not all in 0 to {num_classes - 1}.")
        splits[split] = (images, labels)
    if splits["train"][0].shape[1:] != splits["test"][0].shape[1:]:
        raise UserError(f"{folder}: the train and test images differ in size.")
    return splits


def read_any(folder: Path) -> tuple[tuple[str, ...], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Reads IDX files of classes that are not known beforehand.

    Labels that begin at 1, as those of EMNIST's letters do, are counted from 0, which is logged.

    Args:
        folder: holds the four files, and perhaps the classes' names in `classes.txt`, a line each.

    Returns:
        The names of the classes, which are their labels in the files if nothing names them; and
        what `read_folder` returns.

    Raises:
        UserError: as `read_folder`; or if `classes.txt` does not name every class once.
    """
    arrays = read_folder(folder, 256)
    lowest, highest = (
        int(pick([pick(labels) for _, labels in arrays.values()])) for pick in (min, max)
    )
    shift = 1 if lowest == 1 else 0
    if shift:
        logger.info("The labels in %s begin at 1; they are counted from 0.", folder)
        arrays = {split: (images, labels - 1) for split, (images, labels) in arrays.items()}
    count, path = highest + 1 - shift, folder / _CLASSES
    names = tuple(str(label) for label in range(shift, highest + 1))
    if path.exists():
        try:
            with open_regular(path) as file:
                # Some editors on Windows begin a file with a byte order mark.
                lines = file.read().decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}).") from error
        names = tuple(line.strip() for line in lines if line.strip())
        if not len(names) == len(set(names)) >= count:
            raise UserError(f"{path} has {len(set(names))} names, and the labels {count} classes.")
    if len(names) < 2:
        raise UserError(f"{folder} holds images of one class only.")
    return names, arrays


def content_sha256(folder: Path) -> str:
    """Computes a SHA-256 of the content of the four files, decompressed."""
    sha = hashlib.sha256()
    for name in FILE_NAMES:
        path = find(folder, name)
        sha.update(hashlib.sha256(_read_bytes(path)).digest() if path else b"")
    return sha.hexdigest()


def class_names_sha256(folder: Path) -> str | None:
    """Computes a SHA-256 of the file with the classes' names; None if there is none."""
    try:
        return hashlib.sha256((folder / _CLASSES).read_bytes()).hexdigest()
    except OSError:
        return None


def unlike_fashion_mnist(folder: Path) -> list[str]:
    """Lists the files in a folder whose content is not FashionMNIST's.

    Args:
        folder: a folder that `read_folder` can read.

    Returns:
        Some of `FILE_NAMES`; none if the folder holds FashionMNIST.
    """
    paths = {name: find(folder, name) for name in FILE_NAMES}
    return [
        name
        for name, path in paths.items()
        if path is None
        or hashlib.sha256(_read_bytes(path)).hexdigest() != FASHION_MNIST_SHA256[name]
    ]
