"""The configuration of a run: each field with its default, its range and its meaning, once.

A section is a frozen dataclass; `config.model` is `models.spec.ModelSpec`, and the fields of
`config.data` are those of the data set that it names (`data/options.py`). `default_config` makes a
`ConfigDict` of them, `check_config` reads one, and the help of `train.py` and docs/config.md are
made from them: `python -m rollingq_jax.train.config > docs/config.md`.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict, config_dict

from rollingq_jax.analysis.tasks import LOSSES, MAIN, METRICS
from rollingq_jax.baselines.build import BUILDERS
from rollingq_jax.convert.files import ADDRESS, ADDRESS_FORM
from rollingq_jax.data.options import COMMON_FIELDS, FIELDS, check_fields, fields_of
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.spec import (
    DYNAMIC_FUSIONS,
    ENCODER_FIELDS,
    FLAG,
    INT32_MAX,
    MODEL_FIELDS,
    Field,
    ModelSpec,
    Rule,
    as_mapping,
    at_least,
    integer,
    is_real,
    one_of,
    optional,
    read_fields,
    real,
    section_fields,
)
from rollingq_jax.train.output import in_columns

# These may differ between a run and its continuation, since they do not change the result.
FREE_FIELDS = (
    "log_every",
    "micro_batches",
    "parallel",
    "mesh.",
    "nonfinite",
    "plain_twin",
    "compare",
    "checkpoint.",
    "data.cache_dir",
    "data.path",
    "data.prefetch",
    "data.tokenizer",  # its content changes the data, which are compared
)
BALANCED = ("balanced",)
MAIN_METRIC = "main"
OPTIMIZERS = ("sgd", "adam", "adamw", "lion", "lamb")


def _tuple_of(item: Callable[[Any], bool], words: str) -> Rule:
    """A tuple or a list, which may be empty; `item` is the test of an entry."""
    return Rule(words, lambda v: isinstance(v, tuple | list) and all(map(item, v)), tuple)


Flag = Annotated[bool, FLAG]
Positive = Annotated[float, real("a number > 0", lambda v: v > 0)]
NotNegative = Annotated[float, at_least(0)]
Rate = Annotated[float, real("a number in [0, 1)", lambda v: 0 <= v < 1)]
Share = Annotated[float, real("a number in [0, 1]", lambda v: 0 <= v <= 1)]
Factor = Annotated[float, real("a number in (0, 1]", lambda v: 0 < v <= 1)]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The run."""

    seed: Annotated[int, integer(0, 2**32 - 1), "of parameters, order, dropout and splits"] = 0
    epochs: Annotated[int, integer(1), "passes over the training data"] = 30
    batch_size: Annotated[int, integer(1), "examples of a step, over all devices"] = 64
    micro_batches: Annotated[
        int, integer(1), "parts of a batch that a device takes in turn: less memory, same step"
    ] = 1
    log_every: Annotated[int, integer(1), "steps between rows of metrics.jsonl"] = 10
    parallel: Annotated[str, one_of(("jit", "pmap")), "how steps are laid over the devices"] = "jit"
    vit_weights: Annotated[
        str,
        Rule(
            ADDRESS_FORM,
            lambda v: isinstance(v, str) and ("://" not in v or bool(ADDRESS.fullmatch(v))),
            str,
        ),
        "file from which the encoders start: an ImageNet-21k ViT-B/16, or torchvision's ResNet-18 "
        "for those of kind resnet18",
    ] = ""
    best_by: Annotated[
        str,
        one_of((MAIN_METRIC, *METRICS)),
        "what chooses the best checkpoint, on validation data; main: accuracy, map or mae, by the "
        "data's task",
    ] = MAIN_METRIC
    patience: Annotated[
        int, integer(0), "epochs without a better one after which training ends; 0: it does not"
    ] = 0
    class_weights: Annotated[
        tuple[Any, ...],
        Rule(
            "numbers > 0, one a class; balanced; or ()",
            lambda v: (
                isinstance(v, tuple | list)
                and (tuple(v) == BALANCED or all(is_real(w) and w > 0 for w in v))
            ),
            tuple,
        ),
        "of an example in the training loss, by its label; ('balanced',): 1 / frequency",
    ] = ()
    label_smoothing: Annotated[Rate, "part of a label spread evenly over all classes"] = 0.0
    # As the works on CMU-MOSEI train (MulT, MultiBench).
    regression_loss: Annotated[
        str, one_of(tuple(LOSSES)), "of a regression: |z - t| or (z - t)^2, t standardized"
    ] = "l1"
    plain_twin: Annotated[Flag, "also train without rotations, in plain/, to compare with"] = False
    nonfinite: Annotated[
        str, one_of(("stop", "skip")), "at a NaN or infinite loss or gradient; skip: no update"
    ] = "stop"


