"""One kind of error for whatever goes wrong when a media file is read."""

import contextlib
import os
from collections.abc import Iterator

from rollingq_jax.errors import DataError


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a missing or damaged file into one ``DataError``."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{what} {path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{what} {path}: is a folder, not a file") from None
    except ImportError as error:
        raise DataError(f"{what} {path}: reading it needs the package {error.name}") from None
    except Exception as error:  # decoders raise almost any type on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} {path}: damaged or not supported ({reason[:200]})") from None
