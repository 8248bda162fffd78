"""Figures: functions from plain data to matplotlib `Figure` objects, none of them global."""

from rollingq_jax.analysis.plots.attention import AttentionExample, ModalityView, attention_figure
from rollingq_jax.analysis.plots.geometry import PolarPanel, polar_figure, polar_panels
from rollingq_jax.analysis.plots.samples import (
    attention_scale_figure,
    noise_figure,
    share_quality_figure,
    values_figure,
)
from rollingq_jax.analysis.plots.style import png_bytes, save_png
from rollingq_jax.analysis.plots.training import (
    accuracy_figure,
    arms_figure,
    dynamics_figure,
    key_gap_figure,
)

__all__ = [
    "AttentionExample",
    "ModalityView",
    "PolarPanel",
    "accuracy_figure",
    "arms_figure",
    "attention_figure",
    "attention_scale_figure",
    "dynamics_figure",
    "key_gap_figure",
    "noise_figure",
    "png_bytes",
    "polar_figure",
    "polar_panels",
    "save_png",
    "share_quality_figure",
    "values_figure",
]
