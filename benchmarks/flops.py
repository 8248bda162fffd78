"""FLOPs of the model by formula: what the mathematics needs, whatever the compiler does.

XLA counts the body of a loop once, so a scanned or mapped program under-reports; the formula is
checked in a test against a loop-free compile.
"""

from typing import Any


def block_flops(length: int, width: int, mlp_ratio: float = 4.0) -> float:
    """One Transformer block, forward, one sample: matmuls alone, 2 FLOPs a multiply-add.

    qkv 6 L d^2, scores and weighted sum 4 L^2 d, output projection 2 L d^2, MLP 4 r L d^2.
    """
    return (8 + 4 * mlp_ratio) * length * width**2 + 4 * length**2 * width


def encoder_flops(patches: int, patch_size: int, width: int, depth: int, mlp_ratio: float) -> float:
    """Patch embedding and `depth` blocks over the patches and a class token."""
    return 2 * patches * patch_size * width + depth * block_flops(patches + 1, width, mlp_ratio)


def fusion_flops(
    length: int, width: int, modalities: int, layers: int = 1, mlp_ratio: float = 4.0
) -> float:
    """Class-token attention without K and V: two products over L, and projections of one vector.

    Layers below the last are blocks over all tokens. What the class token sees in them (query,
    weights, mean keys) has no gradient and is left out: a product over L, 2 L d.
    """
    last = 4 * length * width + (2 * 4 + 2 * modalities) * width**2
    return last + (layers - 1) * block_flops(length, width, mlp_ratio)


def train_step_flops(spec: Any, patches: dict[str, int], patch_sizes: dict[str, int]) -> float:
    """Forward and backward pass of one sample: three times the forward pass.

    The patch embedding has no gradient to its input, so it counts twice.

    Args:
      spec: a model's `ModelSpec`, with attention fusion.
      patches: tokens of each modality, its class token not counted.
      patch_sizes: numbers in one patch.
    """
    total = 0.0
    for encoder in spec.encoders:
        name = encoder.name
        total += 3 * encoder_flops(
            patches[name], patch_sizes[name], encoder.width, encoder.depth, spec.mlp_ratio
        )
        total -= 2 * patches[name] * patch_sizes[name] * encoder.width
    length = 1 + sum(count + 1 for count in patches.values())
    if spec.fusion_pooling == "class_tokens":
        length = 1 + len(patches)
    return total + 3 * fusion_flops(
        length, spec.dim, len(spec.encoders), spec.fusion_layers, spec.mlp_ratio
    )
