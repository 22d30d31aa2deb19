"""Find, download and read Fashion-MNIST's four idx files."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import shutil
import socket
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from traj_ood.errors import TrajOODError
from traj_ood.io.files import cache_folder, check_can_write

logger = logging.getLogger(__name__)

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SOCKET_TIMEOUT = 10.0  # seconds; short, so that a machine without network tries the next way soon
APT_TIMEOUT = 300.0  # seconds for one apt-get call: package lists and 30 MB over a slow line


def find_fashion_mnist(root: str | Path | None = None) -> Path | None:
    """The folder with the four files, or None; nothing is downloaded.

    Looks in ``root`` only if given, first in ``fashion-mnist`` below it, else in Debian's folder and the cache.
    """
    bases = [Path(root) / "fashion-mnist", Path(root)] if root is not None else _default_folders()
    return next((found for base in bases if (found := find_idx_files(base, "FashionMNIST")) is not None), None)


def find_idx_files(base: Path, name: str) -> Path | None:
    """The folder with the four files, gzipped or not: ``base``, or torchvision's ``name/raw`` below it; else None."""
    for folder in (base, base / name / "raw"):
        if all(_idx_path(folder, file) is not None for file in FILES):
            return folder
    return None


def _default_folders() -> Iterator[Path]:
    yield DEBIAN_FOLDER
    yield from (cache_folder() / "fashion-mnist", cache_folder())  # last, as it raises without a home folder


def obtain_fashion_mnist(root: str | Path | None = None) -> Path:
    """The folder with the four files, which are downloaded into the cache if they are not on this machine.

    Looks in ``root`` only if given. Otherwise tries, in this order: Debian's dataset folder, the cache, torchvision's
    download, and Debian's package, unpacked without root rights.
    """
    found = find_fashion_mnist(root)
    if found is not None:
        return found
    if root is not None:
        raise TrajOODError(
            f"Fashion-MNIST: expected {', '.join(name + '[.gz]' for name in FILES)} in {root} or in FashionMNIST/raw "
            "below it, found not all four; correct the root, or leave it out to download them"
        )
    target = cache_folder() / "fashion-mnist"
    check_can_write(target)
    for fetch in (_fetch_torchvision, _fetch_debian):
        if _into_cache(target, fetch):
            return target
    raise TrajOODError(
        f"Fashion-MNIST was not found and could not be downloaded; either put {', '.join(f + '.gz' for f in FILES)} "
        f"into {target}, or give the folder that contains them as root, or install Debian's package {DEBIAN_PACKAGE} "
        f"(files in {DEBIAN_FOLDER}), or run again with network access for torchvision's download"
    )


