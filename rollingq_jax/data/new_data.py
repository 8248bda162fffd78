"""New data for a trained model: opened with the model's own preprocessing, labels or not.

Whatever can be trained on can be read: an `.npz` file, a folder of `.npy` files, a manifest of
media files, a prepared TFDS data set, and the prepared data of the built-in sets. Nothing is
measured: statistics, sizes and class names are the model's.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rollingq_jax.data.dataset import (
    SINGLE_LABEL,
    SPLITS,
    ArraySource,
    Changed,
    Dataset,
    Example,
    ModalityInfo,
    Source,
    as_text,
    ids_of,
    is_class_number,
    label_array,
    label_text,
    labels_of,
)
from rollingq_jax.data.load import LOADERS, load_dataset
from rollingq_jax.data.options import array_path, fields_of, local_path, mapping_option
from rollingq_jax.data.preprocessing import (
    InputSpec,
    Preprocessed,
    Preprocessing,
    apply_all,
    complete,
)
from rollingq_jax.data.sources.arrays import (
    RawArraySource,
    check_memory,
    open_arrays,
    unpacked,
)
from rollingq_jax.data.sources.media_folder import is_manifest
from rollingq_jax.errors import ConfigError, DataError


class NewData(NamedTuple):
    """Examples for a trained model.

    Attributes:
      source: raw arrays by modality, `"<m>_mask"` where examples may lack m or some of its
        positions, `"quality_<m>"` where it is known; no labels.
      ids: one for each example.
      labels: the name of each example's class, or its number as text where the classes have no
        names; of other tasks as `label_text` writes it; "" where it is not given.
      standardized: whether the arrays are the model's input already, and not raw.
    """

    source: Source
    ids: Sequence[str]
    labels: Sequence[str]
    standardized: bool = False


def open_new_data(
    path: str,
    config_data: Any,
    inputs: InputSpec,
    modalities: Sequence[str],
    *,
    split: str | None = None,
    seed: int = 0,
) -> NewData:
    """Opens data that a model was not trained on.

    Args:
      path: of the data, in a form that can be trained on; for TFDS and the built-in sets the data
        directory.
      config_data: the run's `config.data`, for the name and the features of a TFDS data set and the
        columns of a manifest.
      inputs: the model's preprocessing and classes.
      modalities: those that the model reads; one that the new data lack is missing throughout.
      split: which part, where the data have splits: by default the only one, else "test".
      seed: of the run, for built-in sets whose split is drawn.

    Raises:
      DataError: the data are missing, damaged or do not fit the model.
      ConfigError: there is no such split.
    """
    used = {m: inputs.modalities[m] for m in modalities}
    place = array_path(path, "path")
    if is_manifest(place):
        from rollingq_jax.data.sources.media_folder import open_manifest

        columns = mapping_option(config_data, "columns")
        source, ids, labels = open_manifest(
            local_path(path, "path"), used, split=split, columns=columns
        )
        return NewData(source, ids, label_texts(np.array(labels, str), inputs))
    name = config_data.name
    # On gs:// nothing is looked for: a folder there is one of arrays if the configuration says so.
    folders = (place, *(place / s for s in SPLITS)) if isinstance(place, Path) else ()
    arrays = place.suffix.lower() in (".npz", ".npy") or any(
        (folder / f"{m}.npy").is_file() for folder in folders for m in used
    )
    if arrays or name in ("arrays", "folder", "av_digits"):
        return _open_arrays(place, used, inputs, split)
    if name in LOADERS:
        return _open_prepared(path, config_data, inputs, split or "test", seed)
    from rollingq_jax.data.sources.tfds import open_tfds

    return NewData(*open_tfds(config_data, used, path=path, split=split))


def _open_arrays(
    path: Path | epath.Path,
    modalities: Mapping[str, Preprocessing],
    inputs: InputSpec,
    split: str | None,
) -> NewData:
    """Arrays under `<split>/<m>` as in training, or under `<m>` only.

    Beside a modality there may be `mask_<m>`, `quality_<m>`, `label` and `id`; other keys are not
    read.

    Raises:
      DataError: the file is damaged, holds none of the modalities, or lengths differ.
      ConfigError: there is no such split; None is for arrays without one, else the only one, else
        "test".
    """
    arrays = open_arrays(path)
    found = {s for s in SPLITS if any(key.startswith(f"{s}/") for key in arrays)}
    plain = {key: array for key, array in arrays.items() if "/" not in key}
    if split is None and found and not plain.keys() & modalities.keys():
        split = next(iter(found)) if len(found) == 1 else "test"
    if split is not None and split not in found:
        raise ConfigError(
            f"split is {split!r}; allowed: {', '.join(sorted(found)) or 'none'}, which {path} has"
        )
    where = "" if split is None else f"{split}/"
    given = {key.removeprefix(where): a for key, a in arrays.items() if key.startswith(where)}
    present = [m for m in modalities if m in given]
    if not present:
        raise DataError(
            f"{path} holds {', '.join(sorted(given)[:8]) or 'nothing'}; allowed: at least one of "
            f"{', '.join(f'{where}{m}' for m in modalities)}"
        )
    names = [*present, *(f"{kind}_{m}" for kind in ("mask", "quality") for m in present)]
    names = [name for name in (*names, "label", "id") if name in given]
    check_memory(given[name] for name in names)  # other keys are not unpacked
    values = {name: unpacked(given[name]) for name in names}
    if single := next((key for key, array in values.items() if array.ndim == 0), None):
        raise DataError(f"{where}{single}: a single number; allowed: an array [N, ...]")
    columns = {m: values[m] for m in present}
    for m in present:
        if f"mask_{m}" in values:
            mask = values[f"mask_{m}"]
            if mask.dtype.kind not in "biu" or not np.isin(mask, (0, 1)).all():
                raise DataError(
                    f"{where}mask_{m}: dtype {mask.dtype}; allowed: boolean, or integers 0 and 1"
                )
            columns[f"{m}_mask"] = mask.astype(bool)
        if f"quality_{m}" in values:
            columns[f"quality_{m}"] = np.asarray(values[f"quality_{m}"], np.float32)
    source = ArraySource(columns)
    # Refused before anything is predicted, not where labels are compared or ids are written.
    texts = {key: values[key] for key in ("label", "id") if key in values}
    for key, array in texts.items():
        whole = array.dtype.kind == "f" and bool((array == np.floor(array)).all())
        if key == "label" and inputs.task != SINGLE_LABEL:
            continue
        if array.shape != (len(source),) or not (array.dtype.kind in "biuSU" or whole):
            raise DataError(
                f"{where}{key}: {array.dtype}{list(array.shape)}; allowed: one integer or string "
                f"for each of the {len(source)} examples"
            )
    labels = label_texts(texts["label"], inputs) if "label" in texts else []
    if labels and len(labels) != len(source):
        raise DataError(f"{where}label: {len(labels)} labels for {len(source)} examples")
    ids = [as_text(value) for value in texts.get("id", range(len(source)))]
    return NewData(source, ids, labels or [""] * len(source))


def label_texts(values: np.ndarray, inputs: InputSpec) -> list[str]:
    """Labels as `NewData` has them, from arrays as in training, or texts with "" for none.

    Raises:
      DataError: they are not of the model's task.
    """
    given = None
    if values.dtype.kind in "SUT":
        given = [as_text(value).strip() for value in values.tolist()]
    if inputs.task == SINGLE_LABEL:
        return _class_texts(values.tolist() if given is None else given, inputs.classes)
    texts = [""] * len(values)
    known = np.arange(len(values))
    if given is not None:
        values = np.array(given, str)
        known = np.flatnonzero(values != "")
    if len(known):
        read = label_array(values[known], inputs.task, inputs.classes, "label")
        for place, label in zip(known.tolist(), read, strict=True):
            texts[place] = label_text(label, inputs.task, inputs.classes)
    return texts


def _class_texts(values: Sequence[Any], classes: Sequence[str]) -> list[str]:
    """Class numbers or names as names; a number or a name that no class has stays as it is.

    Strings that all are numbers are class numbers, unless they are names, as in training.
    """
    given = {value for value in values if isinstance(value, str) and value}
    if not all(map(is_class_number, given)) or (given and given <= set(classes)):
        return list(values)

    def name(value: Any) -> str:
        if value == "":
            return ""
        number = int(value)
        return classes[number] if 0 <= number < len(classes) else str(number)

    return [name(value) for value in values]


def _open_prepared(
    path: str, config_data: Any, inputs: InputSpec, split: str, seed: int
) -> NewData:
    """The prepared data of a built-in set, elsewhere; what its examples pass through is applied.

    What that folder's own training split would have measured or named gives way to the model's:
    lengths of sounds and texts, means and deviations, and the numbers of the classes.
    """
    moved = copy.deepcopy(config_data)
    media = [one.media for one in inputs.modalities.values() if one.media]
    sizes = {n: v for m in media for n, v in m.items() if n in fields_of(config_data.name)}
    with moved.unlocked():
        moved.update({**sizes, "path": path})
    dataset = load_dataset(moved, seed=seed)
    if split not in dataset.splits:
        raise ConfigError(f"split is {split!r}; allowed: {', '.join(dataset.splits)}")
    source = dataset.splits[split]
    if isinstance(source, Preprocessed | RawArraySource):
        models = {m: inputs.modalities.get(m, one) for m, one in source.modalities.items()}
        if isinstance(source, Preprocessed):
            source = Preprocessed(source.source, models)
        else:
            source = dataclasses.replace(source, modalities=models)
    values = labels_of(source)
    if dataset.class_names and dataset.task == SINGLE_LABEL:
        values = np.array(dataset.class_names, str)[values]
    ids = ids_of(source)
    names = [str(number) for number in range(len(source))] if ids is None else list(map(str, ids))

    def transformed(example: Example, _: int) -> Example:
        for transform in dataset.eval_transforms:
            example = transform.map(example)
        return example

    texts = label_texts(values, inputs)
    return NewData(Changed(source, transformed), names, texts, standardized=True)


def label_numbers(texts: Sequence[str], inputs: InputSpec) -> np.ndarray:
    """Labels of `NewData`, each of them given and known to the model, as in training."""
    if inputs.task != SINGLE_LABEL:
        return label_array(np.array(texts, str), inputs.task, inputs.classes, "label")
    numbers = {name: number for number, name in enumerate(inputs.classes)}
    return np.array([numbers[text] for text in texts], np.int32)


def as_dataset(
    data: NewData,
    inputs: InputSpec,
    modalities: Sequence[str],
    split: str,
    encoders: Mapping[str, Any] | None = None,
) -> Dataset:
    """New data with labels as the one split of a data set, to be evaluated on.

    Args:
      data: from `open_new_data`.
      inputs: the model's preprocessing and classes.
      modalities: those that the model reads.
      split: the name that the data get.
      encoders: `config.model.encoders`: pixels that the model does not normalize by the training
        data's own statistics have no known unit of noise.

    Raises:
      DataError: an example has no label, or one of no class of the model.
    """
    classes = set(inputs.classes)
    for place, label in enumerate(data.labels):
        if not label or (inputs.task == SINGLE_LABEL and label not in classes):
            shown = repr(label) if label else "missing"
            raise DataError(
                f"label of example {data.ids[place]!r} is {shown}; allowed: "
                f"{', '.join(inputs.classes[:20])}"
            )
    labels = label_numbers(data.labels, inputs)
    used = {m: inputs.modalities[m] for m in modalities}

    def change(example: Example, index: int) -> Example:
        batch = {name: np.asarray(value)[None] for name, value in example.items()}
        # What does not fit the model is refused, as where it predicts.
        found = complete(batch, used, data.standardized)
        # Masks that some data have and others lack are added: the model's shapes follow from them.
        masks = {f"{m}_mask": np.asarray(True) for m in used}
        example = masks | example | {name: value[0] for name, value in found.items()}
        if not data.standardized:
            example = apply_all(used, example)
        return {**example, "label": labels[index]}

    return Dataset(
        {split: Changed(data.source, change, labels, list(data.ids))},
        {m: _with_unit(one.info, (encoders or {}).get(m)) for m, one in used.items()},
        inputs.num_classes,
        inputs.class_names,
        "new data",
        task=inputs.task,
    )


def _with_unit(info: ModalityInfo, encoder: Any) -> ModalityInfo:
    """Pixels normalized by the training data's mean and deviation have a deviation of 1 there."""
    given = encoder or {}
    own = all(given.get(field) in (None, getattr(info, field)) for field in ("mean", "std"))
    return dataclasses.replace(info, unit=1.0) if info.std and own else info
