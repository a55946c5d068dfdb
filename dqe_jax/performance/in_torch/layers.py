"""The transformer parts of `dqe_jax/models/layers.py` and `tiny.py` in PyTorch, with SDPA."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Of Flax' norms where nothing else is said; PyTorch's own default is 1e-5.
EPSILON = 1e-6


def normalize(x: Tensor) -> Tensor:
    """L2-normalises the last axis in float32, as `models.layers.normalize`."""
    x = x.float()
    return x * (x * x).sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `[B, L, D]` over the tokens that the mask `[B, L]` keeps."""
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp_min(1)


class Attention(nn.Module):
    """Multi-head attention of `x [B, L, D]` over a context `[B, S, C]`, itself when None."""

    def __init__(self, width: int, heads: int, context: int | None = None):
        """`context` is the width of what is attended to; None for attention to `x` itself."""
        super().__init__()
        self.heads = heads
        self.out = nn.Linear(width, width)
        if context is None:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.query = nn.Linear(width, width)
            self.key_value = nn.Linear(context, 2 * width)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """`mask` is bool `[B, S]`, false for padding."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q = self.query(x)
            k, v = self.key_value(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        shown = None if mask is None else mask[:, None, None, :]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm block: self-attention, cross-attention if a context is given, an MLP with ReLU."""

    def __init__(self, width: int, heads: int, context: int | None = None, mlp_ratio: int = 4):
        """`context` is the width of what cross-attention sees; None for none."""
        super().__init__()
        self.norm_self = nn.LayerNorm(width, EPSILON)
        self.self_attention = Attention(width, heads)
        if context is not None:
            self.norm_cross = nn.LayerNorm(width, EPSILON)
            self.cross_attention = Attention(width, heads, context)
        self.norm_mlp = nn.LayerNorm(width, EPSILON)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, L, D]` to the same; masks are false for padding."""
        x = x + self.self_attention(self.norm_self(x), mask=mask)
        if context is not None:
            x = x + self.cross_attention(self.norm_cross(x), context, context_mask)
        y: Tensor = self.mlp_out(functional.relu(self.mlp_in(self.norm_mlp(x))))
        return x + y


class TokenHead(nn.Module):
    """Image tokens `[B, P, D]` to an embedding `[B, d]`, each position with weights of its own."""

    def __init__(self, tokens: int, width: int, token_dim: int, embed_dim: int):
        """For `tokens` tokens of `width`."""
        super().__init__()
        self.norm = nn.LayerNorm(width, EPSILON)
        self.token = nn.Linear(width, token_dim)
        self.embedding = nn.Linear(tokens * token_dim, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Not normalised."""
        out: Tensor = self.embedding(self.token(self.norm(tokens)).flatten(1))
        return out


def positions(ids: Tensor) -> Tensor:
    """`0 ... L - 1` for token ids `[B, L]`."""
    return torch.arange(ids.shape[1], device=ids.device)