def _is_rule(value: Any) -> bool:
    """A regular expression, and None or "fsdp" for each axis of the arrays that it names."""
    if not (isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)):
        return False
    axes = value[1]
    if not isinstance(axes, list | tuple) or any(axis not in (None, "fsdp") for axis in axes):
        return False
    try:
        re.compile(value[0])
    except re.error:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work; with fsdp > 1 they share parameters and optimizer state too."""

    data: Annotated[
        int, integer(0), "devices along which the batch alone is divided; 0: all that fsdp leaves"
    ] = 0
    fsdp: Annotated[
        int, integer(1), "devices that divide the batch and the state; 1: each has the state whole"
    ] = 1
    min_size: Annotated[int, integer(0), "arrays of fewer elements stay whole"] = 2**14
    rules: Annotated[
        tuple[Any, ...],
        _tuple_of(
            _is_rule,
            "pairs of a regular expression and a tuple of None or 'fsdp', one an axis, as in "
            "(('kernel', (None, 'fsdp')),)",
        ),
        "which axis of which array is divided; without a rule the largest that can be",
    ] = ()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer. Learning rate and decay are those of the paper's runs (upstream `main.py`)."""

    name: Annotated[str, one_of(OPTIMIZERS), "the optimizer"] = "sgd"
    learning_rate: Annotated[Positive, "the highest; linear warm-up, then one cosine to 0"] = 1e-3
    momentum: Annotated[Rate, "of sgd"] = 0.9
    weight_decay: Annotated[
        NotNegative, "sgd: added to the gradient; adamw, lion, lamb: decoupled; adam: none, so 0"
    ] = 1e-4
    weight_decay_on: Annotated[
        str,
        one_of(("all", "kernels")),
        "parameters that decay: all, as upstream, or no bias, norm, token or embedding",
    ] = "all"
    layer_decay: Annotated[
        Factor, "of the learning rate from an encoder's block to the one below; 1: none"
    ] = 1.0
    warmup_epochs: Annotated[NotNegative, "epochs of warm-up, fewer than epochs"] = 2.5
    ema_decay: Annotated[
        Rate, "of the average of the parameters that is evaluated and kept for use; 0: none"
    ] = 0.0
    clip_norm: Annotated[NotNegative, "limit of the global gradient's norm; 0: none"] = 0.0


