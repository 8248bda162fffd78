"""A prepared TFDS data set on disk: found by its name, and checked before TFDS opens it.

``features.json`` names a Python class for each feature, and TFDS imports the modules that it names:
a folder from a stranger would run code. So the one folder that will be opened is looked for here,
every class named in it has to be one of TFDS's own that are imported already, and TFDS gets that
folder, never a name to resolve. Names in a configuration are of one form, without the namespaces
(``huggingface:``) and arguments that TFDS allows in them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rollingq_jax.data.reading import check_lfs_pointer
from rollingq_jax.errors import DataError, said

_CONFIG = r"[A-Za-z0-9_][\w+.-]*"
_NAME = re.compile(
    rf"(?P<name>[A-Za-z]\w*)(/(?P<config>{_CONFIG}))?"
    r"(:(?P<version>(\d{1,9}|\*)(\.(\d{1,9}|\*)){2}))?",
    re.ASCII,
)
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_MOST_BYTES = 16 << 20


class TfdsName(NamedTuple):
    """The parts of "name/config:version", as TFDS writes them in folders."""

    name: str
    config: str | None
    version: str | None


def parse_name(text: str) -> TfdsName | None:
    """``my_set``, ``my_set/config``, ``my_set:1.2.3`` or ``my_set:1.*.*``; None for other forms."""
    from tensorflow_datasets.core import naming

    found = _NAME.fullmatch(text)
    if not found:
        return None
    name = naming.camelcase_to_snakecase(found["name"])
    return TfdsName(name, found["config"], found["version"])


def find_prepared(wanted: TfdsName, folder: str) -> Path | None:
    """The folder with the ``features.json`` of the data set: of several versions, the newest.

    Args:
      wanted: what to look for. Without a config, the data set's own default.
      folder: TFDS's data directory; "" for those that TFDS knows.

    Raises:
      DataError: the default config that the folder names is no name.
    """
    from tensorflow_datasets.core.utils import file_utils
    from tensorflow_datasets.core.utils.version import list_all_versions

    for data_dir in file_utils.list_data_dirs(folder or None):
        root = Path(data_dir) / wanted.name
        if not _is_dir(root):
            continue
        config = wanted.config or ("" if list_all_versions(root) else _default_config(wanted, root))
        for version in reversed(list_all_versions(root / config)):
            place = root / config / str(version)
            if _matches(version, wanted.version) and (place / "features.json").exists():
                return place
    return None


def _matches(version: Any, wanted: str | None) -> bool:
    return wanted is None or version.match(wanted)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _default_config(wanted: TfdsName, root: Path) -> str:
    """The config that is meant where none is named; "" if the data set has none."""
    import tensorflow_datasets as tfds

    try:
        builder_class = tfds.builder_cls(wanted.name)
        if builder_class.BUILDER_CONFIGS:
            return builder_class.default_builder_config.name
    except tfds.core.DatasetNotFoundError:
        pass
    file = root / ".config" / "metadata.json"
    config = _read_json(file).get("default_config_name") if file.exists() else None
    if config and not (isinstance(config, str) and re.fullmatch(_CONFIG, config, re.ASCII)):
        raise DataError(f"{file}: default_config_name {str(config)[:100]!r}; must be a name")
    return config or ""


def open_prepared(place: Path) -> Any:
    """TFDS's builder of a folder, once it is known to run no code of others.

    Raises:
      DataError: as :func:`check_prepared`, or TFDS cannot read it.
    """
    import tensorflow_datasets as tfds

    check_prepared(place)
    try:
        return tfds.builder_from_directory(place)
    except Exception as error:  # metadata that say something else than what is there
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{place}: TFDS cannot open it ({reason})") from None


def check_prepared(place: Path) -> None:
    """Lets pass a folder in which every feature is of a class of TFDS's own.

    Raises:
      DataError: ``features.json`` cannot be read, or names another class or file.
    """
    file = place / "features.json"
    allowed = _own_classes()
    for name in _class_names(_read_json(file), file):
        if name not in allowed:
            raise DataError(
                f"{file}: the feature class {name[:100]!r} is refused: only those in tfds.features "
                "are read, because reading another one would run its code"
            )
    for shard in sorted(place.glob("*.array_record*"))[:1]:
        check_lfs_pointer(shard)


def _own_classes() -> frozenset[str]:
    """The names under which TFDS finds its own feature classes without importing anything."""
    import tensorflow_datasets as tfds

    pending, names = [tfds.features.FeatureConnector], set()
    while pending:
        feature = pending.pop()
        pending += feature.__subclasses__()
        if feature.__module__.startswith("tensorflow_datasets.core.features."):
            names.add(f"{feature.__module__}.{feature.__name__}")
            names.update(feature.__dict__.get("ALIASES", ()))
    return frozenset(names)


def _class_names(content: Any, file: Path) -> Iterator[str]:
    """All names of classes in a feature's description, old and new forms, at any depth.

    A description may hold another one as a string of JSON, so strings are looked into, too.
    """
    pending = [content]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if "names_file" in node:
                raise DataError(f"{file}: 'names_file' is refused: it leads to another file")
            for key, value in node.items():
                if key in _CLASS_KEYS and isinstance(value, str):
                    yield value
                else:
                    pending.append(value)
        elif isinstance(node, list):
            pending += node
        elif isinstance(node, str) and node.lstrip()[:1] in ("{", "["):
            try:
                pending.append(json.loads(node))
            except ValueError:  # ordinary text; TFDS could not read it as JSON either
                continue
            except RecursionError:
                raise DataError(f"{file}: nested too deeply") from None


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a file of a reasonable size."""
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            raise DataError(f"{file}: must be a file of at most {_MOST_BYTES >> 20} MiB")
        check_lfs_pointer(file)
        content = json.loads(file.read_text(encoding="utf-8"))  # as TFDS does
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({said(error)})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not JSON ({str(error)[:100]!r})") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold a JSON object")
    return content
