"""The variants of an ablation: what each changes of the config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dqe_jax.config import RunConfig
from dqe_jax.data.datasets import DATASETS
from dqe_jax.utils.errors import UserError

BASE = "infonce"
_PLAIN: dict[str, Any] = {"negatives.rule": "in_batch", "model.attributes.enabled": False}
# What each variant changes of the config.
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: _PLAIN,
    "attributes": {"negatives.rule": "in_batch", "model.attributes.enabled": True},
    "trns": {"negatives.rule": "trns", "model.attributes.enabled": False},
    "full": {"negatives.rule": "trns", "model.attributes.enabled": True},
    "attributes-sum": {
        "negatives.rule": "in_batch",
        "model.attributes.enabled": True,
        "model.attributes.form": "sum",
    },
    "attributes-gate": {
        "negatives.rule": "in_batch",
        "model.attributes.enabled": True,
        "model.attributes.form": "gate",
    },
    "qure": {"negatives.rule": "qure"},
    "hardest": {"negatives.rule": "hardest"},
    "random": {"negatives.rule": "random"},
    "in_batch-oracle": {"negatives.rule": "in_batch", "negatives.oracle": "all"},
    "trns-oracle": {"negatives.rule": "trns", "negatives.oracle": "mined"},
    "hardest-oracle": {"negatives.rule": "hardest", "negatives.oracle": "mined"},
    # Queries without a composer.
    "text-only": {**_PLAIN, "model.query": "text"},
    "image-only": {**_PLAIN, "model.query": "image"},
    "sum-of-both": {**_PLAIN, "model.query": "sum"},
    "product-of-both": {**_PLAIN, "model.query": "product"},
}
# Trained only where they are named: each is `attributes` in one of its two forms, or has no
# composer.
NAMED = (
    *("attributes-sum", "attributes-gate"),
    *("text-only", "image-only", "sum-of-both", "product-of-both"),
)


def choose_variants(names: Sequence[str], dataset: str = "shapes") -> tuple[str, ...]:
    """The variants of these names, in the order of `VARIANTS` and with `infonce`.

    Without names all but those of `NAMED`, and without oracles for a data set whose truth is not
    known.

    Raises:
      UserError: a name is not known.
    """
    for name in names:
        if name not in VARIANTS:
            raise UserError(
                f"--variants: there is no variant {name!r}; choose of {', '.join(VARIANTS)}."
            )
    if not names:
        tells = DATASETS[dataset].has_truth
        names = [
            variant
            for variant, changes in VARIANTS.items()
            if variant not in NAMED and (tells or "negatives.oracle" not in changes)
        ]
    return tuple(v for v in VARIANTS if v in names or v == BASE)


def variant_config(config: RunConfig, variant: str, seed: int, steps: int) -> RunConfig:
    """The config of one run."""
    return config.with_changes({**VARIANTS[variant], "seed": seed, "total_steps": steps})