@dataclasses.dataclass(frozen=True)
class RollingConfig:
    """The method: when heads roll, and where to."""

    enabled: Annotated[Flag, "whether queries are rotated"] = True
    beta: Annotated[NotNegative, "a head rolls when its imbalance exceeds this"] = 0.0
    # 0 is upstream's default; the paper's own settings for its data sets are not known.
    rho: Annotated[NotNegative, "sharpness of the rebalance weights; 0: equal weights"] = 0.0
    max_rotations: Annotated[
        int | None, optional(integer(0), "for no limit"), "the most a head rolls; 0: never"
    ] = 1
    check_every: Annotated[int, integer(0), "steps between checks; 0: at each epoch's end"] = 0
    window: Annotated[Factor, "last part of that period, in which sums are taken"] = 0.25
    method: Annotated[
        str, one_of(("geodesic", "svd")), "how the rotation is made from two vectors"
    ] = "geodesic"
    joint: Annotated[Flag, "all heads decide together"] = False


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """A method that the paper compares with, on top of any fusion that it fits."""

    name: Annotated[
        str,
        Rule(
            "an empty string or one of " + ", ".join(filter(None, BUILDERS)),
            lambda v: isinstance(v, str) and v in BUILDERS,
            str,
        ),
        "the method; empty: none",
    ] = ""
    epochs: Annotated[
        int, integer(0), "the first, in which a method with such a phase acts; 0: all"
    ] = 0
    ogm_alpha: Annotated[NotNegative, "how strongly OGM damps the gradient"] = 0.8
    pmr_alpha: Annotated[NotNegative, "weight of PMR's loss"] = 1.0
    pmr_momentum: Annotated[Rate, "of PMR's prototypes from epoch to epoch"] = 0.2
    drop_rate: Annotated[Rate, "of modality_dropout"] = 0.2
    joint_weight: Annotated[NotNegative, "weight of each modality's own loss in joint"] = 1.0
    mmpareto_gamma: Annotated[NotNegative, "factor of MMPareto on the encoders' gradients"] = 1.5
    agm_alpha: Annotated[NotNegative, "how strongly AGM scales the gradients of the parts"] = 1.0
    gblend_weights: Annotated[
        tuple[float, ...],
        _tuple_of(
            lambda v: is_real(v) and v >= 0,
            "numbers >= 0, one a modality and the joint loss's last, or () for equal ones",
        ),
        "weights of the losses in G-Blending",
    ] = ()
    gblend_every: Annotated[
        int, integer(0), "epochs after which G-Blending measures its weights anew; 0: never"
    ] = 0
    dgl_weight: Annotated[NotNegative, "weight of each modality's own loss in DGL"] = 4.0
    start_epoch: Annotated[int, integer(0), "the first in which ARL or OPM acts"] = 0
    arl_gamma: Annotated[NotNegative, "weight of each modality's own loss in ARL"] = 4.0
    arl_temperature: Annotated[NotNegative, "sharpness of ARL's factors"] = 8.0
    opm_base: Annotated[Share, "rate at which OPM drops a modality that is just ahead"] = 0.5
    opm_strength: Annotated[NotNegative, "how much that grows with its lead"] = 0.5
    opm_chance: Annotated[Share, "that OPM changes a batch"] = 0.7
    inforeg_beta: Annotated[NotNegative, "how strongly InfoReg holds an encoder"] = 0.95
    cggm_rho: Annotated[NotNegative, "factor of CGGM on all encoders' gradients"] = 1.3
    cggm_decay: Annotated[Rate, "of the mean of the accuracies in CGGM"] = 0.9
    qmf_weight: Annotated[NotNegative, "weight of QMF's ranking loss"] = 0.1
    umt_weight: Annotated[NotNegative, "weight of UMT's distance to the teachers"] = 10.0


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """The search of `rollingq_jax.compare`."""

    tune_seeds: Annotated[int, integer(1, 1_000_000), "seeds on which the grid is tried"] = 2
    grid: Annotated[
        Mapping[str, Any],
        Rule("a mapping of fields to tuples of values", lambda v: hasattr(v, "keys"), lambda v: v),
        "settings to try, as {'optimizer': {'learning_rate': (0.01, 0.02)}}; empty: no search",
    ] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every_epochs: Annotated[int, integer(1), "epochs between them"] = 1
    every_steps: Annotated[int, integer(0), "also within an epoch; 0: not by steps"] = 0
    every_minutes: Annotated[NotNegative, "likewise, by the clock"] = 0.0
    keep: Annotated[int, integer(1), "how many of the newest stay, as well as the best"] = 2


@dataclasses.dataclass(frozen=True)
class UpstreamCompat:
    """Choices of the authors' code that this project does not share; see docs/upstream.md."""

    last_batch_air: Annotated[Flag, "scores come from the last batch only"] = False
    statistics_pass: Annotated[Flag, "means come from an extra pass between epochs"] = False
    extra_schedule_step: Annotated[Flag, "the schedule steps once more an epoch"] = False
    unclipped_cosine: Annotated[Flag, "the cosine goes on beyond the last step"] = False


