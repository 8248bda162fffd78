"""Errors that a user can cause and mend.

Each message is one line that names the field, the value that came and what is allowed. The command
lines print it without a traceback and leave with exit code 2.
"""

import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from types import ModuleType

# Control characters, line separators, what turns the direction of text around, and halves of
# letters, as undecodable file names have them.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A mistake on the user's side: the message says what to change.

    Examples:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.rolling_query(beta=-1.0)
      ... except rq.UserError as error:
      ...     print(error)
      beta is -1.0; allowed: 0 or more
    """


class ConfigError(UserError):
    """A configuration field is unknown, has the wrong type or a value out of range.

    Examples:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.build_model({"num_classes": 3, "dim": "wide"})
      ... except rq.ConfigError as error:
      ...     print(error)
      model.dim is 'wide'; allowed: an integer >= 1 and at most 1,048,576
    """


class DataError(UserError):
    """A data set, file or array is missing, damaged or not of the expected form.

    Examples:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.models.infer_kind((10, 2), complex)
      ... except rq.DataError as error:
      ...     print(error)
      an array of shape (10, 2) and dtype complex128 is of no known kind; allowed: ...
    """


class CheckpointError(UserError):
    """A checkpoint or working directory cannot be used as asked.

    Examples:
      >>> import rollingq_jax as rq
      >>> try:
      ...     rq.load("nowhere")
      ... except rq.CheckpointError as error:
      ...     print(error)
      workdir is 'nowhere'; allowed: the folder of a run, with config.json and checkpoints
    """


class NonFiniteError(UserError):
    """A loss, a gradient or a state is NaN or infinite."""


def said(error: BaseException) -> str:
    """What the system, or a client of gs://, said: in one line, to be quoted in a message."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]


def printable(text: str, keep: str = "\n\t") -> str:
    r"""The text as a terminal may have it: names in it cannot move the cursor or set colors.

    Args:
      text: any text.
      keep: control characters that stay; the others are written as escapes.

    Examples:
      >>> print(printable("a\x1b[31mb"))
      a\x1b[31mb
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def did_you_mean(
    name: str, known: Iterable[str], form: Callable[[str], str] = lambda name: name
) -> str:
    """The nearest of some names, as a part of a message; empty where none is near.

    Args:
      name: as it was typed.
      known: the names that there are.
      form: from such a name to what is shown.

    Examples:
      >>> did_you_mean("wrokdir", ["config", "workdir"], "--{}".format)
      ' (did you mean --workdir?)'
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f" (did you mean {form(near[0])}?)" if near else ""


# The extra that brings a package, where that is not [train].
_EXTRAS = {
    "PIL": "datasets",
    "av": "datasets",
    "espeakng_loader": "demo",
    "flatbuffers": "convert",
    "sklearn": "demo",
    "soundfile": "datasets",
    "tensorflow_datasets": "demo",
    "tokenizers": "text",
}


def missing_package(error: ImportError) -> str | None:
    """The line for a package of one of our extras that is not installed.

    None where it is something else: a module of our own, or a package that is there and fails.

    Examples:
      >>> print(missing_package(ModuleNotFoundError("No module named 'e_'", name="e_.path")))
      the package 'e_' is not installed; allowed: it is, as after pip install ...
    """
    package = (error.name or "").split(".")[0]
    if package in ("", "rollingq_jax") or importlib.util.find_spec(package) is not None:
        return None
    extra = _EXTRAS.get(package, "train")
    return (
        f"the package {package!r} is not installed; allowed: it is, as after "
        f'pip install "rollingq-jax[{extra}]" where rollingq-jax is installed, and '
        f'pip install ".[{extra}]" in a clone'
    )


def import_or_say(module: str) -> ModuleType:
    """Imports a module of ours that needs an extra.

    Raises:
      ModuleNotFoundError: a package is not installed; in the words of `missing_package`.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        line = missing_package(error)
        if line is None:
            raise
        raise ModuleNotFoundError(line, name=error.name) from None
