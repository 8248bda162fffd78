"""The same model and training step in eager PyTorch, from torch's own modules.

The fusion is the textbook form, as PyTorch users of the method have it: every token's query, K, V
and the L x L matrix, of which the class row is used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.paper_scale import PATCHES, Scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """Pre-norm Transformer block, as timm and upstream have it: fused qkv, softmax matrix kept."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, L, d] -> [B, L, d]`."""
        size, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(size, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(size, length, dim))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Encoder(nn.Module):
    """Patch embedding by convolution, class token, positions, blocks, final norm."""

    def __init__(self, scale: Scale, channels: int, patches: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, scale.dim, 16, 16)
        self.cls = nn.Parameter(torch.randn(1, 1, scale.dim) * 1e-6)
        self.position = nn.Parameter(torch.randn(1, 1 + patches, scale.dim) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(scale.dim, scale.num_heads) for _ in range(scale.depth))
        )
        self.norm = nn.LayerNorm(scale.dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, C, H, W] -> [B, 1 + L, d]`."""
        size, frames = x.shape[:2]
        tokens = self.embed(x.flatten(0, 1)).flatten(2).transpose(1, 2)
        tokens = tokens.reshape(size, -1, tokens.shape[-1])
        tokens = torch.cat([self.cls.expand(size, -1, -1), tokens], dim=1)
        return self.norm(self.blocks(tokens + self.position))


class Model(nn.Module):
    """Two encoders, probes and single-head attention fusion."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        dim = scale.dim
        self.audio, self.visual = (
            Encoder(scale, channels, PATCHES[m]) for m, channels in (("audio", 1), ("visual", 3))
        )
        self.cls = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.head, self.probe_audio, self.probe_visual = (nn.Linear(dim, 6) for _ in range(3))
        self.register_buffer("rotation", torch.eye(dim))
        self.dropout = nn.Dropout(0.2)

    def forward(self, audio: torch.Tensor, visual: torch.Tensor) -> list[torch.Tensor]:
        """Logits of the fusion and of the probes."""
        a, v = self.audio(audio), self.visual(visual)
        x = torch.cat([self.cls.expand(len(a), -1, -1), a, v], dim=1)
        q, k, values = self.query(x), self.key(x), self.value(x)
        q = torch.cat([q[:, :1] @ self.rotation.T, q[:, 1:]], dim=1)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        fused = self.dropout(self.out(self.dropout(weights) @ values))[:, 0]
        probes = self.probe_audio(a[:, 0].detach()), self.probe_visual(v[:, 0].detach())
        return [self.head(fused), *probes]


def _data(scale: Scale) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = scale.batch_size
    audio = torch.randn(size, 1, 1, 188, 257, device=DEVICE)
    visual = torch.randn(size, 3, 3, 224, 224, device=DEVICE)
    return audio, visual, torch.randint(0, 6, (size,), device=DEVICE)


def _autocast(scale: Scale) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=scale.dtype == "bfloat16")


def _finish() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 0.0


def train_step(scale: Scale) -> Callable[[], Any]:
    """One step of SGD with momentum and weight decay a call; as many threads as the process has."""
    model, (audio, visual, label) = Model(scale).to(DEVICE), _data(scale)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(scale):
            loss = sum(functional.cross_entropy(z, label) for z in model(audio, visual))
        loss.backward()
        optimizer.step()
        return _finish()

    return step


def encoder_step(scale: Scale) -> Callable[[], Any]:
    """Value and gradient of the encoders alone."""
    model, (audio, visual, _) = Model(scale).to(DEVICE), _data(scale)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        with _autocast(scale):
            loss = model.audio(audio).square().mean() + model.visual(visual).square().mean()
        loss.backward()
        return _finish()

    return step