DATA = {"prefetch": Field(integer(0, 1024), "batches made ahead", 2)}  # read here, not by a loader
SECTIONS = {
    "": RunConfig,
    "mesh": MeshConfig,
    "optimizer": OptimizerConfig,
    "rolling": RollingConfig,
    "baseline": BaselineConfig,
    "compare": CompareConfig,
    "checkpoint": CheckpointConfig,
    "upstream_compat": UpstreamCompat,
    "model": ModelSpec,
}
# A run fills in what is empty here, from the data.
OPEN_MODEL_FIELDS: dict[str, Any] = {"num_classes": 0, "encoders": {}}
PRESETS = ("upstream",)


def default_config() -> ConfigDict:
    """Every field with its default; a file in `configs/` changes what its experiment needs.

    Examples:
      >>> config = default_config()
      >>> config.rolling.beta = 0.2
      >>> config.optimizer.name, config.parallel
      ('sgd', 'jit')
    """
    sections = {
        name: {field: one.default for field, one in section_fields(section).items()}
        for name, section in SECTIONS.items()
    }
    top = sections.pop("")
    # A reference holds a value or None, from the command line too (`=None`); a rule checks.
    limit = sections["rolling"]["max_rotations"]
    sections["rolling"]["max_rotations"] = config_dict.FieldReference(limit, field_type=object)
    sections["model"] |= {"modality": config_dict.placeholder(str), **OPEN_MODEL_FIELDS}
    sections["data"] = {name: one.default for name, one in COMMON_FIELDS.items()}
    return ConfigDict(top | sections)


def with_preset(config: ConfigDict, preset: str) -> ConfigDict:
    """A copy of the configuration with the fields of a preset set; other fields stay.

    "upstream" is the method, the schedule and the data as the authors' code has them, see
    docs/upstream.md: equal weights, the SVD, a check at each epoch's end, all of
    `upstream_compat`, the whole training split, and a crop for each frame where there are frames.
    Settings are not searched, since nothing is left to choose them by.

    Raises:
      ConfigError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"--preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    changed = copy.deepcopy(config)
    changed.rolling.update(rho=0.0, method="svd", check_every=0)
    changed.upstream_compat.update(dict.fromkeys(changed.upstream_compat, True))
    changed.data.validation = False
    if "crop_per" in fields_of(changed.data.name):
        with changed.data.unlocked():
            changed.data.crop_per = "frame"
    changed.compare.grid = ConfigDict()
    return changed


def with_typed_data_fields(config: ConfigDict, arguments: Iterable[str]) -> ConfigDict:
    """A copy that has, with their defaults, the fields of its data set that are typed.

    A configuration need not list the fields of the data set that `data.name` on the command line
    makes of it, and those that only its own data set has go with that.

    Args:
      config: a whole configuration.
      arguments: of the command line, as `--config.data.image_size=32`.
    """
    typed = dict(
        argument.lstrip("-").removeprefix("config.data.").partition("=")[::2]
        for argument in arguments
        if argument.lstrip("-").startswith("config.data.")
    )
    changed = copy.deepcopy(config)
    before = str(changed.data.get("name", ""))
    known = fields_of(str(typed.get("name") or before))
    with changed.data.unlocked():
        for name in (changed.data.keys() & fields_of(before).keys()) - known.keys() - typed.keys():
            del changed.data[name]
        for name in typed.keys() & known.keys() - changed.data.keys():
            changed.data[name] = as_typed(known[name].default)
    return changed


def as_typed(default: Any) -> Any:
    """A field's default in the form of which a flag can be made: a mapping is a string there."""
    return "" if isinstance(default, Mapping) else default


