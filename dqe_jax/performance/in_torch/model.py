"""The model and the loss in PyTorch: attribute weights, InfoNCE and the terms over attributes.

Negatives are those of the batch: `config.negatives.rule` is "in_batch" in this comparison.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from dqe_jax.config import RunConfig
from dqe_jax.models.blip2 import Blip2Sizes
from dqe_jax.models.clip import ClipSizes
from dqe_jax.models.weights.sizes import PretrainedSizes
from dqe_jax.performance.in_torch.backbones import Blip2, Clip, Tiny
from dqe_jax.performance.in_torch.layers import EPSILON, Attention, normalize

# Arrays of a batch by the names of `method.batch.Batch`.
Batch = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Output:
    """What the model makes of a batch, see `method.batch.TrainOutput`; embeddings have length 1.

    Attributes:
      query: `[B, d]`.
      reference: `[R, M, d]`.
      target: `[B, M, d]`.
      weights: of the attributes, `[B, K]`.
      features: of the references' attributes, `[B, K, width]`.
      target_features: of the targets' under the same texts; None where no term needs them.
      tau: the temperature.
    """

    query: Tensor
    reference: Tensor
    target: Tensor
    weights: Tensor | None
    features: Tensor | None
    target_features: Tensor | None
    tau: Tensor


class AttributeWeights(nn.Module):
    """`models.attributes.AttributeWeights`."""

    def __init__(self, config: RunConfig, image_width: int, text_width: int, embed_dim: int):
        """For images with tokens of `image_width` and texts with a vector of `text_width`."""
        super().__init__()
        a = config.model.attributes
        self.softmax = a.activation == "softmax"
        self.attribute_queries = nn.Parameter(torch.zeros(len(a.names), a.width))
        self.text_condition = nn.Linear(text_width, a.width)
        self.attention = Attention(a.width, a.heads, context=image_width)
        self.norm = nn.LayerNorm(a.width, EPSILON)
        self.weight_hidden = nn.Linear(text_width, a.width)
        self.weight_out = nn.Linear(a.width, len(a.names))
        self.contribution = nn.Linear(a.width, embed_dim, bias=False)

    def weights(self, text: Tensor) -> Tensor:
        """`w` of pooled texts."""
        logits = self.weight_out(functional.relu(self.weight_hidden(text))).float()
        return logits.softmax(-1) if self.softmax else logits.sigmoid()

    def features(self, tokens: Tensor, text: Tensor) -> Tensor:
        """`a_k` of image tokens and pooled texts `[B, ...]`."""
        queries = self.attribute_queries + self.text_condition(text)[:, None]
        found: Tensor = self.norm(queries + self.attention(queries, tokens))
        return found

    def contribute(self, features: Tensor, weights: Tensor) -> Tensor:
        """What is added to `h`."""
        added: Tensor = self.contribution((weights[..., None] * features).sum(1))
        return added


class AttributeGates(nn.Module):
    """`models.attributes.AttributeGates`."""

    def __init__(self, config: RunConfig, text_width: int, embed_dim: int):
        """For texts with a vector of `text_width`."""
        super().__init__()
        a = config.model.attributes
        self.parts, self.named = a.parts, len(a.names)
        self.gate = nn.Linear(text_width, a.parts)
        self.asked_hidden = nn.Linear(text_width, a.width)
        self.asked_out = nn.Linear(a.width, embed_dim)

    def weights(self, text: Tensor) -> Tensor:
        """`w` of pooled texts, of all parts."""
        gates: Tensor = self.gate(text).float().sigmoid()
        return gates

    def contribute(self, weights: Tensor, reference: Tensor, text: Tensor) -> Tensor:
        """What is added to `h`."""
        asked = self.asked_out(functional.relu(self.asked_hidden(text))).float()
        size = asked.shape[-1] // self.parts
        return weights.repeat_interleave(size, dim=-1) * (asked - reference)

    def named_parts(self, embedding: Tensor) -> Tensor:
        """The parts of embeddings `[B, d]` that are attributes."""
        return embedding.unflatten(-1, (self.parts, -1))[:, : self.named]


class DQE(nn.Module):
    """`models.dqe.DQE` with its loss."""

    def __init__(self, config: RunConfig, sizes: PretrainedSizes | None, vocab_size: int):
        """The model of a config; `sizes` are those of a pretrained backbone."""
        super().__init__()
        self.loss_weights, attributes = config.loss, config.model.attributes
        self.backbone: Tiny | Clip | Blip2
        if isinstance(sizes, ClipSizes):
            self.backbone = Clip(config, sizes)
        elif isinstance(sizes, Blip2Sizes):
            self.backbone = Blip2(config, sizes)
        else:
            self.backbone = Tiny(config, vocab_size)
        b = self.backbone
        self.form = attributes.form if attributes.enabled else ""
        if self.form == "gate":
            self.gates = AttributeGates(config, b.text_width, b.embed_dim)
        elif self.form == "sum":
            self.attributes = AttributeWeights(config, b.image_width, b.text_width, b.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.model.initial_tau)))

    def forward(self, batch: Batch) -> tuple[Tensor, Output]:
        """The loss of a batch, and what it compares."""
        out = self.embed(batch)
        return self.loss(out, batch), out

    def embed(self, batch: Batch) -> Output:
        """One pass, each image once."""
        references = len(batch["reference_image"])
        images = self.backbone.images(torch.cat([batch["reference_image"], batch["target_image"]]))
        text = self.backbone.texts(batch["text"])
        own, targets = images.rows(batch["reference"]), images.rows(slice(references, None))
        h = self.backbone.compose(own, text)
        weights = features = target_features = None
        if self.form == "gate":
            gates = self.gates.weights(text.pooled)
            reference = normalize(own.gallery).mean(1)
            query = normalize(h + self.gates.contribute(gates, reference, text.pooled))
            weights, features = gates[:, : self.gates.named], self.gates.named_parts(query)
            target_features = self.gates.named_parts(normalize(targets.gallery).mean(1))
        elif self.form == "sum":
            weights = self.attributes.weights(text.pooled)
            features = self.attributes.features(own.tokens, text.pooled)
            query = normalize(h + self.attributes.contribute(features, weights))
            if self.loss_weights.alignment:
                target_features = self.attributes.features(targets.tokens, text.pooled)
        else:
            query = normalize(h)
        gallery = normalize(images.gallery)
        tau = (-self.log_scale.clamp_max(math.log(100.0))).exp()
        return Output(
            query,
            gallery[:references],
            gallery[references:],
            weights,
            features,
            target_features,
            tau,
        )

    def loss(self, out: Output, batch: Batch) -> Tensor:
        """`method.objective.Objective` without mined negatives."""
        w, mask = self.loss_weights, batch["query_mask"]

        def mean(values: Tensor) -> Tensor:
            return torch.where(mask, values, 0).sum() / mask.sum()

        loss = w.in_batch * mean(info_nce(out, batch))
        if out.weights is None:
            return loss
        loss = loss + w.intent * mean(intent(out.weights, batch["mentions"]))
        if w.alignment:
            assert out.features is not None
            assert out.target_features is not None
            terms = alignment(out.weights, out.features, out.target_features)
            loss = loss + w.alignment * mean(terms)
        return loss


def info_nce(out: Output, batch: Batch) -> Tensor:
    """Symmetric InfoNCE of each query, `[B]`: over targets and references, and over queries."""
    # In float32, whatever autocast does to products.
    with torch.autocast(out.query.device.type, enabled=False):
        pool = torch.cat([out.target, out.reference])
        flat = out.query @ pool.flatten(0, 1).T
        scores = flat.unflatten(1, (len(pool), -1)).amax(-1)  # [B, N]
    ids = torch.cat([batch["target_id"], batch["reference_id"]])
    there = torch.cat([batch["query_mask"], batch["reference_mask"]])
    known = (batch["known_positives"][:, :, None] == ids).any(1)
    forbidden = known | ~there | ~batch["query_mask"][:, None]
    count, logits = len(scores), scores / out.tau
    target = logits.diagonal()[:count]
    rows = torch.where(forbidden, -math.inf, logits)
    forward = torch.logsumexp(torch.cat([target[:, None], rows], 1), 1) - target
    own = torch.eye(count, dtype=torch.bool, device=scores.device)
    columns = torch.where(own | ~forbidden[:, :count], logits[:, :count], -math.inf)
    return 0.5 * (forward + torch.logsumexp(columns, 0) - target)


def intent(weights: Tensor, mentions: Tensor) -> Tensor:
    """`method.losses.attribute_intent`."""
    w = weights.float().clamp(1e-6, 1 - 1e-6)
    entropy = -(mentions * w.log() + (1 - mentions) * (-w).log1p())
    return torch.where(mentions.any(-1), entropy.mean(-1), 0)


def alignment(weights: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    """`method.losses.attribute_alignment`."""

    def unit(x: Tensor) -> Tensor:
        x = x.float()
        return x * ((x * x).sum(-1, keepdim=True) + 1e-12).rsqrt()

    cosine = (unit(features) * unit(targets)).sum(-1)
    w = weights.float()
    return (w * (1 - cosine)).sum(-1) / w.sum(-1).clamp_min(1e-2)
