"""What a model is made of: immutable descriptions, read from a configuration and checked."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rollingq_jax.errors import ConfigError
from rollingq_jax.models.fields import (
    FLAG,
    INT32_MAX,
    RATE,
    Rule,
    as_mapping,
    integer,
    is_integer,
    is_real,
    one_of,
    read_fields,
    real,
    several,
)

#: Kinds of modality, and the number of axes that a patch of each cuts (0: the kind has no patches).
PATCH_AXES = {"spectrogram": 2, "image": 2, "video": 3, "sequence": 0, "tokens": 0, "vector": 0}
FUSIONS = ("unimodal", "sum", "concat", "film", "gated", "attention", "mbt")
MBT_HEADS = ("attention", "concat", "sum")
MOST_FUSION_LAYERS = 8
MAX_LAYERS, MAX_WIDTH = 1000, 2**20
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


ENCODER_RULES = {
    "kind": one_of(PATCH_AXES),
    "patch": several(lambda v: is_integer(v) and v >= 1, int, "integers >= 1"),
    "depth": integer(0, MAX_LAYERS),
    "width": integer(1, MAX_WIDTH),
    "num_heads": integer(1),
    "vocab_size": Rule(
        f"an integer >= 2 and at most {INT32_MAX:,}",
        lambda v: v is None or (is_integer(v) and 2 <= v <= INT32_MAX),
        lambda v: v and int(v),
    ),
    "mean": several(is_real, float, "numbers, one a channel or one for all"),
    "std": several(
        lambda v: is_real(v) and v > 0, float, "numbers > 0, one a channel or one for all"
    ),
}

MODEL_RULES = {
    "fusion": one_of(FUSIONS),
    "modality": Rule(
        "the name of an encoder", lambda v: v is None or isinstance(v, str), lambda v: v or None
    ),
    "num_classes": integer(2, MAX_WIDTH)._replace(
        allowed=f"an integer >= 2 and at most {MAX_WIDTH:,} (a run fills in a config's 0 when it "
        "has loaded the data)"
    ),
    "dim": integer(1, MAX_WIDTH),
    "depth": integer(0, MAX_LAYERS),
    "num_heads": integer(1),
    "fusion_heads": integer(1),
    "fusion_layers": Rule(
        f"an integer from 1 to {MOST_FUSION_LAYERS}",
        lambda v: is_integer(v) and 1 <= v <= MOST_FUSION_LAYERS,
        int,
    ),
    "mlp_ratio": real("a number > 0 and at most 1000", lambda v: 0 < v <= 1000),
    "dropout": RATE,
    "encoder_dropout": RATE,
    "gelu": one_of(("exact", "tanh")),
    "dtype": one_of(DTYPES),
    "fusion_token_scale": real("a number >= 0", lambda v: v >= 0),
    "attention_scale": real("a number >= 0", lambda v: v >= 0),
    "mbt_layers": integer(1, MAX_LAYERS),
    "mbt_tokens": integer(1, MAX_WIDTH),
    "mbt_head": one_of(MBT_HEADS),
    "scan_layers": FLAG,
    "remat": FLAG,
    "encoders": Rule("a mapping", lambda v: True, lambda v: as_mapping(v, "model.encoders")),
}


def _divides(heads: int, width: int, where: str, field: str, width_field: str) -> None:
    if width % heads:
        raise ConfigError(
            f"{where}.{field} is {heads}; allowed: a divisor of {width_field}, which is {width}"
        )


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """One modality's encoder.

    Attributes:
      name: the modality, and its key in a batch.
      kind: one of `PATCH_AXES`.
      patch: (row, column) of an image, or of a spectrogram once its axes are swapped to
        (time, frequency); (frame, row, column) of a video; None for the other kinds.
      depth: number of Transformer blocks.
      width: their width; where it is not the model's, a projection follows the last block.
      num_heads: attention heads of each block.
      vocab_size: number of token ids, for kind "tokens" alone.
      mean, std: channel normalisation of uint8 input, (x / 255 - mean) / std; None leaves x / 255.
    """

    name: str
    kind: str
    depth: int
    width: int
    num_heads: int
    patch: tuple[int, ...] | None = None
    vocab_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def from_config(
        cls, name: str, config: Any, *, depth: int, width: int, num_heads: int
    ) -> "EncoderSpec":
        """Reads `model.encoders.<name>`; `depth`, `width` and `num_heads` are its defaults.

        Raises:
          ConfigError: names the field, the value and what is allowed.
        """
        where = f"model.encoders.{name}"
        fields = read_fields(as_mapping(config, where), ENCODER_RULES, where)
        if "kind" not in fields:
            raise ConfigError(f"{where}.kind is missing; allowed: {', '.join(PATCH_AXES)}")
        spec = cls(name, **{"depth": depth, "width": width, "num_heads": num_heads, **fields})
        spec._check(where)
        return spec

    def _check(self, where: str) -> None:
        axes = PATCH_AXES[self.kind]
        if len(self.patch or ()) != axes:
            allowed = f"{axes} integers >= 1" if axes else "None, since there are no patches to cut"
            raise ConfigError(
                f"{where}.patch is {self.patch!r}; allowed for kind {self.kind!r}: {allowed}"
            )
        if (self.vocab_size is not None) != (self.kind == "tokens"):
            allowed = "an integer >= 2" if self.kind == "tokens" else "None"
            raise ConfigError(
                f"{where}.vocab_size is {self.vocab_size!r}; "
                f"allowed for kind {self.kind!r}: {allowed}"
            )
        if self.kind == "tokens" and (self.mean or self.std):
            raise ConfigError(f"{where}.mean and std are set; allowed for kind 'tokens': None")
        _divides(self.num_heads, self.width, where, "num_heads", f"{where}.width")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A whole model, the fields of `config.model`.

    Attributes:
      num_classes: C.
      encoders: one `EncoderSpec` a modality, in alphabetical order.
      fusion: one of `FUSIONS`.
      modality: the encoder that a unimodal model uses; None for the other fusions.
      dim: d, the width of the tokens that are fused, and by default of the encoders.
      depth: default number of blocks of an encoder.
      num_heads: default number of attention heads of an encoder's block.
      fusion_heads: H, the heads of the class token's attention; d_h = d / H.
      fusion_layers: n, the layers in which a class token attends to all modalities' tokens; the
        first n - 1 are Transformer blocks with `fusion_heads` heads.
      mlp_ratio: hidden width of a block's MLP in widths of the block.
      dropout: of the fusion's attention weights and of its output projection.
      encoder_dropout: of both branches of each block, those of the fusion too.
      gelu: "exact" (erf) or "tanh".
      dtype: of the encoders' computation; parameters are float32 in any case.
      fusion_token_scale: standard deviation of the fusion class token's initial values.
      attention_scale: factor on the logits of the class token's attention; at 0 every token has the
        same weight, whatever the sample.
      mbt_layers, mbt_tokens, mbt_head: bottleneck fusion's layers, tokens and what reads them.
      scan_layers: one compiled block, looped over, in each encoder. Same parameters.
      remat: recompute each block in the backward pass instead of keeping what it computed.
    """

    num_classes: int
    encoders: tuple[EncoderSpec, ...]
    fusion: str = "attention"
    modality: str | None = None
    dim: int = 64
    depth: int = 2
    num_heads: int = 4
    fusion_heads: int = 1
    fusion_layers: int = 1
    mlp_ratio: float = 4.0
    dropout: float = 0.2
    encoder_dropout: float = 0.0
    gelu: str = "exact"
    dtype: str = "float32"
    fusion_token_scale: float = 0.02
    attention_scale: float = 1.0
    mbt_layers: int = 2
    mbt_tokens: int = 4
    mbt_head: str = "attention"
    scan_layers: bool = False
    remat: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "ModelSpec":
        """Reads `config.model`: a mapping, an `ml_collections.ConfigDict` or a namespace.

        Raises:
          ConfigError: names the field, the value and what is allowed.
        """
        if isinstance(config, cls):
            return config
        fields = read_fields(as_mapping(config, "model"), MODEL_RULES, "model")
        encoders = fields.pop("encoders", {})
        if "num_classes" not in fields:
            raise ConfigError("model.num_classes is missing; allowed: an integer >= 2")
        spec = cls(encoders=(), **fields)
        defaults = {"depth": spec.depth, "width": spec.dim, "num_heads": spec.num_heads}
        for name in encoders:
            _check_modality(name)
        read = {m: EncoderSpec.from_config(m, encoders[m], **defaults) for m in sorted(encoders)}
        spec._check(read)
        used = [spec.modality] if spec.fusion == "unimodal" else list(read)
        return dataclasses.replace(spec, encoders=tuple(read[m] for m in used))

    def _check(self, encoders: Mapping[str, EncoderSpec]) -> None:
        names = ", ".join(encoders)
        if not encoders:
            raise ConfigError("model.encoders is empty; allowed: one field a modality")
        if self.fusion == "unimodal" and self.modality not in encoders:
            raise ConfigError(f"model.modality is {self.modality!r}; allowed: {names}")
        if self.fusion != "unimodal" and self.modality is not None:
            raise ConfigError(
                f"model.modality is {self.modality!r}; allowed for fusion {self.fusion!r}: None"
            )
        if self.fusion in ("film", "gated") and len(encoders) != 2:
            raise ConfigError(
                f"model.fusion is {self.fusion!r}, which takes two modalities; "
                f"model.encoders has {len(encoders)}: {names}"
            )
        if self.scores_attention:
            _divides(self.fusion_heads, self.dim, "model", "fusion_heads", "model.dim")
        elif self.fusion_layers > 1:
            head = f" with mbt_head {self.mbt_head!r}" if self.fusion == "mbt" else ""
            raise ConfigError(
                f"model.fusion_layers is {self.fusion_layers}; allowed for fusion "
                f"{self.fusion!r}{head}: 1, since no class token attends to the tokens there"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities in use, in alphabetical order."""
        return tuple(encoder.name for encoder in self.encoders)

    @property
    def head(self) -> str:
        """What makes the logits: the fusion itself, or the one behind the bottleneck layers."""
        return self.mbt_head if self.fusion == "mbt" else self.fusion

    @property
    def scores_attention(self) -> bool:
        """Whether a class query attends to the tokens, and so can be rotated."""
        return self.head == "attention"


def _check_modality(name: Any) -> None:
    reserved = ("label", "example_mask")
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
