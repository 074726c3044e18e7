"""Reading and verifying the IDX files of MNIST and its relatives."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from tinyvgg_jax.errors import UserError
from tinyvgg_jax.paths import open_regular

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


def find(folder: Path, name: str) -> Path | None:
    """Finds the file `name.gz` or `name` in a folder; None if there is neither."""
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    return None


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


def read_folder(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads and checks the four files of MNIST or a dataset of the same layout.

    Args:
        folder: holds `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, gzipped or not.

    Returns:
        Images `[N, H, W]` uint8 and labels `[N]` uint8, for each of "train" and "test".

    Raises:
        UserError: if a file is missing or damaged, if the numbers of images and labels differ, if
            the images of the two splits differ in shape, or if a label is not in 0 to 9.
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
        if not len(labels) or labels.max() >= _NUM_CLASSES:
            raise UserError(f"{folder}: the {split} labels are not all in 0 to {_NUM_CLASSES - 1}.")
        splits[split] = (images, labels)
    if splits["train"][0].shape[1:] != splits["test"][0].shape[1:]:
        raise UserError(f"{folder}: the train and test images differ in size.")
    return splits


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
