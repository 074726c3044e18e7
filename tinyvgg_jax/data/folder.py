"""A folder of pictures as a dataset: its classes, its splits, and its pixels."""

import collections
import contextlib
import hashlib
import itertools
import logging
import os
import unicodedata
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyvgg_jax.data.progress import progress
from tinyvgg_jax.errors import UserError
from tinyvgg_jax.pictures import list_pictures, load_picture, quiet_pillow
from tinyvgg_jax.system import MemoryBudget, available_memory

logger = logging.getLogger(__name__)

# Names of the folders of splits.
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
# Shares of the pictures of each class, where no split is given.
_TRAIN, _VALIDATION = 0.8, 0.1
# Pictures that are decoded before they are asked for.
_AHEAD = 256
# Unreadable pictures that are named; the others are counted.
_NAMED = 5


class Options(NamedTuple):
    """How pictures become images of one size; None is the default, 28, 1 and "crop".

    Attributes:
        image_size: height and width in pixels.
        channels: 1 for grey or 3 for colour.
        fit: "crop" cuts the middle out, "pad" keeps all and fills the rest with the colour of the
            border, and "garment" is `pictures.normalise`.
    """

    image_size: int | None = None
    channels: int | None = None
    fit: str | None = None

    def image_shape(self) -> tuple[int, int, int]:
        """Returns `(H, W, C)`."""
        size = self.image_size or 28
        return size, size, self.channels or 1


DEFAULTS = Options()


class Rows:
    """Some of the images of a file, in an order of their own; read when they are asked for.

    Attributes:
        shape: `[N, H, W, C]`.
    """

    def __init__(self, images: np.ndarray, indices: np.ndarray):
        """Chooses the images.

        Args:
            images: `[M, H, W, C]` uint8, memory-mapped.
            indices: `[N]` int.
        """
        self._images, self._indices = images, indices
        self.shape = (len(indices), *images.shape[1:])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.asarray(self._images[i]) for i in self._indices)


class Content(NamedTuple):
    """Content of a dataset that is to be prepared.

    Attributes:
        class_names: the names, in the order of the labels.
        splits: for each split images `[N, H, W, C]` uint8 and labels `[N]`.
    """

    class_names: tuple[str, ...]
    splits: dict[str, tuple[Rows, np.ndarray]]


class _File(NamedTuple):
    """A picture's file, its class, and the split whose folder holds it, "" without any."""

    path: Path
    class_name: str
    split: str


class _Decoded(NamedTuple):
    """Pictures that could be read: their files, SHA-256, and rows in `images`."""

    files: list[_File]
    digests: list[str]
    images: np.ndarray


def read_folder(folder: Path, options: Options, scratch: Path) -> Content:
    """Reads a folder that holds a subfolder of pictures for each class.

    The folder may also hold `train`, `test` and perhaps `validation`, each with such subfolders.
    Where a split is missing, each picture's content decides: 10 % of the pictures are for
    validation, 10 % for the test. So a picture that is added later moves no other, and copies of a
    picture are on the same side.

    Args:
        folder: the folder.
        options: size, colour and fit of the images.
        scratch: a folder for the decoded images.

    Returns:
        The classes, sorted by name, and the splits.

    Raises:
        UserError: if it is no such folder, or a class has too few pictures that can be read.
    """
    files = _list(folder)
    names = _class_names(folder, files)
    decoded = _decode(files, options, scratch)
    splits = _split(folder, decoded, names)
    label_of = {name: label for label, name in enumerate(names)}
    content = {}
    for split, indices in splits.items():
        labels = np.array([label_of[decoded.files[i].class_name] for i in indices], np.uint8)
        content[split] = (Rows(decoded.images, np.array(indices)), labels)
    return Content(names, content)


def fingerprint(folder: Path) -> str:
    """Hashes the names and sizes of a folder's pictures, which is quick for a million, too.

    Raises:
        UserError: if the folder cannot be read.
    """
    sha = hashlib.sha256()
    for file in _list(folder):
        try:
            size = file.path.stat().st_size
        except OSError:  # It may be a link to nothing, which is no picture either.
            size = -1
        sha.update(
            f"{file.path.relative_to(folder).as_posix()}\0{size}\0".encode("utf-8", "replace")
        )
    return sha.hexdigest()


