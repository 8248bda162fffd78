"""Fields of ``config.data`` that a loader reads for itself, checked when they are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from rollingq_jax.errors import ConfigError

T = TypeVar("T")


def _field(config_data: Any, name: str) -> Any:
    if isinstance(config_data, Mapping):
        return config_data.get(name)
    return getattr(config_data, name, None)


def option(config_data: Any, name: str, default: T, *, minimum: float | None = None) -> T:
    """The field ``name``, or the default where the field is absent or None.

    Args:
      config_data: a ConfigDict, a mapping or an object with attributes.
      name: of the field.
      default: its type is the type that the field must have (an int counts as a float).
      minimum: the least value allowed.

    Raises:
      ConfigError: the value has another type or is below the minimum.
    """
    value: Any = _field(config_data, name)
    if value is None:
        return default
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, Mapping) and hasattr(value, "items"):
        value = dict(value.items())
    if isinstance(default, tuple) and isinstance(value, list):
        value = tuple(value)
    wanted: type[Any] = dict if isinstance(default, Mapping) else type(default)
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        raise ConfigError(f"data.{name}: {value!r}; must be of type {wanted.__name__}")
    if minimum is not None and value < minimum:
        raise ConfigError(f"data.{name}: {value!r}; must be at least {minimum:g}")
    return value


def choice(config_data: Any, name: str, allowed: tuple[str, ...]) -> str:
    """The field ``name``, one of ``allowed``; the first of them where it is absent.

    Raises:
      ConfigError: the value is not allowed.
    """
    value = option(config_data, name, allowed[0])
    if value not in allowed:
        raise ConfigError(f"data.{name}: {value!r}; must be one of {', '.join(allowed)}")
    return value


def mapping_option(config_data: Any, name: str) -> dict[str, str]:
    """The field ``name``, a mapping of strings or a string "a=b, c=d"; empty where it is absent.

    Raises:
      ConfigError: the value is neither.
    """
    value = _field(config_data, name)
    if not isinstance(value, str):
        given: dict[Any, Any] = option(config_data, name, {})
        return {str(key): str(item) for key, item in given.items()}
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(left.strip() and right.strip() for left, _, right in pairs):
        raise ConfigError(f"data.{name}: {value!r}; must be of the form 'name=value, name=value'")
    return {left.strip(): right.strip() for left, _, right in pairs}


def local_path(text: str, field: str) -> Path:
    """The path that a field holds, where it has to be a local one.

    Raises:
      ConfigError: it is the address of something else, which ``Path`` would take for a folder.
    """
    if "://" in text:
        raise ConfigError(
            f"{field}: {text!r}; must be a local path (gs:// is for the workdir, --config_json "
            "and, as data.path, .npz files and folders of .npy files)"
        )
    return Path(text).expanduser()


def array_path(text: str, field: str) -> Path | epath.Path:
    """As :func:`local_path`, but an address on gs:// is allowed."""
    return epath.Path(text) if text.startswith("gs://") else local_path(text, field)
