"""Checks a config before anything else happens: every field known, of the right type, allowed.

`FIELDS` lists what a config must hold; `configs/common.py` says what each field means.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any

from dqe_jax import models
from dqe_jax.data import datasets, preprocess, transforms
from dqe_jax.data.examples import SPLITS
from dqe_jax.method import trns
from dqe_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Check:
    """What a field may be: its type, a test, and the words for it."""

    kind: type
    test: Callable[[Any], bool]
    words: str


def _one_of(*values: str) -> Check:
    return Check(str, lambda value: value in values, "one of " + ", ".join(values))


def _integer(least: int) -> Check:
    return Check(int, lambda value: value >= least, f"an integer of at least {least}")


def _number(low: float = -math.inf, high: float = math.inf, words: str = "a number") -> Check:
    return Check(float, lambda value: low <= value <= high, words)


_SHARE = _number(0, 1, "a number from 0 to 1")
_WEIGHT = _number(0, words="a number of at least 0")
_POSITIVE = Check(float, lambda value: 0 < value < math.inf, "a number above 0")
_TEXT = Check(str, lambda value: True, "a string")
_FLAG = Check(bool, lambda value: True, "True or False")
_ANY_NAMES = Check(tuple, lambda v: all(isinstance(n, str) for n in v), "a tuple of names, or ()")
_NAMES = Check(tuple, lambda v: bool(v) and all(isinstance(n, str) for n in v), "a tuple of names")

FIELDS: dict[str, Check] = {
    "seed": _integer(0),
    "total_steps": _integer(1),
    "num_devices": _integer(0),
    "data.dataset": _one_of(*datasets.DATASETS),
    "data.variant": _one_of(*("plain", "hard", "coarse"), *("smoke", "hard_smoke", "coarse_smoke")),
    "data.data_dir": _TEXT,
    "data.prepared_dir": _TEXT,
    "data.image_size": _integer(16),
    "data.preprocess": _one_of(*preprocess.PREPROCESS),
    "data.max_bad_fraction": _SHARE,
    "data.cache_images": _FLAG,
    "data.num_threads": _integer(1),
    "data.augment": _one_of("none", "flip", "flip_shift"),
    "data.captions": _one_of(*transforms.CAPTION_ORDERS),
    "data.max_length": _integer(1),
    "data.lexicon": _TEXT,
    "batch.references": _integer(1),
    "batch.queries_per_reference": _integer(1),
    "model.backbone": _one_of(*models.BACKBONES),
    "model.dtype": _one_of(*models.DTYPES),
    "model.weights": _TEXT,
    "model.tokenizer": _TEXT,
    "model.frozen": _ANY_NAMES,
    "model.frozen_dtype": _one_of(*models.DTYPES),
    "model.remat": _FLAG,
    "model.scan_layers": _FLAG,
    "model.attention": _one_of("auto", "xla", "cudnn"),
    "model.initial_tau": _POSITIVE,
    "model.tiny.pixel_mean": _number(0, 255, "a number from 0 to 255"),
    "model.tiny.pixel_std": _POSITIVE,
    "model.tiny.patch_size": _integer(1),
    "model.tiny.cell_size": _integer(1),
    "model.tiny.cell_width": _integer(1),
    "model.tiny.width": _integer(1),
    "model.tiny.heads": _integer(1),
    "model.tiny.image_depth": _integer(0),
    "model.tiny.text_depth": _integer(0),
    "model.tiny.composer_depth": _integer(1),
    "model.tiny.token_dim": _integer(1),
    "model.tiny.embed_dim": _integer(1),
    "model.tiny.dropout": Check(float, lambda value: 0 <= value < 1, "a number from 0 to below 1"),
    "model.clip.variant": _one_of("auto", *models.VARIANTS["clip"]),
    "model.clip.features": _one_of("penultimate", "last"),
    "model.clip.composer_width": _integer(1),
    "model.clip.composer_depth": _integer(0),
    "model.clip.composer_heads": _integer(1),
    "model.blip2.variant": _one_of("auto", *models.VARIANTS["blip2"]),
    "model.blip2.dropout": Check(float, lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    "model.attributes.enabled": _FLAG,
    "model.attributes.names": _NAMES,
    "model.attributes.width": _integer(1),
    "model.attributes.heads": _integer(1),
    "model.attributes.activation": _one_of("sigmoid", "softmax"),
    "negatives.rule": _one_of(*trns.RULES),
    "negatives.per_query": _integer(1),
    "negatives.oracle": _one_of(*trns.ORACLES),
    "negatives.pool": _one_of("batch", "bank"),
    "negatives.mining": _one_of("step", "refresh"),
    "negatives.first_refresh": _integer(0),
    "negatives.refresh_every": _integer(1),
    "negatives.warmup": _one_of("in_batch", "random", "rule"),
    "negatives.bank_dtype": _one_of(*models.DTYPES),
    "negatives.bounds": _one_of(*trns.BOUND_MODES),
    "negatives.lower": _number(),
    "negatives.upper": _number(),
    "negatives.floor": _number(),
    "negatives.sample_temperature": _WEIGHT,
    "negatives.drops_depth": _integer(3),
    "negatives.drops_apart": _integer(0),
    "loss.in_batch": _WEIGHT,
    "loss.preference": _WEIGHT,
    "loss.margin": _WEIGHT,
    "loss.intent": _WEIGHT,
    "loss.alignment": _WEIGHT,
    "loss.margin_size": _WEIGHT,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.b1": _SHARE,
    "optimizer.b2": _SHARE,
    "optimizer.weight_decay": _WEIGHT,
    "optimizer.clip_norm": _POSITIVE,
    "optimizer.warmup_steps": _integer(0),
    "optimizer.shard_state": _FLAG,
    "log_every": _integer(1),
    "eval_every": _integer(0),
    "checkpoint_every": _integer(1),
    "keep_checkpoints": _integer(1),
    "keep_period": _integer(0),
    "keep_best": _TEXT,
    "max_bad_steps": _integer(1),
    "eval.batch_size": _integer(1),
    "eval.top_k": _integer(50),
    "eval.split": _one_of(*SPLITS),
    "eval.protocol": _one_of("original", "val"),
    "eval.sheet_queries": _integer(1),
}

# Fields that say how a run is watched or where data lies, not what it computes: these may differ
# from the run that a workdir already holds.
FREE_FIELDS = (
    "data.data_dir",
    "data.prepared_dir",
    "data.cache_images",
    "data.num_threads",
    "num_devices",
    "optimizer.shard_state",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_period",
    "keep_best",
    "max_bad_steps",
    "eval.batch_size",
    "eval.split",
    "eval.protocol",
    "eval.sheet_queries",
)
# Fields that say how training starts and is computed: evaluation does not need them.
START_FIELDS = ("model.weights", "model.tokenizer", "model.attention", "model.remat")
# Fields that decide the shapes and the input of the model.
MODEL_FIELDS = ("model.", "data.image_size", "data.preprocess", "data.max_length")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All fields of a config as `{"data.image_size": 64, ...}`; tuples become lists, as in JSON."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, (tuple, list)) else value
    return flat


def check_config(config: Any) -> None:
    """Raises a `UserError` for the first field that is unknown, missing, or not allowed.

    Args:
      config: a `ConfigDict` as made by `configs/common.py`.
    """
    flat = flatten(config.to_dict())
    for name in flat:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            hint = f"; did you mean config.{near[0]}?" if near else "."
            raise UserError(f"config.{name} is not a field of a config{hint}")
    for name, check in FIELDS.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing: start from configs/common.py.")
        value = tuple(flat[name]) if check.kind is tuple else flat[name]
        number = check.kind is float and isinstance(value, int) and not isinstance(value, bool)
        fits = number or type(value) is check.kind
        if not fits or value != value or not check.test(value):
            raise UserError(f"config.{name} is {flat[name]!r}: it must be {check.words}.")
    _check_sizes(config)
    if config.keep_best and (not config.eval_every or config.checkpoint_every % config.eval_every):
        raise UserError(
            f"config.keep_best is {config.keep_best!r}: it needs an evaluation at each checkpoint; "
            f"config.checkpoint_every, {config.checkpoint_every}, must be a multiple of "
            f"config.eval_every, {config.eval_every}, which must not be 0."
        )
    negatives = config.negatives
    if negatives.lower >= negatives.upper:
        raise UserError(
            f"config.negatives.lower is {negatives.lower}: it must be below "
            f"config.negatives.upper, {negatives.upper}."
        )
    if negatives.bounds == "quantile" and not 0 <= negatives.lower < negatives.upper <= 1:
        raise UserError(
            f"config.negatives.lower and .upper are {negatives.lower} and {negatives.upper}: "
            "with config.negatives.bounds = 'quantile' they must lie in 0 to 1."
        )


def _check_sizes(config: Any) -> None:
    """Raises a `UserError` for sizes of the model that do not divide one another."""
    model, size = config.model, config.data.image_size
    attributes = model.attributes
    width = (attributes.width, "model.attributes.width")
    shared = [(*width, attributes.heads, "model.attributes.heads")]
    if model.backbone == "tiny":
        tiny = model.tiny
        patch = (tiny.patch_size, "model.tiny.patch_size")
        rows = [
            (size, "data.image_size", *patch),
            (*patch, tiny.cell_size, "model.tiny.cell_size"),
            (tiny.width, "model.tiny.width", tiny.heads, "model.tiny.heads"),
        ]
    elif model.backbone == "clip":
        composer = (model.clip.composer_width, "model.clip.composer_width")
        rows = [(*composer, model.clip.composer_heads, "model.clip.composer_heads")]
    else:
        rows = []
    for value, name, divisor, by in rows + shared:
        if value % divisor:
            raise UserError(
                f"config.{name} is {value}: it must be a multiple of config.{by}, {divisor}."
            )


def check_batch(config: Any, num_devices: int, num_processes: int = 1) -> None:
    """Raises a `UserError` if the batch does not divide by the devices."""
    if config.batch.references % num_devices:
        of = f" of {num_processes} processes" if num_processes > 1 else ""
        raise UserError(
            f"config.batch.references is {config.batch.references}: it must be a multiple of the "
            f"{num_devices} devices{of}."
        )


def differences(
    one: Mapping[str, Any],
    other: Mapping[str, Any],
    only: tuple[str, ...] = ("",),
    free: tuple[str, ...] = (),
) -> list[str]:
    """Fields in which two configs differ, as `name: 1 (not 2)`, apart from `FREE_FIELDS`.

    Args:
      one: a config as a nested dict.
      other: another.
      only: prefixes of the fields to compare.
      free: fields to leave out, beside `FREE_FIELDS`.
    """
    a, b = flatten(one), flatten(other)
    return [
        f"{name}: {a.get(name)!r} (not {b.get(name)!r})"
        for name in sorted(a.keys() | b.keys())
        if name.startswith(only)
        and name not in (*FREE_FIELDS, *free)
        and a.get(name) != b.get(name)
    ]