def read_fashion_mnist(folder: Path, part: str, name: str = "fashion-mnist") -> tuple[np.ndarray, np.ndarray]:
    """Read the images, (N, 28, 28) uint8, and labels, (N,) uint8, of the part ``train`` or ``t10k``; or those of
    ``mnist``, as ``name``, whose files have the same names."""
    images = _read_part(folder, f"{part}-images-idx3-ubyte")
    labels = _read_part(folder, f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise TrajOODError(
            f"{folder}: expected {part} images (N, 28, 28) and labels (N,), got {images.shape} and {labels.shape}; "
            "fetch the files again"
        )
    if labels.size and int(labels.max()) > 9:
        raise TrajOODError(f"{folder}: expected {part} labels 0 to 9, got {int(labels.max())}; fetch the files again")
    _check_is(name, folder, images)
    return images, labels


def _check_is(name: str, folder: Path, pixels: np.ndarray) -> None:
    """Refuse files of the other set: by the share of pixels that are not black, 19 % for digits and 50 % for
    clothes."""
    share = float((pixels > 0).mean()) if pixels.size else 0.0
    found = "mnist" if share <= 0.35 else "fashion-mnist"
    if found != name and pixels.size:
        wanted, looks = ("MNIST's digits", "Fashion-MNIST") if name == "mnist" else ("Fashion-MNIST's clothes", "MNIST")
        raise TrajOODError(
            f"{folder}: expected {wanted}, got images of which {share:.0%} is not black, as in {looks}; where both lie "
            f"below one --data-root, put each into a folder of its own, such as {name}"
        )


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped or not, as a uint8 array of the shape in its header.

    Header: two zero bytes, type 0x08 (unsigned byte), the number of dimensions, then each size as big-endian uint32.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise TrajOODError(f"{path}: cannot be read as an idx file ({reason}); fetch the file again") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4:
        raise TrajOODError(
            f"{path}: expected an idx file of unsigned bytes (magic 00 00 08 and the number of dimensions), got magic "
            f"{data[:4].hex(' ') or 'nothing'}; fetch the file again"
        )
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise TrajOODError(f"{path}: expected a header of {header} bytes, got {len(data)}; fetch the file again")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(data) - header != expected:
        raise TrajOODError(
            f"{path}: expected {expected} bytes of data for shape {shape}, got {len(data) - header}; "
            "fetch the file again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


def _read_part(folder: Path, name: str) -> np.ndarray:
    path = _idx_path(folder, name)
    if path is None:
        raise TrajOODError(f"{folder / name}.gz: expected this idx file, found nothing; fetch the files again")
    return read_idx(path)


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def _into_cache(target: Path, fetch: Callable[[Path], Path | None]) -> bool:
    """Run ``fetch`` in a temporary folder and rename its result to ``target``; returns whether ``target`` has the files
    now. Errors are only logged, as the caller then tries the next way."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fashion-mnist-") as temp:
            folder = fetch(Path(temp))
            if folder is None:
                return False
            for part in ("train", "t10k"):
                read_fashion_mnist(folder, part)  # keeps a proxy's error page out of the cache
            if find_fashion_mnist(target) is None:  # else another process was faster
                shutil.rmtree(target, ignore_errors=True)  # an incomplete set would block the rename
                folder.rename(target)
    except Exception as error:  # network, proxy and apt errors of any class
        logger.info("Fashion-MNIST: %s failed (%s)", fetch.__name__, " ".join(str(error).split()))
    return find_fashion_mnist(target) is not None


def _fetch_torchvision(temp: Path) -> Path | None:
    """Download with torchvision, which checks the files' MD5."""
    from torchvision.datasets import FashionMNIST

    with _socket_timeout(SOCKET_TIMEOUT), contextlib.redirect_stdout(io.StringIO()):  # it prints every failed mirror
        FashionMNIST(str(temp), download=True)
    return find_fashion_mnist(temp)


def _fetch_debian(temp: Path) -> Path | None:
    """Download Debian's package with apt and unpack it, without root rights and without installing it."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    # Try the system's package lists first, then download lists into the temporary folder.
    if not _apt(temp, ["download", DEBIAN_PACKAGE]):
        state, cache = temp / "lists", temp / "cache"
        (state / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::lists={state}", "-o", f"Dir::Cache={cache}"]
        if not (_apt(temp, [*own, "update"]) and _apt(temp, [*own, "download", DEBIAN_PACKAGE])):
            return None
    packages = list(temp.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if not packages:
        return None
    subprocess.run(
        ["dpkg-deb", "-x", str(packages[0]), str(temp / "unpacked")],
        check=True,
        capture_output=True,
        timeout=APT_TIMEOUT,
    )
    return find_fashion_mnist(temp / "unpacked" / DEBIAN_FOLDER.relative_to("/"))


def _apt(folder: Path, arguments: list[str]) -> bool:
    quick = ["-o", f"Acquire::http::Timeout={SOCKET_TIMEOUT:.0f}", "-o", "Acquire::Retries=0"]
    command = ["apt-get", "-q", *quick, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=APT_TIMEOUT).returncode == 0


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Context manager that sets the global socket timeout: torchvision has none, and would wait for minutes behind a
    firewall that drops packets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
