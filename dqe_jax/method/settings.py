"""The fields of a config that the method has: how negatives are mined, and the loss."""

from __future__ import annotations

import dataclasses

from dqe_jax.utils.fields import (
    DTYPES,
    field,
    integer,
    number,
    number_or_least,
    number_or_zero,
    one_of,
    weight,
)

RULES = ("in_batch", "random", "hardest", "qure", "trns")
BOUND_MODES = ("absolute", "quantile", "std", "drops")
ORACLES = ("none", "mined", "all")
FORMS = ("pairs", "softmax")
IN_BATCH_FORMS = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class NegativesConfig:
    """Mined negatives (method, section 2), on top of the in-batch term."""

    rule: str = field(
        "trns",
        'Rule: "trns" (mid-zone), "qure" (between the steepest drops behind the target), "random", '
        '"hardest", or "in_batch" (none is mined: InfoNCE).',
        one_of(*RULES),
    )
    oracle: str = field(
        "none",
        "An oracle, for comparison on data that say which images are truly relevant: these are no "
        'negatives of the "mined" terms, or of "all" terms, InfoNCE included. "none" for real '
        "runs.",
        one_of(*ORACLES),
    )
    per_query: int = field(16, "Negatives drawn for each query.", integer(1, 100_000))
    pool: str = field(
        "batch",
        'Candidates: "batch" (the targets and references of the global batch) or "bank" (the whole '
        "training gallery, embedded anew at intervals).",
        one_of("batch", "bank"),
    )
    mining: str = field(
        "step",
        'From the bank: mine at each "step" with its queries, or at a "refresh" for all queries.',
        one_of("step", "refresh"),
    )
    first_refresh: int = field(
        500, "Steps before the bank is filled first.", integer(0, 1_000_000_000)
    )
    refresh_every: int = field(
        100, "Steps between refreshes of the bank.", integer(1, 1_000_000_000)
    )
    every: int = field(
        1,
        "From the bank: every how many steps they are mined. The steps between are as those before "
        "the bank is filled, and cost less.",
        integer(1, 1_000_000_000),
    )
    warmup: str = field(
        "in_batch",
        'Negatives until the bank is filled: "in_batch" (none beside InfoNCE), "random" or "rule", '
        "of the batch.",
        one_of("in_batch", "random", "rule"),
    )
    bank_dtype: str = field(
        "float32", 'Dtype of the bank: "float32" or "bfloat16".', one_of(*DTYPES)
    )
    bounds: str = field(
        "quantile",
        'Unit of the bounds of the mid-zone: "absolute" (values of delta), "quantile" (of the '
        'query\'s deltas), "std" (multiples of their standard deviation around their mean) or '
        '"drops" (QuRe\'s).',
        one_of(*BOUND_MODES),
    )
    lower: float = field(
        0.02, "Lower bound of the mid-zone, which excludes it.", number(-1_000_000, 1_000_000)
    )
    upper: float = field(
        0.6, "Upper bound of the mid-zone, which includes it.", number(-1_000_000, 1_000_000)
    )
    floor: float = field(
        0.0,
        "No candidate at or below this delta is in the zone, whatever the bounds say; -inf takes "
        "this cut away.",
        number_or_least(1_000_000),
    )
    sample_temperature: float = field(
        0.1,
        "Draw in proportion to exp(-delta / sample_temperature); 0 draws uniformly.",
        number_or_zero(0.0001, 1_000_000),
    )
    drops_depth: int = field(
        1024,
        'Of "drops": how many candidates behind the target are looked at.',
        integer(3, 1_000_000),
    )
    drops_apart: int = field(1, 'Of "drops": places between the drops.', integer(0, 1_000_000))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss terms (method, section 3)."""

    in_batch: float = field(1.0, "Weight of the term over the batch.", weight(1_000_000))
    in_batch_form: str = field(
        "softmax",
        'Form of the term over the batch: "softmax" (symmetric InfoNCE) or "sigmoid" (SigLIP\'s: '
        "each pair of a query and a candidate by itself; it needs config.model.initial_bias).",
        one_of(*IN_BATCH_FORMS),
    )
    preference: float = field(
        0.5, "Weight of the preference term over the mined negatives.", weight(1_000_000)
    )
    form: str = field(
        "pairs",
        'Form of the preference term: "pairs" (the mean over the negatives of the target against '
        'each) or "softmax" (the target against all of them at once, as InfoNCE).',
        one_of(*FORMS),
    )
    margin: float = field(
        0.1, "Weight of the margin term over the mined negatives.", weight(1_000_000)
    )
    intent: float = field(
        0.1,
        "Weight of the term that teaches the attribute weights which attributes a text mentions.",
        weight(1_000_000),
    )
    alignment: float = field(
        0.1,
        "Weight of the term that pulls the query's attribute features to those of the target.",
        weight(1_000_000),
    )
    margin_size: float = field(
        0.1, "Margin of the margin term, in units of similarity.", weight(1_000_000)
    )