def check_config(config: Any) -> None:
    """Checks every section, so that nothing is read or written for a configuration that is wrong.

    Sizes that depend on the data are checked when the model is made.

    Raises:
      ConfigError: a field is unknown or missing, or its value is not allowed; says which.
    """
    fields = as_mapping(config, "config")
    names = [name for name in SECTIONS if name] + ["data"]
    top = {name: value for name, value in fields.items() if name not in names}
    _check_section(top, section_fields(RunConfig), "config")
    for name in names:
        if name not in fields:
            raise ConfigError(f"config.{name} is missing; allowed: a mapping of fields")
        section = as_mapping(fields[name], f"config.{name}")
        if name == "data":
            _check_section({n: v for n, v in section.items() if n in DATA}, DATA, "config.data")
            check_fields(section)
        elif name == "model":
            _check_model(section)
        else:
            _check_section(section, section_fields(SECTIONS[name]), f"config.{name}")
    # The sections are checked by now, so that the rules between fields can just read them.
    optimizer, epochs = fields["optimizer"], fields["epochs"]
    if optimizer["name"] == "adam" and optimizer["weight_decay"]:
        raise ConfigError(
            f"config.optimizer.weight_decay is {optimizer['weight_decay']:g}; allowed with "
            "optimizer.name adam, which has none: 0; optimizer.name adamw decays"
        )
    fusion = as_mapping(fields["model"], "config.model").get("fusion")
    if fusion in DYNAMIC_FUSIONS and fields["rolling"]["enabled"]:
        raise ConfigError(
            f"config.rolling.enabled is True; allowed with model.fusion {fusion!r}, whose weights "
            "come from the modalities' answers and not from a query: False"
        )
    warmup = optimizer["warmup_epochs"]
    fsdp = as_mapping(fields["mesh"], "config.mesh")["fsdp"]
    if fields["parallel"] == "pmap" and fsdp > 1:
        raise ConfigError(
            f"config.parallel is 'pmap' and config.mesh.fsdp is {fsdp}; "
            "allowed: 'jit', or with 'pmap' a config.mesh.fsdp of 1"
        )
    if warmup >= epochs:
        raise ConfigError(
            f"config.optimizer.warmup_epochs is {warmup}; "
            f"allowed: less than epochs, which is {epochs}"
        )


def _check_section(values: Mapping[str, Any], known: Mapping[str, Field], where: str) -> None:
    """All fields have to be there, and no others."""
    read_fields(values, known, where)
    for name, field in known.items():
        if name not in values:
            raise ConfigError(f"{where}.{name} is missing; allowed: {field.allowed}")


def _check_model(section: Mapping[str, Any]) -> None:
    """The fields that are given; what is left out follows from the data."""
    open_fields = {"num_classes": 0, "encoders": None}
    given = {n: v for n, v in section.items() if n not in open_fields or v != open_fields[n]}
    read_fields(given, MODEL_FIELDS, "model")
    for name, encoder in as_mapping(section.get("encoders") or {}, "model.encoders").items():
        where = f"model.encoders.{name}"
        fields = {n: v for n, v in as_mapping(encoder, where).items() if v is not None}
        read_fields(fields, ENCODER_FIELDS, where)