def _list(folder: Path) -> list[_File]:
    """Lists the pictures in the folders of classes.

    Raises:
        UserError: if a folder cannot be read, or holds no pictures.
    """
    shown = _subfolders(folder)
    given = {path: _SPLITS.get(path.name.lower(), "") for path in shown}
    if "train" in given.values() and len(set(given.values()) - {""}) > 1:
        others = [path.name for path, split in given.items() if not split]
        if others:
            raise UserError(
                f"{folder} holds folders of splits, such as train, and beside them {others[0]!r}. "
                "Move that away."
            )
        of_splits = [(one, split) for path, split in given.items() for one in _subfolders(path)]
        empty = set(given) - {one.parent for one, _ in of_splits}
        if empty:
            raise UserError(f"{min(empty)} holds no folders of classes.")
    elif shown and all(given.values()):
        raise UserError(f"{folder} needs both train and test, or neither.")
    else:
        of_splits = [(path, "") for path in shown]
    files = []
    for path, split in of_splits:
        pictures = list_pictures(path)
        if not pictures:
            raise UserError(f"{path} holds no pictures of a format that can be read here.")
        files += [_File(picture, path.name.strip(), split) for picture in pictures]
    if not files:
        raise UserError(
            f"{folder} holds no pictures in folders: it needs a folder for each class, or train "
            "and test with those."
        )
    return files


def _subfolders(folder: Path) -> list[Path]:
    """Lists the folders in a folder, sorted, but for hidden ones and what a Mac adds to archives.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {(error.strerror or '').lower()}.") from error
    return [path for path in subfolders if not path.name.startswith((".", "__MACOSX"))]


def _class_names(folder: Path, files: list[_File]) -> tuple[str, ...]:
    names = sorted({file.class_name for file in files})
    if len(names) == 1:
        raise UserError(f"{folder} holds pictures of one class only, {names[0]!r}.")
    if len(names) > 256:
        raise UserError(
            f"{folder} has {len(names):,} folders of classes; at most 256 are possible."
        )
    # tfds keeps the names in a text file, a line each.
    bad = [name for name in names if not name or any(map(_breaks_a_line, name))]
    if bad:
        raise UserError(
            f"{folder} has a class whose name is blank or holds line breaks, control characters or "
            f"bytes that are no text: {bad[0]!r}."
        )
    by_lower = collections.defaultdict(list)
    for name in names:
        by_lower[name.lower()].append(name)
    for alike in by_lower.values():
        if len(alike) > 1:
            raise UserError(f"{folder} has classes whose names differ by case only: {alike}.")
    return tuple(names)


def _breaks_a_line(character: str) -> bool:
    """Tells whether a character may break a line, or cannot be written as UTF-8."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _decode(files: list[_File], options: Options, scratch: Path) -> _Decoded:
    """Decodes pictures into a file in `scratch`; those that cannot be read are named and left out.

    Raises:
        UserError: if none can be read.
    """
    shape = options.image_shape()
    images = np.lib.format.open_memmap(
        scratch / "pictures.npy", "w+", np.uint8, (len(files), *shape)
    )
    _reserve(scratch / "pictures.npy")
    good: list[_File] = []
    digests: list[str] = []
    errors: list[str] = []
    with progress(len(files), "reading pictures") as advance:
        for file, answer in zip(files, _read_all(files, options), strict=True):
            advance(1)
            if isinstance(answer, UserError):
                errors.append(str(answer))
                continue
            digest, pixels = answer
            images[len(good)] = pixels
            good.append(file)
            digests.append(digest)
    for error in errors[:_NAMED]:
        logger.warning("%s", error)
    if errors:
        logger.warning("%s of %s pictures cannot be read.", f"{len(errors):,}", f"{len(files):,}")
    return _Decoded(good, digests, images)


