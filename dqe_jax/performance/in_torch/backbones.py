"""The backbones in PyTorch: towers of `transformers` with SDPA attention, and our composers.

Each takes images uint8 `[B, H, W, 3]` and token ids `[B, L]`, like our own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqe_jax.config import RunConfig
from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.encoder import PIXEL_MEAN, PIXEL_STD
from dqe_jax.models.settings import TinyConfig
from dqe_jax.models.weights.hugging_face import config_of
from dqe_jax.models.weights.sizes import PretrainedSizes
from dqe_jax.performance.in_torch.layers import (
    EPSILON,
    Block,
    TokenHead,
    masked_mean,
    normalize,
    positions,
)
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.quiet import import_transformers


@dataclasses.dataclass(frozen=True)
class Images:
    """Features of images: tokens `[B, P, D]` and gallery embedding `[B, M, d]`, not normalised."""

    tokens: Tensor
    gallery: Tensor

    def rows(self, which: Tensor | slice) -> Images:
        """Those of some images."""
        return Images(self.tokens[which], self.gallery[which])


@dataclasses.dataclass(frozen=True)
class Texts:
    """Features of texts: ids, mask and tokens `[B, L, ...]`, and one vector each, `[B, D]`."""

    ids: Tensor
    mask: Tensor
    tokens: Tensor
    pooled: Tensor


def without_gradient(frozen: bool) -> contextlib.AbstractContextManager[None]:
    """The context in which a tower runs: a frozen one keeps nothing for a backward pass."""
    return torch.no_grad() if frozen else contextlib.nullcontext()


def cut(image: Tensor, size: int) -> Tensor:
    """Cells of `size` a side of `[B, H, W, C]`: `[B, H / size, W / size, size * size * C]`."""
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height // size, width // size, -1)


class Tiny(nn.Module):
    """`models/tiny.py`, which no other library has."""

    def __init__(self, config: RunConfig, vocab_size: int):
        """Of a config, with dropout on patches and words."""
        super().__init__()
        t: TinyConfig = config.model.tiny
        self.settings = t
        self.frozen = set(config.model.frozen)
        tokens = (config.data.image_size // t.patch_size) ** 2
        per_patch = (t.patch_size // t.cell_size) ** 2
        self.cells = nn.Linear(3 * t.cell_size**2, t.cell_width)
        self.patches = nn.Linear(per_patch * t.cell_width, t.width)
        self.image_positions = nn.Embedding(tokens, t.width)
        self.image_blocks = nn.ModuleList(Block(t.width, t.heads) for _ in range(t.image_depth))
        self.words = nn.Embedding(vocab_size, t.width)
        self.text_positions = nn.Embedding(config.data.max_length, t.width)
        self.text_blocks = nn.ModuleList(Block(t.width, t.heads) for _ in range(t.text_depth))
        self.text_norm = nn.LayerNorm(t.width, EPSILON)
        self.composer_blocks = nn.ModuleList(
            Block(t.width, t.heads, context=t.width) for _ in range(t.composer_depth)
        )
        self.gallery_head = TokenHead(tokens, t.width, t.token_dim, t.embed_dim)
        self.residual_head = TokenHead(tokens, t.width, t.token_dim, t.embed_dim)
        self.drop = nn.Dropout(t.dropout)
        self.embed_dim, self.image_width, self.text_width = t.embed_dim, t.width, t.width

    def images(self, image: Tensor) -> Images:
        """Features of images."""
        t = self.settings
        with without_gradient("vision" in self.frozen):
            x = (image.float() - t.pixel_mean) / t.pixel_std
            x = functional.relu(self.cells(cut(x, t.cell_size)))
            x = cut(x, t.patch_size // t.cell_size)
            x = self.drop(self.patches(x.flatten(1, 2)) + self.image_positions.weight)
            for block in self.image_blocks:
                x = block(x)
        return Images(x, self.gallery_head(x)[:, None])

    def texts(self, ids: Tensor) -> Texts:
        """Features of texts."""
        mask = ids > 0
        with without_gradient("text" in self.frozen):
            x = self.drop(self.words(ids) + self.text_positions(positions(ids)))
            for block in self.text_blocks:
                x = block(x, mask)
            x = self.text_norm(x)
        return Texts(ids, mask, x, masked_mean(x, mask))

    def compose(self, image: Images, text: Texts) -> Tensor:
        """`h` of images and texts `[B, ...]`."""
        x = image.tokens
        for block in self.composer_blocks:
            x = block(x, context=text.tokens, context_mask=text.mask)
        out: Tensor = normalize(image.gallery[:, 0]) + self.residual_head(x)
        return out


class _Pretrained(nn.Module):
    """What the pretrained backbones share: pixels as their towers take them."""

    def __init__(self, config: RunConfig):
        """`config` says what is frozen."""
        super().__init__()
        self.frozen = set(config.model.frozen)
        for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            self.register_buffer(f"pixel_{name}", torch.tensor(values)[:, None, None], False)

    def pixels(self, image: Tensor) -> Tensor:
        """Images uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]`."""
        mean, std = self.get_buffer("pixel_mean"), self.get_buffer("pixel_std")
        return (image.permute(0, 3, 1, 2).float() / 255 - mean) / std


class Clip(_Pretrained):
    """`models/clip.py` over `CLIPModel`."""

    def __init__(self, config: RunConfig, sizes: ClipSizes):
        """A model of these sizes."""
        super().__init__(config)
        c = config.model.clip
        self.sizes, self.last = sizes, c.features == "last"
        self.towers = transformers_model(sizes, config)
        width = sizes.vision.width
        self.composer_in = nn.Linear(width, c.composer_width)
        self.composer_blocks = nn.ModuleList(
            Block(c.composer_width, c.composer_heads, context=sizes.text_width)
            for _ in range(c.composer_depth)
        )
        self.composer_norm = nn.LayerNorm(c.composer_width, EPSILON)
        self.residual = nn.Linear(c.composer_width, sizes.embed_dim, bias=False)
        self.embed_dim, self.image_width = sizes.embed_dim, width
        self.text_width = sizes.embed_dim

    def images(self, image: Tensor) -> Images:
        """Features of images."""
        tower = self.towers.vision_model
        with without_gradient("vision" in self.frozen):
            found = tower(self.pixels(image), output_hidden_states=True)
        tokens = found.hidden_states[-1 if self.last else -2][:, 1:]
        return Images(tokens, self.towers.visual_projection(found.pooler_output)[:, None])

    def texts(self, ids: Tensor) -> Texts:
        """Features of texts."""
        with without_gradient("text" in self.frozen):
            tokens = self.towers.text_model(ids).last_hidden_state
        highest = self.sizes.ends_with_highest
        end = ids.argmax(1) if highest else (ids == self.sizes.end_id).int().argmax(1)
        pooled = tokens[torch.arange(len(ids), device=ids.device), end]
        mask = positions(ids) <= end[:, None]
        return Texts(ids, mask, tokens, self.towers.text_projection(pooled))

    def compose(self, image: Images, text: Texts) -> Tensor:
        """`h` of images and texts `[B, ...]`."""
        x = self.composer_in(image.tokens)
        for block in self.composer_blocks:
            x = block(x, context=text.tokens, context_mask=text.mask)
        residual: Tensor = self.residual(self.composer_norm(x).mean(1))
        return normalize(image.gallery[:, 0]) + normalize(text.pooled) + residual


class Blip2(_Pretrained):
    """`models/blip2.py` over `Blip2ForImageTextRetrieval`."""

    def __init__(self, config: RunConfig, sizes: Blip2Sizes):
        """A model of these sizes."""
        super().__init__(config)
        self.sizes = sizes
        self.towers = transformers_model(sizes, config)
        self.embed_dim, self.text_width = sizes.embed_dim, sizes.embed_dim
        self.image_width = sizes.vision.width

    def _queries(self, count: int) -> Tensor:
        queries: Tensor = self.towers.query_tokens.expand(count, -1, -1)
        return queries

    def images(self, image: Tensor) -> Images:
        """Features of images."""
        with without_gradient("vision" in self.frozen):
            tokens = self.towers.vision_model(self.pixels(image)).last_hidden_state
        out = self.towers.qformer(
            query_embeds=self._queries(len(image)),
            query_length=self.sizes.num_queries,
            encoder_hidden_states=tokens,
        ).last_hidden_state
        return Images(tokens, self.towers.vision_projection(out))

    def texts(self, ids: Tensor) -> Texts:
        """Features of texts."""
        mask = ids > 0
        with without_gradient({"text", "qformer"} <= self.frozen):
            tokens = self.towers.qformer(
                query_embeds=self.towers.embeddings(input_ids=ids),
                query_length=0,
                attention_mask=mask.long(),
            ).last_hidden_state
        return Texts(ids, mask, tokens, self.towers.text_projection(tokens[:, 0]))

    def compose(self, image: Images, text: Texts) -> Tensor:
        """`h` of images and texts `[B, ...]`."""
        count, M = len(text.ids), self.sizes.num_queries
        both = torch.cat([text.mask.new_ones(count, M), text.mask], 1).long()
        out = self.towers.qformer(
            query_embeds=self.towers.embeddings(
                input_ids=text.ids, query_embeds=self._queries(count)
            ),
            query_length=M,
            attention_mask=both,
            encoder_hidden_states=image.tokens,
        ).last_hidden_state[:, :M]
        composed: Tensor = self.towers.vision_projection(out).float().mean(1)
        return composed


def transformers_model(sizes: PretrainedSizes, config: RunConfig) -> Any:
    """The model of `transformers` of these sizes, random, with SDPA attention.

    Raises:
      UserError: it has none, or it cannot attend by SDPA.
    """
    content = config_of(sizes)
    if content is None:
        raise UserError(
            f"config.model.{config.model.backbone}.variant: transformers has no model of this "
            "shape, so that --vs=torch cannot time it; take another variant."
        )
    content["vision_config"]["image_size"] = config.data.image_size
    library = import_transformers()
    if isinstance(sizes, ClipSizes):
        kind, settings = library.CLIPModel, library.CLIPConfig.from_dict(content)
    else:
        rate = config.model.blip2.dropout
        # As in ours, attention is not dropped.
        dropout = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": 0.0}
        content["qformer_config"] |= dropout
        kind = library.Blip2ForImageTextRetrieval
        settings = library.Blip2Config.from_dict(content)
    try:
        model = kind._from_config(settings, attn_implementation="sdpa")
    except ValueError as error:  # of a release whose Q-Former has no SDPA
        raise UserError(
            f"transformers {library.__version__} has no SDPA attention for {kind.__name__}: "
            "install a newer release to time it."
        ) from error
    return model.float()
