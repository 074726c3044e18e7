"""Fetching FashionMNIST's four IDX files from the first source that has them."""

import http.client
import logging
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tinyvgg_jax.data import idx
from tinyvgg_jax.errors import UserError, first_line

logger = logging.getLogger(__name__)

OFFICIAL_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Seconds to wait for an answer, so that without a network every attempt fails soon.
_TIMEOUT_SECONDS = 5
# Seconds for a whole apt-get command, which may have to load lists over a slow network.
_APT_TIMEOUT_SECONDS = 600


def fetch_fashion_mnist(scratch: Path) -> Path:
    """Finds or fetches the four files.

    It tries Debian's installed package, the official download, and Debian's package from a mirror,
    in this order.

    Args:
        scratch: an existing folder to download into.

    Returns:
        A folder with the four files, whose content has been verified.

    Raises:
        UserError: if no source has them; the message lists the failures and remedies.
    """
    attempts: list[tuple[str, Callable[[Path], Path]]] = [
        (str(DEBIAN_FOLDER), lambda _: DEBIAN_FOLDER),
        ("the official download", _download),
        (f"Debian's package {DEBIAN_PACKAGE}", _unpack_debian_package),
    ]
    failures = []
    for name, attempt in attempts:
        try:
            folder = attempt(scratch)
            missing = [file for file in idx.FILE_NAMES if idx.find(folder, file) is None]
            if missing:
                raise FileNotFoundError(f"no {missing[0]} there")
            if idx.unlike_fashion_mnist(folder):
                raise ValueError("the files are not FashionMNIST's (SHA-256 of their content)")
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
            subprocess.SubprocessError,
        ) as error:
            failures.append(f"{name}: {_reason(error)}")
            logger.info("FashionMNIST could not be fetched from %s: %s", name, _reason(error))
            continue
        logger.info("FashionMNIST comes from %s.", name)
        return folder
    raise UserError(
        "FashionMNIST is not prepared here and could not be fetched ("
        + "; ".join(failures)
        + "). Do one of these: connect to the internet and run again; run `apt-get install "
        f"{DEBIAN_PACKAGE}`; or put the four IDX files into a folder and pass "
        "--config.data.source_dir=FOLDER."
    )


def _download(scratch: Path) -> Path:
    folder = scratch / "download"
    folder.mkdir()
    for name in idx.FILE_NAMES:
        url = f"{OFFICIAL_URL}{name}.gz"
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
            (folder / f"{name}.gz").open("wb") as file,
        ):
            shutil.copyfileobj(response, file)
    return folder


def _unpack_debian_package(scratch: Path) -> Path:
    """Downloads the package with apt-get and unpacks it; it needs no root and installs nothing."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FileNotFoundError("no apt-get on this machine")
    folder = scratch / "debian"
    for part in ("lists/partial", "cache/archives/partial", "unpacked"):
        (folder / part).mkdir(parents=True)
    # All of apt's own folders are replaced by ones in `scratch`, which this user may write to.
    options = [
        f"-oDir::State::Lists={folder / 'lists'}",
        f"-oDir::Cache={folder / 'cache'}",
        f"-oAcquire::http::Timeout={_TIMEOUT_SECONDS}",
        f"-oAcquire::https::Timeout={_TIMEOUT_SECONDS}",
        "-oAcquire::Retries=0",
        "-oAcquire::Languages=none",
        "-oAPT::Sandbox::User=",
        "-oDebug::NoLocking=1",
    ]
    for command in (["update"], ["download", DEBIAN_PACKAGE]):
        _run(["apt-get", "-q", *options, *command], cwd=folder)
    (package,) = folder.glob(f"{DEBIAN_PACKAGE}*.deb")
    _run(["dpkg-deb", "-x", str(package), str(folder / "unpacked")], cwd=folder)
    return folder / "unpacked" / DEBIAN_FOLDER.relative_to("/")


def _run(command: list[str], cwd: Path) -> None:
    result = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_APT_TIMEOUT_SECONDS,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise OSError(f"{command[0]}: {lines[-1]}")


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return first_line(reason) if isinstance(reason, Exception) else str(reason)
