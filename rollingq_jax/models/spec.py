"""Schemas of configurations: sections as frozen dataclasses, and those of a model.

Each field of a section stands in one place: `name: Annotated[type, Rule, "its meaning"] = default`.
`section_fields` reads that, `read_fields` checks a mapping against it.
"""

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, NoReturn

import jax.numpy as jnp

from rollingq_jax.errors import ConfigError, did_you_mean

INT32_MAX = 2**31 - 1  # a step number and a count of rotations are int32
#: Kinds of modality, and the axes of one example of each.
KINDS = {
    "spectrogram": ("frequency", "time", "channel"),
    "image": ("row", "column", "channel"),
    "video": ("frame", "row", "column", "channel"),
    "sequence": ("position", "feature"),
    "tokens": ("position",),
    "vector": ("feature",),
}
#: The number of axes that a patch of each kind cuts (0: the kind has no patches).
PATCH_AXES = {kind: len(axes) - 1 if "channel" in axes else 0 for kind, axes in KINDS.items()}
#: A network of its own on images, spectrograms or video, instead of patches and Transformer blocks.
RESNET, RESNET_WIDTH = "resnet18", 512
CROSS_FUSIONS = ("mult", "mmml", "jmt")
#: Fusions of the modalities' own answers, weighed anew for each sample.
DYNAMIC_FUSIONS = ("entropy", "pdf", "qmf")
STATIC_FUSIONS = ("unimodal", "sum", "concat", "film", "gated", "mmcosine")
FUSIONS = (*STATIC_FUSIONS, *DYNAMIC_FUSIONS, "attention", "mbt", *CROSS_FUSIONS)
MBT_HEADS = ("attention", "concat", "sum")
POOLINGS = ("tokens", "class_tokens")
MOST_FUSION_LAYERS = 8
MAX_LAYERS, MAX_WIDTH = 1000, 2**20
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Rule(NamedTuple):
    """The values that a field may hold: in words, as a test, and how a value is kept."""

    allowed: str
    accepts: Callable[[Any], bool]
    keep: Callable[[Any], Any]