def from_json(content: Mapping[str, Any]) -> ConfigDict:
    """A configuration from JSON: lists become tuples, as configurations have them.

    A field that is missing, as in the file of an older version, gets its default.

    Raises:
      ConfigError: a name cannot be a field's.
    """

    def fields(section: Mapping[str, Any]) -> dict[str, Any]:
        return {n: fields(v) if isinstance(v, Mapping) else _tuples(v) for n, v in section.items()}

    try:
        references = default_config().to_dict(preserve_field_references=True)
        return ConfigDict(with_defaults(upgraded(fields(content)), references))
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config is not a mapping of fields ({reason})") from None


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration, with the weight decay that older versions kept with Adam and never
    applied as 0: their files lack `optimizer.weight_decay_on`."""
    optimizer = stored.get("optimizer")
    if isinstance(optimizer, Mapping) and "weight_decay_on" not in optimizer:
        if optimizer.get("name") == "adam":
            return {**stored, "optimizer": {**optimizer, "weight_decay": 0.0}}
    return dict(stored)


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the fields that only `defaults` has, in every section that both have.

    A default that is a reference takes the given value where its type allows it, so that a field
    that may be None can still be set on the command line.
    """
    filled = {**defaults, **given}
    for name, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(filled[name], Mapping):
            filled[name] = with_defaults(filled[name], value)
        elif isinstance(value, config_dict.FieldReference) and filled[name] is not value:
            with contextlib.suppress(TypeError):  # of another type: a rule tells it
                value.set(filled[name])
                filled[name] = value
    return filled


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}} -> {"a.b": 1}`, with lists as tuples so that JSON compares equal."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _tuples(value)
    return flat


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def differing_fields(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs: `{field: (ours, theirs)}`.

    A field of the data set that one of them lacks has its default there, and the name of a task's
    main metric is as good as "main".
    """
    first, second = (_normalized(flatten(config)) for config in (ours, theirs))
    return {
        name: (first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and not name.startswith(FREE_FIELDS)
    }


def _normalized(flat: dict[str, Any]) -> dict[str, Any]:
    fields = fields_of(str(flat.get("data.name", "")))
    flat = {f"data.{name}": as_typed(field.default) for name, field in fields.items()} | flat
    return flat | ({"best_by": MAIN_METRIC} if flat.get("best_by") in MAIN.values() else {})


def allowed_in(field: str, config: Any) -> str:
    """The values that a field may hold, in words: by its rule, or by the type of its value."""
    section, _, name = field.rpartition(".")
    known: Mapping[str, Any] = {}
    if section in SECTIONS:
        known = section_fields(SECTIONS[section])
    elif section == "data":
        known = fields_of(config.data.get("name", ""))
    elif section.startswith("model.encoders."):
        known = ENCODER_FIELDS
    if name in known:
        return known[name].allowed
    value = config
    for part in field.split("."):
        value = value[part] if hasattr(value, "keys") and part in value else None
    return "a mapping of fields" if hasattr(value, "keys") else f"a {type(value).__name__}"


def described_sections() -> Iterator[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Name, subject and rows (field, default, allowed, meaning) of every section."""
    for name, section in SECTIONS.items():
        subject = " ".join((section.__doc__ or "").split("\n\n")[0].split())
        if section is ModelSpec:
            subject = "The model; fields that are left out follow from the data."
        yield name, subject, _described(section_fields(section))
    subject = "One modality's encoder; empty: as the data say."
    yield "model.encoders.<modality>", subject, _described(ENCODER_FIELDS)
    yield "data", "The data, of any data set.", _described(COMMON_FIELDS)
    for name, known in FIELDS.items():
        yield f"data, of {name}", "The fields of this data set.", _described(known)


def _described(known: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, field in known.items():
        default = OPEN_MODEL_FIELDS.get(name, field.default)
        default = dict(default) if isinstance(default, Mapping) else default
        shown = "" if default is dataclasses.MISSING else repr(default)
        rows.append((name, shown, field.allowed, field.meaning))
    return rows


def field_names() -> list[str]:
    """Every field as it is typed; those of the data, which come with the data set, are left out."""
    sections = {name: list(section_fields(section)) for name, section in SECTIONS.items()}
    sections["data"] = list(COMMON_FIELDS)
    return [
        "--" + ".".join(filter(None, ("config", section, name))) + "="
        for section, names in sections.items()
        for name in names
    ]


def fields_help() -> str:
    """Fields, defaults and meanings in columns that fit a terminal."""
    lines = ["fields of the configuration, their defaults and meanings:"]
    for section, _, rows in described_sections():
        prefix = f"config.{section}" if section else "config"
        lines += ["", f"  {prefix}"]
        for name, default, _, meaning in rows:
            lines.append(in_columns(f"    {name}".ljust(24) + default, meaning, 38))
    return "\n".join(lines)


def config_page() -> str:
    """docs/config.md."""
    parts = [
        "# Configuration\n\n"
        "Every field of a configuration. Set it in a file of `configs/`, or on the command line\n"
        "as `--config.SECTION.FIELD=VALUE`; `python train.py --help` prints the same. This page\n"
        "is made by `python -m rollingq_jax.train.config > docs/config.md`. Integers are at most\n"
        "2,147,483,647 where no other limit is given.\n"
    ]
    for section, subject, rows in described_sections():
        title = f"config.{section}" if section else "config"
        table = ["| field | default | allowed | meaning |", "| --- | --- | --- | --- |"]
        for name, default, allowed, meaning in rows:
            shown = f"`{default}`" if default else ""
            cells = (
                f"`{name}`",
                shown,
                allowed.replace(f" and at most {INT32_MAX:,}", ""),
                meaning,
            )
            table.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append(f"## {title}\n\n{subject}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(config_page(), end="")
