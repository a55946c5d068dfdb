"""`RunConfig`: its fields, what they may be, and what it is made of and turned into."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, shapes
from dqe_jax.config import RunConfig, differences, fields, flatten
from dqe_jax.data import augmentation, datasets, examples, preprocess
from dqe_jax.data import settings as data_settings
from dqe_jax.data.builders import shapes as shapes_builder
from dqe_jax.models import attributes, build, dino
from dqe_jax.models import settings as model_settings
from dqe_jax.models.two_towers import TwoTowers
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.fields import DTYPES

ROOT = Path(__file__).resolve().parents[2]
FIELDS = fields()
# The fields as `configs/common.py` of version 0.2.0 made them one by one; users have copies of it.
OLD = {
    "seed": 0,
    "total_steps": 1000,
    "num_devices": 0,
    "data.dataset": "shapes",
    "data.variant": "plain",
    "data.data_dir": "",
    "data.prepared_dir": "~/.cache/dqe_jax",
    "data.image_size": 64,
    "data.preprocess": "pad",
    "data.max_bad_fraction": 0.01,
    "data.cache_images": True,
    "data.num_threads": 2,
    "data.augment": "none",
    "data.captions": "forward",
    "data.max_length": 16,
    "data.lexicon": "",
    "batch.references": 32,
    "batch.queries_per_reference": 4,
    "model.backbone": "tiny",
    "model.dtype": "float32",
    "model.weights": "",
    "model.tokenizer": "",
    "model.frozen": (),
    "model.frozen_dtype": "float32",
    "model.remat": False,
    "model.scan_layers": False,
    "model.attention": "auto",
    "model.initial_tau": 0.07,
    "model.tiny.pixel_mean": 222.0,
    "model.tiny.pixel_std": 64.0,
    "model.tiny.patch_size": 16,
    "model.tiny.cell_size": 8,
    "model.tiny.cell_width": 64,
    "model.tiny.width": 128,
    "model.tiny.heads": 4,
    "model.tiny.image_depth": 4,
    "model.tiny.text_depth": 2,
    "model.tiny.composer_depth": 2,
    "model.tiny.token_dim": 64,
    "model.tiny.embed_dim": 256,
    "model.tiny.dropout": 0.0,
    "model.clip.variant": "vit_l_14",
    "model.clip.features": "penultimate",
    "model.clip.composer_width": 512,
    "model.clip.composer_depth": 2,
    "model.clip.composer_heads": 8,
    "model.blip2.variant": "vit_g_14",
    "model.blip2.dropout": 0.1,
    "model.attributes.enabled": True,
    "model.attributes.names": ("color", "shape"),
    "model.attributes.width": 128,
    "model.attributes.heads": 4,
    "model.attributes.activation": "sigmoid",
    "negatives.rule": "trns",
    "negatives.oracle": "none",
    "negatives.per_query": 16,
    "negatives.pool": "batch",
    "negatives.mining": "step",
    "negatives.first_refresh": 500,
    "negatives.refresh_every": 100,
    "negatives.warmup": "in_batch",
    "negatives.bank_dtype": "float32",
    "negatives.bounds": "quantile",
    "negatives.lower": 0.02,
    "negatives.upper": 0.6,
    "negatives.floor": 0.0,
    "negatives.sample_temperature": 0.1,
    "negatives.drops_depth": 1024,
    "negatives.drops_apart": 1,
    "loss.in_batch": 1.0,
    "loss.preference": 0.5,
    "loss.margin": 0.1,
    "loss.intent": 0.1,
    "loss.alignment": 0.1,
    "loss.margin_size": 0.1,
    "optimizer.learning_rate": 0.001,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.weight_decay": 0.05,
    "optimizer.clip_norm": 1.0,
    "optimizer.warmup_steps": 100,
    "optimizer.shard_state": False,
    "log_every": 20,
    "eval_every": 500,
    "checkpoint_every": 500,
    "keep_checkpoints": 3,
    "keep_period": 0,
    "keep_best": "",
    "max_bad_steps": 10,
    "eval.batch_size": 256,
    "eval.top_k": 50,
    "eval.split": "test",
    "eval.protocol": "original",
    "eval.sheet_queries": 10,
}
# What has been added since: an older config lacks it, and it has its default.
YOUNGER = {
    "batch.accumulate": 1,
    "batch.chunks": 1,
    "data.image_format": "png",
    "data.leave_out": (),
    "data.queries": "triplets",
    "data.train_share": 1.0,
    "eval.curve": False,
    "init.run": "",
    "log.sinks": (),
    "log.project": "dqe_jax",
    "mapping": "pmap",
    "loss.form": "pairs",
    "loss.in_batch_form": "softmax",
    "model.initial_bias": 0.0,
    "model.query": "composed",
    "features.place": "auto",
    "features.dtype": "auto",
    "features.directory": "",
    "model.attributes.form": "sum",
    "model.attributes.parts": 8,
    "negatives.every": 1,
    "model.features.images": (),
    "model.features.texts": (),
    "model.features.words": True,
    "model.features.width": 128,
    "model.features.heads": 4,
    "model.features.text_depth": 0,
    "model.features.composer": "mlp",
    "model.features.composer_width": 384,
    "model.features.composer_depth": 2,
    "model.features.composer_norm": False,
    "model.features.token_dim": 64,
    "model.features.embed_dim": 256,
    "model.lora.rank": 0,
    "model.lora.alpha": 16.0,
    "model.lora.targets": ("query", "value"),
    "model.lora.layers": 0,
    "model.features.dropout": 0.1,
    "model.dino.variant": "dinov2_vit_b_14",
    "model.dino.text": "clip_vit_l_14",
    "model.dino.text_weights": "",
    "model.dino.features": "last",
    "model.dino.composer_width": 512,
    "model.dino.composer_depth": 2,
    "model.dino.composer_heads": 8,
    "model.siglip.variant": "vit_b_16",
    "model.siglip.features": "last",
    "model.siglip.composer_width": 512,
    "model.siglip.composer_depth": 2,
    "model.siglip.composer_heads": 8,
    "optimizer.ema_decay": 0.0,
}
# And the lists of that version.
OLD_FREE = {
    *("data.data_dir", "data.prepared_dir", "data.cache_images", "data.num_threads"),
    *("num_devices", "optimizer.shard_state", "log_every", "eval_every", "checkpoint_every"),
    *("keep_checkpoints", "keep_period", "keep_best", "max_bad_steps"),
    *("eval.batch_size", "eval.split", "eval.protocol", "eval.sheet_queries"),
}
OLD_START = {"model.weights", "model.tokenizer", "model.attention", "model.remat"}
OLD_MODEL = ("model.", "data.image_size", "data.preprocess", "data.max_length")


def by_hand(values) -> ConfigDict:
    """A `ConfigDict` made field by field."""
    config = ConfigDict()
    for name, value in values.items():
        *sections, last = name.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ConfigDict()
            node = node[section]
        node[last] = value
    return config


# -------------------------------------------------------------------------------------- the fields


def test_defaults_are_those_of_the_old_config():
    every = OLD | YOUNGER
    assert {name: one.default for name, one in FIELDS.items()} == every
    assert RunConfig() == RunConfig.of(by_hand(OLD)) == RunConfig.of(by_hand(every))
    assert common.get_config().to_dict() == by_hand(every).to_dict()
    assert json.dumps(RunConfig().to_dict()) == json.dumps(common.get_config().to_dict())


def test_roles_are_those_of_the_old_lists():
    assert {name for name, one in FIELDS.items() if one.role == "free"} - set(YOUNGER) == OLD_FREE
    start = {name for name, one in FIELDS.items() if one.role == "start"}
    assert start - set(YOUNGER) == OLD_START
    model = {name for name in OLD if name.startswith(OLD_MODEL)} - OLD_START - OLD_FREE
    own = {name for name, one in FIELDS.items() if one.role == "model"}
    assert own - set(YOUNGER) == model
    assert {one.role for one in FIELDS.values()} == {"compute", "model", "start", "free"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_documented_and_has_a_default_of_its_type(name):
    one = FIELDS[name]
    assert re.fullmatch(r"[A-Z0-9][^\n]*[.]", one.doc)
    assert one.check.read(one.default) == one.default
    assert type(one.default) is one.check.kind
    assert one.name == name


def test_choices_are_those_of_the_tables():
    assert tuple(datasets.DATASETS) == data_settings.DATASETS
    assert set(data_settings.VARIANTS) == {one.name for one in shapes_builder.CONFIGS}
    assert tuple(preprocess.PREPROCESS) == data_settings.PREPROCESS
    assert tuple(augmentation.AUGMENTATIONS) == data_settings.AUGMENTATIONS
    assert data_settings.SPLITS == examples.SPLITS
    assert tuple(build.BACKBONES) == model_settings.BACKBONES
    assert tuple(build.VARIANTS["clip"]) == model_settings.CLIP_VARIANTS
    assert tuple(build.VARIANTS["siglip"]) == model_settings.SIGLIP_VARIANTS
    assert tuple(dino.TOWERS) == model_settings.DINO_VARIANTS
    assert tuple(dino.TEXTS) == model_settings.DINO_TEXTS
    assert set(model_settings.TWO_TOWERS) == {
        name for name, kind in build.BACKBONES.items() if issubclass(kind, TwoTowers)
    }
    assert tuple(build.VARIANTS["blip2"]) == model_settings.BLIP2_VARIANTS
    assert tuple(attributes.ACTIVATIONS) == model_settings.ACTIVATIONS
    assert tuple(build.DTYPES) == DTYPES


# ------------------------------------------------------------------------------ what fields may be


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("total_steps", 0), ("total_steps", 1.5), ("seed", -1), ("seed", True)),
        *(("data.image_size", 8), ("data.dataset", "photos"), ("data.augment", "rotate")),
        *(("data.max_bad_fraction", 1.1), ("data.cache_images", 1), ("data.lexicon", 3)),
        *(("model.dtype", "float16"), ("model.initial_tau", 0.0), ("model.tiny.dropout", 1.0)),
        *(("model.attributes.names", ()), ("model.attributes.names", (1,))),
        *(("model.frozen", (1,)), ("model.frozen", "vision"), ("seed", None)),
        *(("negatives.rule", "hard"), ("negatives.bounds", "rank"), ("negatives.per_query", 0)),
        ("negatives.oracle", "trns"),
        *(("loss.margin", -0.1), ("loss.in_batch", float("nan")), ("optimizer.clip_norm", 0.0)),
        *(("eval.top_k", 49), ("eval.batch_size", 0), ("log_every", 0), ("keep_checkpoints", 0)),
        # What is absurd would only exhaust memory, minutes later.
        *(("batch.references", 999_999_999), ("batch.queries_per_reference", 1_000_000)),
        *(("negatives.per_query", 1_000_000_000), ("negatives.drops_depth", 10**9)),
        *(("data.image_size", 100_000), ("data.max_length", 10**6), ("data.num_threads", 10**6)),
        *(
            ("model.tiny.width", 10**6),
            ("model.tiny.heads", 10**6),
            ("model.tiny.patch_size", 10**6),
        ),
        *(("model.tiny.image_depth", 10**6), ("model.tiny.text_depth", 10**6)),
        *(("model.tiny.composer_depth", 10**6), ("model.clip.composer_depth", 10**6)),
        *(("model.tiny.embed_dim", 10**6), ("model.tiny.token_dim", 10**6)),
        *(("model.clip.composer_width", 10**6), ("model.clip.composer_heads", 10**6)),
        *(("model.attributes.width", 10**6), ("model.attributes.heads", 10**6)),
        *(("eval.batch_size", 10**9), ("eval.top_k", 10**9), ("eval.sheet_queries", 10**9)),
        # What float32 cannot hold, or would turn into a division by 0.
        *(("optimizer.b1", 1.0), ("optimizer.b2", 1.0), ("optimizer.b2", 1 - 1e-9)),
        *(("optimizer.learning_rate", 1e300), ("optimizer.weight_decay", math.inf)),
        *(("loss.in_batch", math.inf), ("loss.margin_size", 1e300)),
        *(("negatives.floor", math.inf), ("negatives.floor", -1e300)),
        *(("negatives.lower", -math.inf), ("negatives.upper", math.inf)),
        *(
            ("model.initial_tau", 1e-40),
            ("model.initial_tau", 1e5),
            ("model.tiny.pixel_std", 1e-40),
        ),
        *(
            ("negatives.sample_temperature", 1e-40),
            ("negatives.sample_temperature", -0.1),
            ("optimizer.clip_norm", 1e-40),
        ),
    ],
)
def test_what_a_field_may_not_be(name, value):
    config = by_hand(OLD | {name: value})
    with pytest.raises(UserError, match=rf"^config\.{re.escape(name)} is .*: it must be "):
        RunConfig.of(config)


NUMBERS = [name for name, one in FIELDS.items() if one.check.kind in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_endless(name):
    check = FIELDS[name].check
    endless = [2**100, -(2**100)]
    if check.kind is float:
        endless += [1e300, -1e300, math.inf, -math.inf, math.nan]
    for value in endless:
        if (name, value) == ("negatives.floor", -math.inf):  # takes the cut away
            continue
        with pytest.raises(ValueError, match=re.escape(check.words)):
            check.read(value)


def test_a_floor_of_minus_infinity_takes_the_cut_away():
    config = RunConfig().with_changes({"negatives.floor": -math.inf})
    assert config.negatives.floor == -math.inf
    assert RunConfig.of(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("model.initial_tau", 1e-4),
        ("model.tiny.pixel_std", 1e-3),
        ("negatives.sample_temperature", 1e-4),
    ],
)
def test_the_smallest_divisor_does_not_overflow(name, least):
    RunConfig().with_changes({name: least})
    with np.errstate(all="raise"):
        assert np.isfinite(np.exp(np.float32(1)) * np.float32(1e6) / np.float32(least))
    with pytest.raises(UserError, match="it must be"):
        RunConfig().with_changes({name: least / 2})


def test_the_largest_betas_are_below_1_in_float32():
    config = RunConfig().with_changes({"optimizer.b1": 0.999999, "optimizer.b2": 0.999999})
    assert np.float32(config.optimizer.b1) < 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.image_size", 65, r"data\.image_size is 65.*multiple of config\.model\.tiny\.patch"),
        ("model.tiny.width", 130, r"model\.tiny\.width is 130.*multiple of .*heads, 4"),
        ("model.tiny.cell_size", 6, r"patch_size is 16.*multiple of .*cell_size, 6"),
        ("model.attributes.width", 255, r"width is 255.*multiple of .*heads, 4"),
        ("negatives.lower", 0.6, r"negatives\.lower is 0\.6.*below"),
        ("negatives.upper", 1.5, r"quantile.*0 to 1"),
        ("negatives.lower", -0.1, r"quantile.*0 to 1"),
        ("total_stesp", 3, r"config\.total_stesp is not a field.*config\.total_steps\?"),
        ("model.tiny.depth", 3, r"config\.model\.tiny\.depth is not a field"),
    ],
)
def test_what_fields_may_not_be_together(name, value, message):
    with pytest.raises(UserError, match=message):
        RunConfig.of(by_hand(OLD | {name: value}))
    with pytest.raises(UserError, match=message):
        RunConfig().with_changes({name: value})


def test_a_run_from_before_a_field_goes_on():
    held = by_hand(OLD).to_dict()
    assert differences(RunConfig(), held) == []
    changed = RunConfig().with_changes({"features.dtype": "bfloat16"})
    assert differences(changed, held) == ["features.dtype: 'bfloat16' (not 'auto')"]


@pytest.mark.parametrize("name", OLD)
def test_a_missing_field_is_named(name):
    values = {key: value for key, value in OLD.items() if key != name}
    with pytest.raises(UserError, match=rf"^config\.{re.escape(name)} is missing"):
        RunConfig.of(by_hand(values))


def test_a_section_is_no_field():
    for changes in ({"model.tiny": 3}, {"model": {}}):
        with pytest.raises(UserError, match=r"is not a field of a config; did you mean"):
            RunConfig().with_changes(changes)


# ------------------------------------------------------------------------------------- conversions


def test_a_config_of_any_kind_becomes_the_same():
    config = RunConfig.of(shapes.get_config("hard,smoke"))
    assert RunConfig.of(config) is config
    for same in (
        config.to_dict(),
        config.to_config_dict(),
        json.loads(json.dumps(config.to_dict())),
    ):
        assert RunConfig.of(same) == config
    assert config.to_dict() == shapes.get_config("hard,smoke").to_dict()
    assert type(config.to_dict()["model"]["attributes"]["names"]) is tuple
    assert hash(config) == hash(RunConfig.of(config.to_dict()))
    assert config != RunConfig()


def test_one_made_by_its_constructor_is_checked_where_it_is_taken():
    wrong = dataclasses.replace(RunConfig(), total_steps=0)
    with pytest.raises(UserError, match=r"config\.total_steps is 0"):
        RunConfig.of(wrong)


def test_values_take_the_type_of_their_field():
    config = RunConfig.of(by_hand(OLD | {"loss.margin": 1, "model.frozen": ["vision"]}))
    assert type(config.loss.margin) is float
    assert config.model.frozen == ("vision",)


def test_changes_leave_the_config_as_it_was():
    config = RunConfig()
    changed = config.with_changes({"negatives.rule": "qure", "seed": 3})
    assert (changed.negatives.rule, changed.seed) == ("qure", 3)
    assert config == RunConfig()
    assert flatten(changed.to_dict()) == flatten(config.to_dict()) | {
        "negatives.rule": "qure",
        "seed": 3,
    }


def test_differences_of_some_roles():
    changes = {"seed": 1, "model.remat": True, "data.image_size": 128, "log_every": 3}
    config, held = RunConfig().with_changes(changes), RunConfig().to_dict()
    assert differences(config, held) == [
        *("data.image_size: 128 (not 64)", "model.remat: True (not False)", "seed: 1 (not 0)")
    ]
    assert differences(config, held, ("model",)) == ["data.image_size: 128 (not 64)"]
    # A saved config may be older or newer than this version.
    del held["model"]["frozen"]
    held["model"]["tiny"]["bias"], held["log_often"] = True, 1
    assert differences(config, held, ("model",)) == [
        "data.image_size: 128 (not 64)",
        "model.frozen: [] (not None)",
        "model.tiny.bias: None (not True)",
    ]
    assert "log_often: None (not 1)" in differences(config, held)


# --------------------------------------------------------------------------------------- processes


def run(*command, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "modules",
    [
        "configs.common, dqe_jax.config",
        # What scoring a file of predictions imports.
        "dqe_jax.cli.commands, dqe_jax.cli.evaluate, dqe_jax.config, dqe_jax.data.datasets, "
        "dqe_jax.evaluation.predictions, dqe_jax.evaluation.protocols, dqe_jax.evaluation.report",
    ],
)
def test_no_jax_is_imported(modules):
    heavy = ("jax", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "transformers")
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = run("-c", code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_copied_common_that_makes_every_field_by_hand_works(tmp_path):
    (tmp_path / "configs").mkdir()
    lines = [
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n    config = ConfigDict()"
    ]
    sections = dict.fromkeys(name.rsplit(".", 1)[0] for name in OLD if "." in name)
    lines += [f"    config.{section} = ConfigDict()" for section in sorted(sections)]
    lines += [f"    config.{name} = {value!r}" for name, value in OLD.items()]
    (tmp_path / "configs" / "common.py").write_text("\n".join([*lines, "    return config\n"]))
    (tmp_path / "configs" / "mine.py").write_text(
        "from configs import common\n\n\ndef get_config():\n    config = common.get_config()\n"
        "    config.model.initial_tau = 1e-40\n    return config\n"
    )
    for more, sentence in (
        ([], "config.model.initial_tau is 1e-40: it must be a number from 0.0001 to 10,000."),
        (["--config.model.initial_tau=1", "--config.num_devices=99"], "config.num_devices is 99"),
    ):
        done = run("-m", "dqe_jax.main", "--config=mine", "--workdir=run", *more, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert sentence in done.stderr


def test_helpfull_lists_every_field():
    done = run("-m", "dqe_jax.describe", "--helpfull")
    assert done.returncode == 0
    _, _, listed = done.stdout.partition("Fields of the config:")
    assert re.findall(r"^  --config\.([\w.]+)=", listed, re.MULTILINE) == list(FIELDS)
    plain = " ".join(listed.split())
    for one in FIELDS.values():
        assert " ".join(f"--config.{one.name}={one.default!r} {one.doc}".split()) in plain
    assert "--config.seed" not in run("-m", "dqe_jax.describe", "--help").stdout
    assert "--config.seed" not in run("-m", "dqe_jax.prepare", "--helpfull").stdout
