"""DGL: no gradient of the joint loss reaches the encoders, which learn from their own losses.

"Boosting Multimodal Learning via Disentangled Gradient Learning" (ICCV 2025). With fusion F of
parameters phi, class tokens and tokens h_m, and stop-gradient [.],

    loss = CE(F_phi([h_1], ..., [h_M])) + weight sum_m CE(F_[phi](h_m alone))

u_m = F(h_m alone) is the answer of the fusion that sees modality m only. So the encoders (and the
bottleneck of mbt) take the gradient of the second term, fusion and probes that of the first. Under
attention this cuts the cycle from attention over gradients to encoders, while the class query and
the keys' projection go on learning: a control for what RollingQ turns.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, Setting, StepContext, stateless
from rollingq_jax.baselines.unimodal import losses_alone


def disentangle(weight: float) -> optax.GradientTransformationExtraArgs:
    """The whole model's gradient: the joint loss's in `fusion` and `probe_<m>`, else `apart`'s.

    Its `update` takes `apart`, the gradient of sum_m CE(u_m), a tree like the first.
    """

    def change(
        gradient: Mapping[str, Any], *, apart: Mapping[str, Any], **_: Any
    ) -> dict[str, Any]:
        own = {
            name: jax.tree.map(lambda g: weight * g, apart[name])
            for name in gradient
            if not name.startswith(("fusion", "probe_"))
        }
        return {**gradient, **own}

    return stateless(change)


def dgl_baseline(setting: Setting) -> Baseline:
    """DGL in a training step."""

    def apart(state: Any, context: StepContext) -> Array:
        return jnp.sum(losses_alone(context, setting.spec.modalities), axis=0)

    transform = disentangle(setting.config.dgl_weight)
    return Baseline(apart=apart, transform=transform, whole_batch=True)
