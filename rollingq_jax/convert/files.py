"""Reading a file of named tensors, local or from an address, without ever running code from it."""

import hashlib
import http.client
import importlib
import os
import pickle
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import ml_dtypes
import numpy as np

from rollingq_jax.errors import DataError, said

SUFFIXES = (".npz", ".safetensors", ".pth", ".pt")
ADDRESS = re.compile(r"(?:https?|file)://[^#]+#sha256=[0-9a-f]{64}")
ADDRESS_FORM = (
    "a local path, or an address (https://, http:// or file://) with #sha256= and the file's 64 "
    "hexadecimal digits behind it"
)
TIMEOUT = 60  # seconds without a byte from a server
TORCH_AT_LEAST = (2, 6)  # before it, weights_only=True could be made to run code (CVE-2025-32434)


def fetch_weights(address: str, folder: str | os.PathLike[str]) -> Path:
    """The local file behind an address, kept under its checksum; a path stays as it is.

    Args:
      address: a local path, or an address that ends in `#sha256=...`: whoever serves the file
        later, what is loaded is what the address was written for.
      folder: where fetched files are kept. One that is there, and whole, is not fetched again.

    Raises:
      DataError: an address without a checksum, or one that cannot be fetched or kept; or the file
        has another checksum.

    Examples:
      >>> fetch_weights("vit.npz", "cache")
      PosixPath('vit.npz')
      >>> fetch_weights("https://example.org/vit.npz", "cache")
      Traceback (most recent call last):
      rollingq_jax.errors.DataError: weights are 'https://...'; allowed: a local path, or an ...
    """
    if "://" not in address:
        return Path(address)
    if not ADDRESS.fullmatch(address):
        raise DataError(f"weights are {address!r}; allowed: {ADDRESS_FORM}")
    url, _, expected = address.partition("#sha256=")
    place = Path(folder) / (expected + PurePosixPath(unquote(urlsplit(url).path)).suffix)
    if place.is_file() and _sha256(place) == expected:
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # The file is in its place whole or not at all, also if two runs fetch it at once.
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            part = Path(scratch) / place.name
            with urllib.request.urlopen(url, timeout=TIMEOUT) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            found = _sha256(part)
            if found == expected:
                part.replace(place)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"weights of {url} cannot be fetched ({said(error)})") from error
    if found != expected:
        raise DataError(f"weights of {url} have sha256 {found}; allowed: {expected}")
    return place


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a file by name, as NumPy arrays.

    `.npz` is read with `allow_pickle=False`, `.safetensors` through its library, `.pth` and `.pt`
    through `torch.load(weights_only=True)` alone: nothing in a file is executed. Where there is a
    `model` inside (upstream's checkpoints) it is taken, and the optimizer beside it left.

    Raises:
      DataError: no such file, another suffix, a damaged file, an entry that is no array, or a
        library that is not installed.

    Examples:
      >>> import os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "weights.npz")
      >>> np.savez(path, weight=np.ones((2, 3)))
      >>> load_state_dict(path)["weight"].shape
      (2, 3)
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} has suffix {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    library = _library(path.suffix)
    try:
        tensors = _read(path, library)
    except pickle.UnpicklingError as error:  # its own message advises to load without safety
        raise DataError(
            f"{path} is damaged, or holds more than tensors, which is not read"
        ) from error
    except Exception as error:  # what a parser raises on damaged or hostile bytes is open-ended
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read as {path.suffix}: {reason}") from error
    if isinstance(tensors, Mapping) and isinstance(tensors.get("model"), Mapping):
        tensors = tensors["model"]
    if not isinstance(tensors, Mapping) or not tensors:
        raise DataError(f"{path} holds no tensors by name")
    return {str(name): _as_array(path, name, value) for name, value in tensors.items()}


def load_tensor(path: Path) -> np.ndarray:
    """The one tensor in a `.pt` file, through `torch.load(weights_only=True)`.

    Raises:
      DataError: PyTorch is missing or too old, or the file holds something else.
    """
    return _as_array(path, "a tensor", _read(path, _library(".pt")))


def _library(suffix: str) -> Any:
    """The module that reads a suffix; imported here, because each is an optional dependency."""
    if suffix == ".npz":
        return np
    name = "safetensors.numpy" if suffix == ".safetensors" else "torch"
    install = name.split(".")[0]
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"reading {suffix} needs the package {install!r}, which is not installed: "
            f"pip install {install}, or convert the file to .npz"
        ) from error
    if name == "torch":
        version = str(library.__version__)
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TORCH_AT_LEAST:
            raise DataError(
                f"torch is {version}; allowed: 2.6 or later, whose weights_only loading runs no "
                "code from the file"
            )
    return library


def _read(path: Path, library: Any) -> Any:
    if path.suffix == ".npz":
        with library.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    if path.suffix == ".safetensors":
        return library.load_file(path)
    return library.load(path, map_location="cpu", weights_only=True)


def _as_array(path: Path, name: Any, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a PyTorch tensor: NumPy knows no bfloat16
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        value = value.numpy()
    if not isinstance(value, np.ndarray):
        raise DataError(f"{path} holds {name}, a {type(value).__name__}; allowed: arrays")
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:  # how NumPy's format keeps bfloat16
        value = value.view(ml_dtypes.bfloat16)
    return value
