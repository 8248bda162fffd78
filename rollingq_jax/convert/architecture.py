"""Upstream's architecture and its arrays, under upstream's own argument names."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models import build_model

CREMA_D, KINETICS_SOUNDS = "CREMAD", "KineticSound"
NUM_CLASSES = {CREMA_D: 6, KINETICS_SOUNDS: 31}
SPECTROGRAMS = {CREMA_D: (257, 188), KINETICS_SOUNDS: (1024, 128)}
DATASETS = {
    "cremad": CREMA_D,
    "kineticsound": KINETICS_SOUNDS,
    "kineticssounds": KINETICS_SOUNDS,
    "kineticssound": KINETICS_SOUNDS,
    "ks": KINETICS_SOUNDS,
}
UNIMODAL = {"uni_A": "audio", "audio": "audio", "uni_V": "visual", "visual": "visual"}
STATIC = ("sum", "concat", "film", "gated")
MBT_HEADS = ("attention", "concat", "sum")
FRAME_SIZE = 224
ENCODERS = {
    "audio": {"kind": "spectrogram", "patch": (16, 16)},
    "visual": {"kind": "video", "patch": (1, 16, 16)},
}
FIXED = {  # what upstream's arguments do not reach
    "num_heads": 12,
    "fusion_heads": 1,
    "mlp_ratio": 4.0,
    "mbt_tokens": 4,
    "dropout": 0.2,
    "encoder_dropout": 0.0,
    "gelu": "exact",
}


def upstream_model(
    dataset: str = "CREMAD",
    fusion_method: str = "attention",
    backbone: str = "vit",
    edim: int = 768,
    depth: int = 4,
    multi_depth: int = 0,
    use_video_frames: int = 3,
    n_classes: int | None = None,
) -> Any:
    """The model that upstream builds for these arguments, which are upstream's own.

    Encoders with 12 heads, 16 x 16 patches, exact GELU; bottleneck layers and fusion attention with
    one head; dropout 0.2 in the fusion and none in the encoders.

    Args:
      dataset: "CREMAD" or "KineticSound" (also "CREMA-D", "KS", "Kinetics-Sounds").
      fusion_method: "attention", "sum", "concat", "film", "gated", or for one modality alone
        "uni_A" ("audio") or "uni_V" ("visual"). FiLM and gated are in upstream's modules, but its
        command line cannot reach them.
      backbone: "vit" or "mbt".
      edim: the model's width; a multiple of 12.
      depth: layers of each encoder, the bottleneck layers not counted.
      multi_depth: bottleneck layers; upstream sets it to 0 unless `backbone` is "mbt".
      use_video_frames: frames of a video; see `upstream_shapes`.
      n_classes: by default the data set's: 6, or 31.

    Raises:
      ConfigError: an argument has no meaning for upstream.

    Example:
      >>> upstream_model(fusion_method="concat", edim=24).spec.fusion
      'concat'
    """
    dataset = _dataset(dataset)
    if use_video_frames < 1:
        raise ConfigError(f"use_video_frames is {use_video_frames}; allowed: 1 or more")
    if backbone not in ("vit", "mbt"):
        raise ConfigError(f"backbone is {backbone!r}; allowed: vit, mbt")
    if fusion_method not in ("attention", *STATIC, *UNIMODAL):
        allowed = ", ".join(("attention", *STATIC, *UNIMODAL))
        raise ConfigError(f"fusion_method is {fusion_method!r}; allowed: {allowed}")
    config: dict[str, Any] = {
        "fusion": fusion_method,
        "num_classes": NUM_CLASSES[dataset] if n_classes is None else n_classes,
        "dim": edim,
        "depth": depth,
        "encoders": ENCODERS,
        **FIXED,
    }
    if fusion_method in UNIMODAL:
        config |= {"fusion": "unimodal", "modality": UNIMODAL[fusion_method]}
    elif backbone == "mbt" and multi_depth:
        if fusion_method not in MBT_HEADS:
            allowed = ", ".join(MBT_HEADS)
            raise ConfigError(
                f"fusion_method is {fusion_method!r}; allowed with bottleneck layers: {allowed}"
            )
        config |= {"fusion": "mbt", "mbt_layers": multi_depth, "mbt_head": fusion_method}
    return build_model(config)


def upstream_shapes(
    dataset: str = "CREMAD", use_video_frames: int = 3
) -> dict[str, tuple[int, ...]]:
    """Shapes of one example in our layout: `{"audio": (F, T, 1), "visual": (frames, H, W, 3)}`.

    Raises:
      ConfigError: an unknown data set.

    Example:
      >>> upstream_shapes("KineticSound")
      {'audio': (1024, 128, 1), 'visual': (3, 224, 224, 3)}
    """
    return {
        "audio": (*SPECTROGRAMS[_dataset(dataset)], 1),
        "visual": (use_video_frames, FRAME_SIZE, FRAME_SIZE, 3),
    }


def upstream_batch(audio: Any = None, video: Any = None) -> dict[str, Array]:
    """Upstream's arrays in our layout, channels last; one that is None (unimodal) is left out.

    Args:
      audio: `[B, F, T]`, the spectrograms as upstream's data sets store them.
      video: `[B, 3, T, H, W]`.

    Returns:
      `{"audio": [B, F, T, 1], "visual": [B, T, H, W, 3]}`, float32.

    Raises:
      DataError: another number of axes, or of channels.

    Example:
      >>> batch = upstream_batch(jnp.zeros((2, 257, 188)), jnp.zeros((2, 3, 1, 224, 224)))
      >>> {name: array.shape for name, array in batch.items()}
      {'audio': (2, 257, 188, 1), 'visual': (2, 1, 224, 224, 3)}
    """
    batch = {}
    if audio is not None:
        audio = jnp.asarray(audio).astype(jnp.float32)
        if audio.ndim != 3:
            raise DataError(f"audio has shape {audio.shape}; allowed: [B, F, T]")
        batch["audio"] = audio[..., None]
    if video is not None:
        video = jnp.asarray(video).astype(jnp.float32)
        if video.ndim != 5 or video.shape[1] != 3:
            raise DataError(f"video has shape {video.shape}; allowed: [B, 3, T, H, W]")
        batch["visual"] = jnp.moveaxis(video, 1, -1)
    return batch


def _dataset(name: str) -> str:
    key = "".join(c for c in str(name).lower() if c.isalnum())
    if key not in DATASETS:
        raise ConfigError(f"dataset is {name!r}; allowed: CREMAD, KineticSound")
    return DATASETS[key]