def is_integer(value: Any) -> bool:
    """Python's or NumPy's integer; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Python's or NumPy's finite integer or float; True and False are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that float64 does not hold
        return False


def integer(low: int, high: int = INT32_MAX, words: str = "") -> Rule:
    """An integer of at least `low` and at most `high`; `words` where others say it better."""
    words = words or f"an integer >= {low} and at most {high:,}"
    return Rule(words, lambda v: is_integer(v) and low <= v <= high, int)


def real(words: str, accepts: Callable[[float], bool]) -> Rule:
    """A number for which `accepts` holds; `words` says which."""
    return Rule(words, lambda v: is_real(v) and accepts(v), float)


def one_of(names: Iterable[str]) -> Rule:
    """One of the names."""
    names = tuple(names)
    return Rule(", ".join(names), lambda v: isinstance(v, str) and v in names, str)


def several(item: Callable[[Any], bool], keep: type, words: str) -> Rule:
    """A non-empty tuple or list, or nothing."""

    def accepts(value: Any) -> bool:
        return isinstance(value, tuple | list) and len(value) > 0 and all(map(item, value))

    return or_none(Rule(words, accepts, lambda v: tuple(map(keep, v))))


def at_least(low: float) -> Rule:
    """A number of at least `low`."""
    return real(f"a number >= {low:g}", lambda v: v >= low)


def or_none(rule: Rule) -> Rule:
    """Also None, which its words leave out."""
    return rule._replace(
        accepts=lambda v: v is None or rule.accepts(v),
        keep=lambda v: None if v is None else rule.keep(v),
    )


def optional(rule: Rule, meaning: str) -> Rule:
    """Also None; `meaning` says in words what that does."""
    return or_none(rule)._replace(allowed=f"{rule.allowed}, or None {meaning}")


RATE = real("a number in [0, 1)", lambda v: 0 <= v < 1)
FLAG = Rule("True or False", lambda v: isinstance(v, bool), bool)
TEXT = Rule("a string", lambda v: isinstance(v, str), str)


class Field(NamedTuple):
    """One field of a section.

    Attributes:
      rule: the values that it may hold.
      meaning: in a few words.
      default: `dataclasses.MISSING` where there is none.
    """

    rule: Rule
    meaning: str
    default: Any

    @property
    def allowed(self) -> str:
        """The values that it may hold, in words."""
        return self.rule.allowed


def section_fields(section: type) -> dict[str, Field]:
    """The fields of a section, as its dataclass declares them.

    Examples:
      >>> section_fields(ModelSpec)["depth"].meaning
      'default number of Transformer blocks of an encoder'
    """
    hints = typing.get_type_hints(section, include_extras=True)
    found = {}
    for field in dataclasses.fields(section):
        declared = typing.get_args(hints[field.name])[1:]
        if declared:  # others are no fields of a configuration
            rule, meaning = declared[-2:]
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            found[field.name] = Field(rule, meaning, default)
    return found


def read_fields(
    fields: Mapping[str, Any], known: Mapping[str, Field], where: str
) -> dict[str, Any]:
    """The values as their rules keep them.

    Args:
      fields: values by name.
      known: the fields that there are.
      where: the section, for the message.

    Raises:
      ConfigError: a field is unknown, or its value is not allowed.
    """
    kept = {}
    for name, value in fields.items():
        if name not in known:
            meant = did_you_mean(str(name), known)
            allowed = ", ".join(sorted(known))
            raise ConfigError(f"{where}.{name} is not a field{meant}; allowed: {allowed}")
        rule = known[name].rule
        if not rule.accepts(value):
            raise ConfigError(f"{where}.{name} is {value!r}; allowed: {rule.allowed}")
        kept[name] = rule.keep(value)
    return kept


def as_mapping(config: Any, where: str) -> dict[str, Any]:
    """A dict of the fields of a mapping, an `ml_collections.ConfigDict` or a namespace.

    Raises:
      ConfigError: `config` is none of them.
    """
    if isinstance(config, Mapping) or (hasattr(config, "items") and hasattr(config, "keys")):
        return dict(config.items())
    if hasattr(config, "__dict__") and not isinstance(config, type):
        return dict(vars(config))
    raise ConfigError(f"{where} is {config!r}; allowed: a mapping of fields")


def resnet_grid(shape: Sequence[int]) -> tuple[int, ...]:
    """Positions of a ResNet-18's last feature map, of `[H, W, C]` or `[T, H, W, C]`.

    Examples:
      >>> resnet_grid((3, 224, 200, 3))
      (3, 7, 7)
    """
    return (*shape[:-3], *(math.ceil(size / 32) for size in shape[-3:-1]))


def token_grid(
    kind: str, shape: Sequence[int], patch: Sequence[int] | None = None
) -> tuple[int, ...]:
    """How many tokens an input gives along each axis, in the order they are numbered (row-major).

    Args:
      kind: "image", "spectrogram", "video", "sequence", "tokens", "vector" or "resnet18".
      shape: of one example: [H, W, C], [F, T, 1], [T, H, W, C], [L, D], [L] or [D].
      patch: (h, w), or (t, h, w) for video; of the other kinds each position is a token.

    Returns:
      (H // h, W // w); for a spectrogram (T // h, F // w), because the model swaps its axes before
      it cuts patches; (T // t, H // h, W // w); (L,); (1,) for a vector. A remainder is dropped.
      (H / 32, W / 32), rounded up, or (T, H / 32, W / 32) for a ResNet.

    Raises:
      ValueError: the kind is unknown, or the patch does not have as many sizes as it needs.
    """
    if kind == RESNET:
        return resnet_grid(shape)
    if kind not in PATCH_AXES:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(sorted(PATCH_AXES))}")
    axes = PATCH_AXES[kind]
    if not axes:
        return (1 if kind == "vector" else int(shape[0]),)
    if patch is None or len(patch) != axes:
        raise ValueError(f"patch is {patch}; allowed for kind {kind!r}: {axes} sizes")
    sizes = shape[1::-1] if kind == "spectrogram" else shape[:axes]
    return tuple(int(size) // int(step) for size, step in zip(sizes, patch, strict=True))


def _refuse(spec: Any, where: str, field: str, allowed: str) -> NoReturn:
    raise ConfigError(f"{where}.{field} is {getattr(spec, field)!r}; allowed{allowed}")


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """One modality's encoder, the fields of `config.model.encoders.<modality>`.

    Attributes:
      name: the modality, and its key in a batch.
      kind: one of `KINDS`, or `RESNET`, whose depth and width are fixed.
      patch: (row, column) of an image, or of a spectrogram once its axes are swapped to
        (time, frequency); (frame, row, column) of a video; None for the other kinds.
      mean, std: channel normalization of uint8 input, (x / 255 - mean) / std; None leaves x / 255.
    """

    name: str
    kind: Annotated[
        str,
        one_of((*KINDS, RESNET)),
        "kind of the modality; resnet18: that network, on an image, spectrogram or video",
    ]
    depth: Annotated[int, integer(0, MAX_LAYERS), "number of Transformer blocks"]
    width: Annotated[
        int, integer(1, MAX_WIDTH), "their width; a projection to the model's follows the last"
    ]
    num_heads: Annotated[int, integer(1), "attention heads of each block"]
    patch: Annotated[
        tuple[int, ...] | None,
        several(lambda v: is_integer(v) and v >= 1, int, "integers >= 1"),
        "sides of a patch: two of a spectrogram or image, three of a video",
    ] = None
    vocab_size: Annotated[
        int | None,
        or_none(integer(2)),
        "number of token ids; only for kind tokens",
    ] = None
    mean: Annotated[
        tuple[float, ...] | None,
        several(is_real, float, "numbers, one a channel or one for all"),
        "mean of each channel, for uint8 input",
    ] = None
    std: Annotated[
        tuple[float, ...] | None,
        several(lambda v: is_real(v) and v > 0, float, "numbers > 0, one a channel or one for all"),
        "standard deviation of each channel",
    ] = None

    @classmethod
    def from_config(
        cls, name: str, config: Any, *, depth: int, width: int, num_heads: int
    ) -> "EncoderSpec":
        """Reads `model.encoders.<name>`; `depth`, `width` and `num_heads` are its defaults.

        Raises:
          ConfigError: names the field, the value and what is allowed.
        """
        where = f"model.encoders.{name}"
        fields = read_fields(as_mapping(config, where), ENCODER_FIELDS, where)
        if "kind" not in fields:
            raise ConfigError(f"{where}.kind is missing; allowed: {ENCODER_FIELDS['kind'].allowed}")
        if fields["kind"] == RESNET:
            for field in ("depth", "width", "num_heads", "patch", "vocab_size"):
                if fields.get(field) is not None:
                    raise ConfigError(
                        f"{where}.{field} is {fields[field]!r}; allowed for kind {RESNET!r}: to "
                        "leave it out, since the network has its own"
                    )
            return cls(name, **fields | {"depth": 0, "width": RESNET_WIDTH, "num_heads": 1})
        spec = cls(name, **{"depth": depth, "width": width, "num_heads": num_heads, **fields})
        spec._check(where)
        return spec

    def _check(self, where: str) -> None:
        axes, of_kind = PATCH_AXES[self.kind], f" for kind {self.kind!r}"
        if len(self.patch or ()) != axes:
            allowed = f"{axes} integers >= 1" if axes else "None, since there are no patches to cut"
            _refuse(self, where, "patch", f"{of_kind}: {allowed}")
        if (self.vocab_size is not None) != (self.kind == "tokens"):
            allowed = "an integer >= 2" if self.kind == "tokens" else "None"
            _refuse(self, where, "vocab_size", f"{of_kind}: {allowed}")
        if self.kind == "tokens" and (self.mean or self.std):
            raise ConfigError(f"{where}.mean and std are set; allowed for kind 'tokens': None")
        if self.width % self.num_heads:
            divisor = f": a divisor of {where}.width, which is {self.width}"
            _refuse(self, where, "num_heads", divisor)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A whole model, the fields of `config.model`: C classes, width d, H heads of d_h = d / H.

    Attributes:
      num_classes: C, the number of outputs: classes, or as many as an example has labels or values.
      encoders: one `EncoderSpec` a modality, in alphabetical order.
      fusion_layers: the first n - 1 are Transformer blocks with `fusion_heads` heads, in which a
        class token attends to all modalities' tokens, as in the last. Of mult and mmml, the layers
        in which modalities attend to each other.
      attention_scale: at 0 every token has the same weight, whatever the sample.
      quality_bias: gamma of the quality bias, see `rollingq_jax.quality`.
      quality_signal: n there: the norm of the mean token, or the energy of the probe.
      quality_shuffled: each sample gets the quality bias of the one before it in the batch.
    """

    num_classes: Annotated[
        int,
        integer(
            1,
            MAX_WIDTH,
            f"an integer >= 1 and at most {MAX_WIDTH:,} (a run fills in a config's 0 when it has "
            "loaded the data)",
        ),
        "number of outputs: classes, labels or values; 0: as the data have",
    ]
    encoders: Annotated[
        tuple[EncoderSpec, ...],
        Rule("a mapping", lambda v: True, lambda v: as_mapping(v, "model.encoders")),
        "fields of each modality's encoder; empty: as the data say",
    ]
    fusion: Annotated[str, one_of(FUSIONS), "how the modalities are fused"] = "attention"
    modality: Annotated[
        str | None,
        Rule(
            "the name of an encoder", lambda v: v is None or isinstance(v, str), lambda v: v or None
        ),
        "the one that a unimodal model uses; None for the other fusions",
    ] = None
    dim: Annotated[
        int, integer(1, MAX_WIDTH), "width of the fused tokens, and by default of the encoders"
    ] = 64
    depth: Annotated[
        int, integer(0, MAX_LAYERS), "default number of Transformer blocks of an encoder"
    ] = 2
    num_heads: Annotated[
        int, integer(1), "default number of attention heads of an encoder's block"
    ] = 4
    fusion_heads: Annotated[int, integer(1), "heads of the class token's attention"] = 1
    fusion_layers: Annotated[
        int,
        integer(1, MOST_FUSION_LAYERS, f"an integer from 1 to {MOST_FUSION_LAYERS}"),
        "layers with a class token; 2 and more roll one layer after the other",
    ] = 1
    mlp_ratio: Annotated[
        float,
        real("a number > 0 and at most 1000", lambda v: 0 < v <= 1000),
        "hidden width of a block's MLP, in widths of the block",
    ] = 4.0
    dropout: Annotated[
        float, RATE, "of the fusion's attention weights and of its output projection"
    ] = 0.2
    encoder_dropout: Annotated[
        float, RATE, "of both branches of each block, those of the fusion too"
    ] = 0.0
    gelu: Annotated[str, one_of(("exact", "tanh")), "exact is erf's"] = "exact"
    dtype: Annotated[
        str, one_of(DTYPES), "of the encoders' computation; parameters are float32 in any case"
    ] = "float32"
    fusion_token_scale: Annotated[
        float, at_least(0), "standard deviation of the fusion class token's initial values"
    ] = 0.02
    attention_scale: Annotated[
        float,
        at_least(0),
        "factor on the logits of the class token's attention; 0: all tokens count alike",
    ] = 1.0
    quality_bias: Annotated[
        float, at_least(0), "attention to modalities whose signal is high for a sample; 0: none"
    ] = 0.0
    quality_signal: Annotated[
        str, one_of(("norm", "energy")), "norm of the mean token, or energy of the modality's probe"
    ] = "norm"
    quality_shuffled: Annotated[bool, FLAG, "its control: the bias of another sample"] = False
    fusion_pooling: Annotated[
        str,
        one_of(POOLINGS),
        "the class token attends to all tokens, or only to each modality's class token",
    ] = "tokens"
    fusion_residual: Annotated[
        bool, FLAG, "add the mean of the modalities' class tokens to the attention's output"
    ] = False
    fusion_norm: Annotated[bool, FLAG, "LayerNorm before the head of attention fusion"] = False
    cosine_scale: Annotated[
        float,
        real("a number > 0", lambda v: v > 0),
        "factor on the cosines that are the logits of fusion mmcosine",
    ] = 15.0
    mbt_layers: Annotated[int, integer(1, MAX_LAYERS), "layers of bottleneck fusion"] = 2
    mbt_tokens: Annotated[int, integer(1, MAX_WIDTH), "its bottleneck tokens"] = 4
    mbt_head: Annotated[str, one_of(MBT_HEADS), "the fusion behind its layers"] = "attention"
    scan_layers: Annotated[
        bool, FLAG, "one compiled block, looped over, in each encoder; same parameters"
    ] = False
    remat: Annotated[bool, FLAG, "recompute each block in the backward pass: less memory"] = False

    @classmethod
    def from_config(cls, config: Any) -> "ModelSpec":
        """Reads `config.model`: a mapping, an `ml_collections.ConfigDict` or a namespace.

        Raises:
          ConfigError: names the field, the value and what is allowed.
        """
        if isinstance(config, cls):
            return config
        fields = read_fields(as_mapping(config, "model"), MODEL_FIELDS, "model")
        encoders = fields.pop("encoders", {})
        if "num_classes" not in fields:
            raise ConfigError("model.num_classes is missing; allowed: an integer >= 1")
        spec = cls(encoders=(), **fields)
        defaults = {"depth": spec.depth, "width": spec.dim, "num_heads": spec.num_heads}
        for name in encoders:
            _check_modality(name)
        read = {m: EncoderSpec.from_config(m, encoders[m], **defaults) for m in sorted(encoders)}
        spec._check(read)
        used = [spec.modality] if spec.fusion == "unimodal" else list(read)
        return dataclasses.replace(spec, encoders=tuple(read[m] for m in used))

    def _check(self, encoders: Mapping[str, EncoderSpec]) -> None:
        names, of_fusion = ", ".join(encoders), f" for fusion {self.fusion!r}"
        refuse = functools.partial(_refuse, self, "model")
        if not encoders:
            raise ConfigError("model.encoders is empty; allowed: one field a modality")
        if self.fusion == "unimodal" and self.modality not in encoders:
            refuse("modality", f": {names}")
        if self.fusion != "unimodal" and self.modality is not None:
            refuse("modality", f"{of_fusion}: None")
        if self.fusion in ("film", "gated") and len(encoders) != 2:
            raise ConfigError(
                f"model.fusion is {self.fusion!r}, which takes two modalities; "
                f"model.encoders has {len(encoders)}: {names}"
            )
        if self.fusion in CROSS_FUSIONS and len(encoders) < 2:
            raise ConfigError(
                f"model.fusion is {self.fusion!r}, in which modalities attend to each other; "
                f"model.encoders has one: {names}"
            )
        if self.fusion == "jmt" and self.fusion_layers > 1:
            refuse("fusion_layers", f"{of_fusion}: 1")
        if self.cosine_scale != ModelSpec.cosine_scale and self.fusion != "mmcosine":
            raise ConfigError(
                f"model.cosine_scale is {self.cosine_scale:g}; allowed{of_fusion}, "
                f"which has no cosines: {ModelSpec.cosine_scale:g}"
            )
        if self.quality_bias and not (self.has_fixed_query and self.fusion_layers == 1):
            raise ConfigError(
                f"model.quality_bias is {self.quality_bias:g}; allowed with head {self.head!r} and "
                f"model.fusion_layers {self.fusion_layers}: 0; other values need head 'attention' "
                "in one layer, whose tokens are those that the encoders' last norms made"
            )
        if self.quality_signal != "norm" and not self.quality_bias:
            refuse("quality_signal", " with model.quality_bias 0: norm")
        if self.quality_shuffled and not self.quality_bias:
            refuse("quality_shuffled", " with model.quality_bias 0: False")
        if self.uses_class_query and self.dim % self.fusion_heads:
            refuse("fusion_heads", f": a divisor of model.dim, which is {self.dim}")
        if self.fusion_layers > 1 and not self.uses_class_query:
            head = f" with mbt_head {self.mbt_head!r}" if self.fusion == "mbt" else ""
            reason = "since no class token attends to the tokens there"
            refuse("fusion_layers", f"{of_fusion}{head}: 1, {reason}")

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities in use, in alphabetical order."""
        return tuple(encoder.name for encoder in self.encoders)

    @property
    def has_batch_stats(self) -> bool:
        """True if an encoder normalizes by averages over batches, which are state."""
        return any(encoder.kind == RESNET for encoder in self.encoders)

    @property
    def head(self) -> str:
        """The fusion that makes the logits: for mbt, the one behind the bottleneck layers."""
        return self.mbt_head if self.fusion == "mbt" else self.fusion

    @property
    def uses_class_query(self) -> bool:
        """True if a class query attends to the tokens, and so can be rotated."""
        return self.head == "attention" or self.fusion in CROSS_FUSIONS

    @property
    def has_fixed_query(self) -> bool:
        """True if the first layer's class query follows from the parameters, without a sample."""
        return self.head == "attention"

    @property
    def rolling_heads(self) -> int:
        """Heads of one fusion layer whose class query can be rotated, over all its attentions."""
        count = len(self.encoders)
        attentions = {"mult": count * (count - 1), "mmml": count, "jmt": count + 1}
        return attentions.get(self.fusion, 1) * self.fusion_heads

    @property
    def has_shares(self) -> bool:
        """True if each modality has a share of a sample: of attention, or of the votes."""
        return self.uses_class_query or self.fusion in DYNAMIC_FUSIONS


def _check_modality(name: Any) -> None:
    reserved = ("label", "example_mask", "example_index", "example_number")
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or name in reserved
        or name.endswith("_mask")
        or name.startswith("quality_")
    ):
        raise ConfigError(
            f"model.encoders has a modality {name!r}; allowed: letters, digits and underscores, "
            f"not {' or '.join(reserved)}, not starting with quality_ or ending in _mask"
        )


ENCODER_FIELDS, MODEL_FIELDS = section_fields(EncoderSpec), section_fields(ModelSpec)