def _reserve(path: Path) -> None:
    """Reserves a file's whole size on the disk.

    A memory-mapped file has holes, and a full disk would end the process when one is written to.

    Raises:
        OSError: if the disk is too full.
    """
    with path.open("r+b") as file, contextlib.suppress(AttributeError):  # macOS has no such call.
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _read_all(files: list[_File], options: Options) -> Iterator[tuple[str, np.ndarray] | UserError]:
    """Reads pictures in threads, in order, a bounded number before they are asked for."""
    budget = MemoryBudget(available_memory() // 4)
    shape, fit = options.image_shape(), options.fit or "crop"

    def read(file: _File) -> tuple[str, np.ndarray] | UserError:
        try:
            pixels = load_picture(file.path, shape, fit=fit, reserve=budget.take).pixels
            return hashlib.sha256(file.path.read_bytes()).hexdigest(), pixels
        except UserError as error:
            # The error that was raised refers to the frames that it passed, and they to the pixels.
            return UserError(str(error))
        except OSError as error:
            return UserError(f"{file.path}: cannot be read: {error.strerror}.")

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with quiet_pillow():
            waiting: collections.deque[Future[tuple[str, np.ndarray] | UserError]]
            rest = iter(files)
            waiting = collections.deque(
                pool.submit(read, file) for file in itertools.islice(rest, _AHEAD)
            )
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(read, file) for file in itertools.islice(rest, 1))
    finally:
        budget.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _split(folder: Path, decoded: _Decoded, names: tuple[str, ...]) -> dict[str, list[int]]:
    """Divides pictures into splits.

    Returns:
        The rows of each split.

    Raises:
        UserError: if a class has too few pictures, or a split is missing that must be given.
    """
    given = {file.split for file in decoded.files} - {""}
    rows = _without_copies(decoded)
    if given and not {"train", "test"} <= given:
        raise UserError(f"{folder} needs both train and test, or neither.")
    splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for name in names:
        own = [i for i in rows if decoded.files[i].class_name == name]
        ours = [i for i in own if decoded.files[i].split in ("", "train")]
        needed = 1 if given else 2
        if len(ours) < needed:
            raise UserError(
                f"class {name!r} in {folder} has {len(ours)} picture{'s' * (len(ours) != 1)} to be "
                f"trained on that can be read; at least {needed} are needed."
            )
        for i in own:
            splits[decoded.files[i].split or "train"].append(i)
        if not given:
            _move(splits, decoded, ours, "test", 1 - _TRAIN - _VALIDATION, at_least=1)
        if "validation" not in given:
            share = _VALIDATION if given else _VALIDATION / (_TRAIN + _VALIDATION)
            _move(splits, decoded, ours, "validation", share, at_least=0)
    _keep_on_one_side(splits, decoded)
    for name in names:
        if not any(decoded.files[i].class_name == name for i in splits["train"]):
            raise UserError(
                f"all pictures of class {name!r} in {folder} are in other classes, too."
            )
    return {split: members for split, members in splits.items() if members}


def _keep_on_one_side(splits: dict[str, list[int]], decoded: _Decoded) -> None:
    """Leaves out of a split what is in one that is held back further, in another class."""
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        digests = {decoded.digests[i] for i in splits[split]}
        splits[split] = [i for i in splits[split] if decoded.digests[i] not in seen]
        seen |= digests


def _move(
    splits: dict[str, list[int]],
    decoded: _Decoded,
    rows: list[int],
    split: str,
    share: float,
    at_least: int,
) -> None:
    """Moves a share of a class's pictures from "train" to another split, by their content alone."""

    def position(row: int) -> float:
        # Another hash for each split, so that the shares do not depend on one another.
        text = f"{split} {decoded.digests[row]}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64

    train = set(splits["train"])
    left = [row for row in rows if row in train]
    ordered = sorted(left, key=position)
    # The one that is first in the order goes if no other does; one stays to be trained on.
    number = max(at_least, sum(position(row) < share for row in ordered))
    moved = set(ordered[: min(number, len(left) - 1)])
    splits["train"] = [row for row in splits["train"] if row not in moved]
    splits[split] += sorted(moved)


def _without_copies(decoded: _Decoded) -> list[int]:
    """Leaves out copies of pictures in a class; the test's, then validation's, is the one kept."""
    order = {"test": 0, "validation": 1, "train": 2, "": 2}
    kept: dict[tuple[str, str], int] = {}
    for i in sorted(range(len(decoded.files)), key=lambda i: order[decoded.files[i].split]):
        kept.setdefault((decoded.digests[i], decoded.files[i].class_name), i)
    copies = len(decoded.files) - len(kept)
    if copies:
        logger.warning("%s pictures are copies of others and are left out.", f"{copies:,}")
    several = len(kept) - len({digest for digest, _ in kept})
    if several:
        logger.warning("%s pictures are in more than one class.", f"{several:,}")
    return sorted(kept.values())
