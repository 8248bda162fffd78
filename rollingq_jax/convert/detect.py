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
      UserError: `modality` is no modality, or is given for a model that fuses both.
    """
    fusion = _detect_fusion(names)
    depth = max(_depth(names, f"{stream}_blocks") for stream in STREAM.values())
    if fusion == "unimodal":
        return Arm(fusion, _detect_modalities(names, modality), depth)
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


def _detect_modalities(names: Collection[str], modality: str | None) -> tuple[str, ...]:
    """The streams of a unimodal model: upstream's class stores both, and names do not tell."""
    if modality is not None:
        chosen = {"uni_A": "audio", "uni_V": "visual"}.get(modality, modality)
        if chosen not in MODALITIES:
            raise UserError(f"modality is {modality!r}; allowed: audio, visual, uni_A, uni_V")
        return (chosen,)
    words = {word for name in names for word in re.split(r"[._]", name) if name[:8] == "encoder."}
    streams = [m for m in MODALITIES if STREAM[m] in words]
    heads = [m for m in MODALITIES if any(n.startswith(f"{LETTER[m]}_head.") for n in names)]
    found = [m for m in streams if m in heads] or streams or heads
    if not found:
        raise DataError("no tensor has a name of upstream's, such as encoder.norm_audio.weight")
    return tuple(found)


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
    by_name = {"cls": "attention", "film": "film", "in_audio": "gated", "head": "concat"}
    kind = next((arm for name, arm in by_name.items() if name in fusion), None)
    if kind is None:  # heads named by modality
        kind = "sum" if any(name.startswith("probe_") for name in params) else "unimodal"
    if not modalities or not set(modalities) <= set(MODALITIES):
        raise DataError(
            f"the parameters have encoders for {', '.join(modalities) or 'nothing'}; upstream has "
            + ", ".join(MODALITIES)
        )

    def depth(tree: Mapping[str, Any], prefix: str) -> int:
        return sum(name.startswith(prefix) for name in tree)

    bottleneck = depth(params.get("bottleneck", {}), f"{modalities[0]}_block_")
    return Arm(kind, modalities, depth(params[f"encoder_{modalities[0]}"], "block_"), bottleneck)
