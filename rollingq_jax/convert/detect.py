"""Which of upstream's arms a set of tensors, or a parameter tree, belongs to."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from rollingq_jax.convert.names import LETTER, MODALITIES, STREAM, Arm
from rollingq_jax.errors import DataError, UserError


def detect(names: Collection[str], modality: str | None) -> Arm:
    """The arm that a set of tensor names belongs to.

    Raises:
      DataError: the fusion module is of no known kind, or no arm fits.
      UserError: both streams of a unimodal model are there and `modality` does not choose, or it is
        given for a model that has both by design.
    """
    fusion = _detect_fusion(names)
    depth = max(1, *(_depth(names, f"{stream}_blocks") for stream in STREAM.values()))
    if fusion == "unimodal":
        return Arm(fusion, (_detect_modality(names, modality),), depth)
    if modality is not None:
        raise UserError(
            f"modality is {modality!r}; allowed: None, for these tensors have {fusion} fusion"
        )
    multi_depth = max(_depth(names, f"bot_{stream}_blocks") for stream in STREAM.values())
    return Arm(fusion, MODALITIES, depth, multi_depth)


def _detect_fusion(names: Collection[str]) -> str:
    parts = {name.split(".")[1] for name in names if name.startswith("fusion_module.")}
    if parts & {"attn", "FC", "cls_token", "rotate"}:
        return "attention"
    if parts & {"fc_x", "fc_y"}:
        return "gated" if "fc_out" in parts else "sum"
    if "fc" in parts:
        return "film"
    if "fc_out" in parts:
        return "concat"
    if parts:
        listed = ", ".join(sorted(f"fusion_module.{part}" for part in parts))
        raise DataError(f"unknown tensors: {listed}; they belong to no fusion module of upstream's")
    return "unimodal"


def _detect_modality(names: Collection[str], modality: str | None) -> str:
    """The modality of a unimodal model; upstream's class may store both streams and both heads."""
    if modality is not None:
        chosen = {"uni_A": "audio", "uni_V": "visual"}.get(modality, modality)
        if chosen not in MODALITIES:
            raise UserError(f"modality is {modality!r}; allowed: audio, visual, uni_A, uni_V")
        return chosen
    streams = [m for m in MODALITIES if f"encoder.norm_{STREAM[m]}.weight" in names]
    heads = [m for m in MODALITIES if f"{LETTER[m]}_head.weight" in names]
    both = [m for m in streams if m in heads] or streams or heads
    if len(both) == 1:
        return both[0]
    if not both:
        raise DataError("no tensor has a name of upstream's, such as encoder.norm_audio.weight")
    raise UserError(
        "no fusion_module tensors, and both streams are there: say which one a unimodal model was "
        "trained on with modality='audio' or modality='visual'"
    )


def _depth(names: Collection[str], stack: str) -> int:
    found = (re.match(rf"encoder\.{stack}\.(\d{{1,3}})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def detect_in_params(params: Mapping[str, Any]) -> Arm:
    """The arm of one of our parameter trees, by the names in it.

    Raises:
      DataError: its encoders are not upstream's.
    """
    modalities = tuple(
        sorted(k.removeprefix("encoder_") for k in params if k.startswith("encoder_"))
    )
    fusion = params.get("fusion", {})
    by_name = {"cls": "attention", "film": "film", "in_audio": "gated", "head_audio": "sum"}
    kind = next((arm for name, arm in by_name.items() if name in fusion), None)
    kind = kind or ("unimodal" if len(modalities) == 1 else "concat")
    allowed = (("audio",), ("visual",)) if kind == "unimodal" else (("audio", "visual"),)
    if modalities not in allowed:
        raise DataError(
            f"the parameters have encoders for {modalities}; upstream has audio, visual"
        )

    def depth(tree: Mapping[str, Any], prefix: str) -> int:
        return sum(name.startswith(prefix) for name in tree)

    bottleneck = depth(params.get("bottleneck", {}), f"{modalities[0]}_block_")
    return Arm(kind, modalities, depth(params[f"encoder_{modalities[0]}"], "block_"), bottleneck)
