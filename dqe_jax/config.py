"""The config of a run: one typed `RunConfig`, checked before anything else happens.

Each layer defines the fields that it has (`method/settings.py`, `models/settings.py`,
`data/settings.py`); this module joins them. A config file makes a `ConfigDict`, which flags change
by dotted names; `RunConfig.of` turns it into a `RunConfig`. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from dqe_jax.data.settings import SPLITS, BatchConfig, DataConfig
from dqe_jax.method.settings import LossConfig, NegativesConfig
from dqe_jax.models.settings import TWO_TOWERS, ModelConfig
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.fields import (
    DTYPES,
    Field,
    Role,
    build,
    field,
    fields_of,
    flag,
    integer,
    nonempty,
    number,
    one_of,
    positive,
    rate,
    some_of,
    text,
    weight,
)
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.sinks import SINKS

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# What functions that do a whole job take: they convert it by `RunConfig.of`.
AnyConfig: TypeAlias = "RunConfig | ConfigDict | Mapping[str, Any]"

MOST_STEPS = 1_000_000_000
# Newer sections, which copied configs may lack. Their fields then have the defaults.
YOUNGER = (
    "batch.accumulate",
    "batch.chunks",
    "data.image_format",
    "data.leave_out",
    "data.queries",
    "data.train_share",
    "eval.curve",
    "features.",
    "init.",
    "log.",
    "loss.form",
    "loss.in_batch_form",
    "mapping",
    "model.dino.",
    "model.features.",
    "model.initial_bias",
    "model.lora.",
    "model.siglip.",
    "model.query",
    "model.attributes.form",
    "model.attributes.parts",
    "negatives.every",
    "optimizer.ema_decay",
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with gradients clipped by their norm and a cosine schedule."""

    learning_rate: float = field(1e-3, "Peak learning rate of AdamW.", positive(1_000))
    b1: float = field(0.9, "First beta of AdamW.", rate())
    b2: float = field(0.98, "Second beta of AdamW.", rate())
    weight_decay: float = field(0.05, "Decay of matrices.", weight(1_000))
    clip_norm: float = field(
        1.0, "Norm to which gradients are clipped.", number(1e-6, 1_000_000_000)
    )
    warmup_steps: int = field(
        100, "Steps of linear warm-up, at most half of the run.", integer(0, MOST_STEPS)
    )
    shard_state: bool = field(
        False,
        "Shard the moments over the devices (ZeRO-1): less memory, the same communication.",
        flag(),
        "free",
    )
    ema_decay: float = field(
        0.0,
        "Decay of a moving average of the parameters (EMA), which is evaluated, searched with and "
        "exported in their place; 0 keeps none.",
        rate(),
        "free",
    )


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """What frozen towers make of images and texts, computed once (`feature_store/`)."""

    place: str = field(
        "auto",
        'Where features lie while a job runs: "device" (memory of the devices, sharded), "host" '
        '(memory of the host), "disk", "auto" (the first of these that has room for them), or '
        '"off": frozen towers are computed in each step.',
        one_of("auto", "device", "host", "disk", "off"),
        "free",
    )
    dtype: str = field(
        "auto",
        'Dtype of features: "float32", "bfloat16", or "auto": that of config.model.dtype.',
        one_of("auto", *DTYPES),
    )
    directory: str = field(
        "",
        'Directory of the features on disk; "" for features/ in config.data.prepared_dir.',
        text(),
        "free",
    )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How a model is evaluated."""

    batch_size: int = field(
        256,
        "Images or queries embedded at a time, over all devices.",
        integer(1, 1_000_000),
        "free",
    )
    top_k: int = field(50, "Length of the ranked lists, at least 50.", integer(50, 100_000))
    split: str = field(
        "test",
        'Split that the run is evaluated on at its end: "validation" where test has no labels.',
        one_of(*SPLITS),
        "free",
    )
    protocol: str = field(
        "original",
        'Gallery of FashionIQ: "original" (the split files: CLIP4Cir, SPRC, QuRe) or "val" (only '
        "the images of the queries: VAL, DQU-CIR). Their figures are not comparable.",
        one_of("original", "val"),
        "free",
    )
    sheet_queries: int = field(10, "Queries on the contact sheet.", integer(1, 10_000), "free")
    curve: bool = field(
        False,
        "At each evaluation measure config.eval.split too, and keep what each query got in curve/ "
        "of the run: dqe-jax ablate compares variants by it.",
        flag(),
        "free",
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go, beside the files of the run's directory."""

    sinks: tuple[str, ...] = field(
        (),
        'Services that get the metrics too: "wandb" (Weights & Biases), "trackio", both or none. '
        "What they need is an extra of the same name.",
        some_of(*SINKS),
        "free",
    )
    project: str = field(
        "dqe_jax", "Project of these services that the run belongs to.", nonempty(), "free"
    )


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a run starts from, beside the weights of a pretrained backbone."""

    run: str = field(
        "",
        "A run, or an exported model, whose parameters this run starts from where path and shape "
        'are the same, such as one that was aligned on captions; "" for none.',
        text(),
        "start",
    )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that can be set for a run.

    Made by `of`, which checks it; one made by its constructor is checked where a job takes it.
    """

    seed: int = field(0, "Seed of initialisation, data order and negatives.", integer(0, 2**63 - 1))
    total_steps: int = field(1000, "Training steps of the run.", integer(1, MOST_STEPS))
    num_devices: int = field(
        0, "Devices to use, of all processes; 0 for all.", integer(0, 1_000_000), "free"
    )
    mapping: str = field(
        "pmap",
        'How the training step is mapped over the devices: "pmap", or "shard_map", which computes '
        "the same to the bit.",
        one_of("pmap", "shard_map"),
        "free",
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    batch: BatchConfig = dataclasses.field(default_factory=BatchConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    features: FeaturesConfig = dataclasses.field(default_factory=FeaturesConfig)
    negatives: NegativesConfig = dataclasses.field(default_factory=NegativesConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    log_every: int = field(20, "Steps between log lines.", integer(1, MOST_STEPS), "free")
    eval_every: int = field(
        500,
        "Steps between evaluations on the validation split; the last step always evaluates. 0 "
        "leaves all evaluation to dqe_jax.evaluate --watch.",
        integer(0, MOST_STEPS),
        "free",
    )
    checkpoint_every: int = field(
        500,
        "Steps between checkpoints; the last step always saves.",
        integer(1, MOST_STEPS),
        "free",
    )
    keep_checkpoints: int = field(
        3, "Checkpoints kept: the newest ones.", integer(1, MOST_STEPS), "free"
    )
    keep_period: int = field(
        0,
        "Also keep a checkpoint every so many steps; 0 keeps no others.",
        integer(0, MOST_STEPS),
        "free",
    )
    keep_best: str = field(
        "",
        "Beside them the best one is kept, by this metric of the validation split, of those at "
        'steps that evaluate; "": none.',
        text(),
        "free",
    )
    max_bad_steps: int = field(
        10,
        "A step whose loss or gradients are not finite changes nothing; so many in a row end the "
        "run.",
        integer(1, MOST_STEPS),
        "free",
    )
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    @classmethod
    def of(cls, config: AnyConfig) -> RunConfig:
        """The checked config of what a config file, a JSON file or a caller gives.

        Args:
          config: a `ConfigDict`, a nested dict, or a `RunConfig`, which is returned as it is.

        Raises:
          UserError: for the first field that is unknown, missing, or not allowed.
        """
        made = _made(flatten(config if isinstance(config, Mapping) else config.to_dict()))
        return config if isinstance(config, RunConfig) else made

    def to_dict(self) -> JsonObject:
        """The fields as a nested dict in alphabetical order, as files and checkpoints hold them."""
        return _in_order(dataclasses.asdict(self))

    def to_json(self) -> str:
        """The fields as a JSON file holds them, with "-inf" for the number."""
        flat = {
            name: "-inf" if x == -math.inf else x for name, x in flatten(self.to_dict()).items()
        }
        tree: JsonObject = {}
        for name, value in flat.items():
            *sections, last = name.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        return json.dumps(tree, indent=2, allow_nan=False) + "\n"

    def to_config_dict(self) -> ConfigDict:
        """The fields as a `ConfigDict`, which config files and flags change."""
        from ml_collections import ConfigDict

        return ConfigDict(self.to_dict())

    def with_changes(self, changes: Mapping[str, object]) -> RunConfig:
        """The config with other values, `{"negatives.rule": "qure", ...}`; raises as `of`."""
        return _made({**flatten(self.to_dict()), **changes})


def _in_order(tree: JsonObject) -> JsonObject:
    """A nested dict with its keys in alphabetical order."""
    ordered = ((key, tree[key]) for key in sorted(tree))
    return {key: _in_order(x) if isinstance(x, dict) else x for key, x in ordered}


@functools.cache
def fields() -> Mapping[str, Field]:
    """All fields of a config by their dotted names, with default, doc, check and role."""
    return {one.name: one for one in fields_of(RunConfig)}


def flatten(config: Mapping[str, object]) -> dict[str, object]:
    """All fields of a config as `{"data.image_size": 64, ...}`; tuples become lists, as in JSON."""
    flat: dict[str, object] = {}
    waiting = [(str(key), value) for key, value in reversed(list(config.items()))]
    while waiting:  # without recursion: a damaged file may be nested without end
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", inside) for key, inside in reversed(list(value.items()))]
        else:
            flat[name] = list(value) if isinstance(value, (tuple, list)) else value
    return flat


def _made(flat: Mapping[str, object]) -> RunConfig:
    """The config with these fields, checked; raises as `RunConfig.of`."""
    made = build(RunConfig, _checked(flat))
    _check_together(made)
    return made


def _checked(flat: Mapping[str, object]) -> dict[str, object]:
    """The values of all fields in their types.

    Raises:
      UserError: a field is unknown, missing, or not allowed.
    """
    known, values = fields(), {}
    for name in flat:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean config.{near[0]}?" if near else "."
            raise UserError(f"config.{name} is not a field of a config{hint}")
    for name, one in known.items():
        if name not in flat and name.startswith(YOUNGER):
            values[name] = one.default
            continue
        if name not in flat:
            raise UserError(f"config.{name} is missing: start from configs/common.py.")
        try:
            values[name] = one.check.read(flat[name])
        except ValueError:
            raise UserError(
                f"config.{name} is {flat[name]!r}: it must be {one.check.words}."
            ) from None
    return values


def _check_together(config: RunConfig) -> None:
    """Raises a `UserError` for fields that do not go with one another."""
    _check_sizes(config)
    if config.keep_best and (not config.eval_every or config.checkpoint_every % config.eval_every):
        raise UserError(
            f"config.keep_best is {config.keep_best!r}: it needs an evaluation at each checkpoint; "
            f"config.checkpoint_every, {config.checkpoint_every}, must be a multiple of "
            f"config.eval_every, {config.eval_every}, which must not be 0."
        )
    if config.loss.in_batch_form == "sigmoid" and not config.model.initial_bias:
        raise UserError(
            "config.loss.in_batch_form is 'sigmoid', which learns a bias: set "
            "config.model.initial_bias below 0, such as SigLIP's -10."
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


def _check_sizes(config: RunConfig) -> None:
    """Raises a `UserError` for sizes of the model that do not divide one another."""
    model, size = config.model, config.data.image_size
    attributes = model.attributes
    if model.query != "composed" and (attributes.enabled or config.negatives.rule != "in_batch"):
        raise UserError(
            f"config.model.query is {model.query!r}: a query without a composer has neither "
            "attribute weights nor mined negatives; set config.model.attributes.enabled=False and "
            "config.negatives.rule=in_batch."
        )
    _check_lora(model)
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
    elif model.backbone in TWO_TOWERS:
        towers = getattr(model, model.backbone)
        section = f"model.{model.backbone}"
        composer = (towers.composer_width, f"{section}.composer_width")
        rows = [(*composer, towers.composer_heads, f"{section}.composer_heads")]
    elif model.backbone == "features":
        own = (model.features.width, "model.features.width")
        rows = [(*own, model.features.heads, "model.features.heads")]
    else:
        rows = []
    if attributes.enabled and attributes.form == "gate":
        if attributes.parts < len(attributes.names):
            raise UserError(
                f"config.model.attributes.parts is {attributes.parts}: it must be at least the "
                f"number of config.model.attributes.names, {len(attributes.names)}."
            )
        parts = (attributes.parts, "model.attributes.parts")
        if model.backbone in ("tiny", "features"):
            own = getattr(model, model.backbone).embed_dim
            rows.append((own, f"model.{model.backbone}.embed_dim", *parts))
    for value, name, divisor, by in rows + shared:
        if value % divisor:
            raise UserError(
                f"config.{name} is {value}: it must be a multiple of config.{by}, {divisor}."
            )


def _check_lora(model: ModelConfig) -> None:
    """Raises a `UserError` for adapters that have no place."""
    if model.lora.rank and not model.frozen:
        raise UserError(
            f"config.model.lora.rank is {model.lora.rank}: adapters stand beside kernels that do "
            "not train; name their parts in config.model.frozen, such as ('vision', 'text')."
        )
    if model.lora.rank and model.lora.layers and model.scan_layers:
        raise UserError(
            f"config.model.lora.layers is {model.lora.layers}: with config.model.scan_layers all "
            "layers are alike; take 0, or config.model.scan_layers=False."
        )


def check_batch(config: RunConfig, num_devices: int, num_processes: int = 1) -> None:
    """Raises a `UserError` if the batch does not divide by the devices and chunks."""
    if config.batch.references % num_devices:
        of = f" of {num_processes} processes" if num_processes > 1 else ""
        raise UserError(
            f"config.batch.references is {config.batch.references}: it must be a multiple of the "
            f"{num_devices} devices{of}."
        )
    if config.batch.references // num_devices % config.batch.chunks:
        raise UserError(
            f"config.batch.chunks is {config.batch.chunks}: it must divide the "
            f"{config.batch.references // num_devices} references of a device (config.batch."
            f"references is {config.batch.references}, on {num_devices} devices)."
        )


def differences(
    config: RunConfig,
    held: Mapping[str, object],
    roles: Sequence[Role] = ("compute", "model", "start"),
) -> list[str]:
    """Fields in which a config differs from one that was saved, as `name: 1 (not 2)`.

    Args:
      config: of a run.
      held: a saved one as a nested dict; it may lack fields, and have others. Those of `YOUNGER`
        that it lacks count as the defaults.
      roles: of the fields to compare.
    """
    a = flatten(config.to_dict())
    b = flatten({n: one.default for n, one in fields().items() if n.startswith(YOUNGER)})
    b |= {name: -math.inf if x == "-inf" else x for name, x in flatten(held).items()}
    return [
        f"{name}: {a.get(name)!r} (not {b.get(name)!r})"
        for name in sorted(a.keys() | b.keys())
        if _role_of(name) in roles and a.get(name) != b.get(name)
    ]


def _role_of(name: str) -> Role:
    """What a field decides; of one that is not known any more, what its place says."""
    if name in fields():
        return fields()[name].role
    return "model" if name.startswith("model.") else "compute"
