"""Configs: every file and combination of variants; every field is documented and read."""

from __future__ import annotations

import ast
import contextlib
import importlib
import itertools
import re
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import common
from dqe_jax import models
from dqe_jax.config import (
    FIELDS,
    FREE_FIELDS,
    MODEL_FIELDS,
    check_batch,
    check_config,
    differences,
    flatten,
)
from dqe_jax.data import datasets
from dqe_jax.models import setup
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
NAMES = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem not in ("__init__", "common"))
# Fields that a run on `shapes` does not read, with the reason.
NOT_READ = {
    "data.data_dir": "raw data: fashion_products",
    "data.max_bad_fraction": "raw data: fashion_products",
    "data.preprocess": "raw data: fashion_products",
}
# Fields that a run of the tiny backbone does not read.
OF_PRETRAINED = {
    name
    for name in FIELDS
    if name.startswith(("model.clip.", "model.blip2."))
    or name.removeprefix("model.") in ("weights", "tokenizer", "attention", "remat", "scan_layers")
}


# Fields that only a bank reads, beside `check_config`: tests/bank_test.py sees that it does.
OF_BANK = {
    "negatives.mining",
    "negatives.first_refresh",
    "negatives.refresh_every",
    "negatives.warmup",
    "negatives.bank_dtype",
}


def variants_of(name: str) -> tuple[str, ...]:
    """The variants that a config's file accepts, as it tells `parse_variants`."""
    told = []
    module = importlib.import_module(f"configs.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "parse_variants", lambda arg, known: told.append(known) or set())
        module.get_config()
    (known,) = told
    return known


# Variants of a config that do not go together.
EXCLUSIVE = {"shapes": {"hard", "coarse"}}
COMBINATIONS = [
    (name, ",".join(chosen))
    for name in NAMES
    for number in range(len(variants_of(name)) + 1)
    for chosen in itertools.combinations(variants_of(name), number)
    if len(EXCLUSIVE.get(name, set()).intersection(chosen)) < 2
]


def config_of(name: str, variants: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(variants)


# ------------------------------------------------------------------------------------ every config


@pytest.mark.parametrize(("name", "variants"), COMBINATIONS)
def test_every_combination_of_variants_is_a_config(name, variants):
    config = config_of(name, variants)
    check_config(config)
    assert set(flatten(config.to_dict())) == set(FIELDS)
    assert config.data.dataset in datasets.DATASETS
    backwards = config_of(name, ",".join(reversed(variants.split(","))))
    assert backwards.to_dict() == config.to_dict()
    spaced = config_of(name, variants.replace(",", " , "))
    assert spaced.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_smoke_variant_of_a_few_steps(name):
    assert "smoke" in variants_of(name)
    smoke, whole = config_of(name, "smoke"), config_of(name)
    assert smoke.total_steps <= 20 < whole.total_steps
    assert smoke.data.dataset == whole.data.dataset
    check_batch(smoke, 8)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_changes_something_and_is_documented(name):
    module = importlib.import_module(f"configs.{name}")
    for variant in variants_of(name):
        assert differences(config_of(name, variant).to_dict(), config_of(name).to_dict())
        assert re.search(rf"[:,`]{variant}\b", module.__doc__)
        assert f"`{variant}`" in module.get_config.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_variant_is_named(name):
    with pytest.raises(ValueError, match=r"unknown variant nonsense.*smoke"):
        config_of(name, "nonsense")


@pytest.mark.parametrize(("name", "variants"), EXCLUSIVE.items())
def test_variants_that_do_not_go_together_are_named(name, variants):
    with pytest.raises(ValueError, match="hard and coarse of the config do not go together"):
        config_of(name, ",".join(variants))


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_made_anew(name):
    first = config_of(name)
    first.total_steps += 1
    assert config_of(name).total_steps == first.total_steps - 1


# -------------------------------------------------------------------------------------- the fields


def test_common_has_the_fields_of_the_check_in_both_directions():
    assert set(flatten(common.get_config().to_dict())) == set(FIELDS)
    check_config(common.get_config())


def test_free_and_model_fields_exist():
    assert set(FREE_FIELDS) <= set(FIELDS)
    for prefix in MODEL_FIELDS:
        assert any(name.startswith(prefix) for name in FIELDS)


def test_every_field_has_a_comment_above_it_or_its_group():
    """A group is consecutive lines: a comment, then fields; a blank line or a section ends it."""
    source = (FOLDER / "common.py").read_text()
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_config"
    )
    lines = source.splitlines()
    fields, commented = 0, False
    for line in lines[function.body[1].lineno : function.end_lineno]:
        text = line.strip()
        if text.startswith("#"):
            assert re.match(r"# [A-Za-z\"0-9].*", text)
            commented = True
        elif not text:
            commented = False
        elif text.endswith("ConfigDict()"):
            pass  # a section: its own comment may stand for its fields
        elif text != "return config":
            assert commented, f"no comment above {text!r}"
            fields += 1
    assert fields == len(FIELDS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("total_steps", 0), ("total_steps", 1.5), ("seed", -1), ("seed", True)),
        *(("data.image_size", 8), ("data.dataset", "photos"), ("data.augment", "rotate")),
        *(("data.max_bad_fraction", 1.1), ("data.cache_images", 1), ("data.lexicon", 3)),
        *(("model.dtype", "float16"), ("model.initial_tau", 0.0), ("model.tiny.dropout", 1.0)),
        *(("model.attributes.names", ()), ("model.attributes.names", (1,))),
        *(("negatives.rule", "hard"), ("negatives.bounds", "rank"), ("negatives.per_query", 0)),
        ("negatives.oracle", "trns"),
        *(("loss.margin", -0.1), ("loss.in_batch", float("nan")), ("optimizer.clip_norm", 0.0)),
        *(("eval.top_k", 49), ("eval.batch_size", 0), ("log_every", 0), ("keep_checkpoints", 0)),
        ("optimizer.learning_rate", float("inf")),
    ],
)
def test_what_a_field_may_not_be(name, value):
    flat = flatten(common.get_config().to_dict()) | {name: value}
    config = ConfigDict(nested(flat))
    with pytest.raises(UserError, match=rf"^config\.{re.escape(name)} is .*: it must be "):
        check_config(config)


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
        (
            "total_stesp",
            3,
            r"config\.total_stesp is not a field.*config\.total_steps\?",
        ),
        ("model.tiny.depth", 3, r"config\.model\.tiny\.depth is not a field"),
    ],
)
def test_what_fields_may_not_be_together(name, value, message):
    flat = flatten(common.get_config().to_dict()) | {name: value}
    with pytest.raises(UserError, match=message):
        check_config(ConfigDict(nested(flat)))


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name):
    flat = flatten(common.get_config().to_dict())
    del flat[name]
    with pytest.raises(UserError, match=rf"^config\.{re.escape(name)} is missing"):
        check_config(ConfigDict(nested(flat)))


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tuple(value) if isinstance(value, list) else value
    return tree


# --------------------------------------------------------------------------- fields that are read


@contextlib.contextmanager
def recorded_reads(config: ConfigDict):
    """The fields of a config that are read in the block; copies of the whole do not count."""
    names: dict[int, str] = {}
    reads: set[str] = set()
    copying = []

    def name_all(node, prefix):
        names[id(node)] = prefix
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                name_all(value, f"{prefix}{key}.")

    name_all(config, "")
    get, to_dict = ConfigDict.__getitem__, ConfigDict.to_dict

    def recording_get(self, key):
        if not copying and id(self) in names:
            reads.add(names[id(self)] + key)
        return get(self, key)

    def silent_to_dict(self, *args, **kwargs):
        copying.append(self)
        try:
            return to_dict(self, *args, **kwargs)
        finally:
            copying.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigDict, "__getitem__", recording_get)
        patch.setattr(ConfigDict, "to_dict", silent_to_dict)
        yield reads


@pytest.fixture
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_the_recorder_sees_reads_and_not_copies():
    config = common.get_config()
    with recorded_reads(config) as reads:
        config.to_dict()
        assert not reads
        assert config.model.tiny.width == config["seed"] + 128
        assert dict(config.loss)["margin"] == 0.1
    expected = {"model", "model.tiny", "model.tiny.width", "seed", "loss"}
    assert reads == expected | {f"loss.{name}" for name in config.loss}


def test_every_field_is_read_by_a_run(tmp_path, quick_compilation, monkeypatch):
    config = config_of("shapes", "smoke")
    config.total_steps = 2
    config.num_devices = 1
    config.batch.references = 2
    config.batch.queries_per_reference = 2
    config.eval.sheet_queries = 1
    config.data.prepared_dir = str(tmp_path / "data")
    check_config(config)
    monkeypatch.setattr(loop, "check_config", lambda config: None)  # it reads them all
    with recorded_reads(config) as reads:
        metrics = loop.train_and_evaluate(config, tmp_path / "run")
    assert metrics["queries"] > 0
    unread = set(FIELDS) - reads
    assert unread == set(NOT_READ) | OF_PRETRAINED | OF_BANK, (
        "a field that nothing reads, or one that is read after all"
    )


def test_fields_of_the_pretrained_backbones_are_read_by_them():
    read = set()
    for backbone in ("clip", "blip2"):
        config = common.get_config()
        config.model.backbone = backbone
        config.data.image_size = 224
        with recorded_reads(config) as reads:
            pretrained = setup.open_weights(config)
            models.build_model(
                config.model,
                vocab_size=1,
                max_length=16,
                image_size=224,
                sizes=pretrained.sizes,
            )
            with pytest.raises(UserError, match=r"config\.model\.tokenizer is empty"):
                setup.tokenizer_of(config, pretrained)
        read |= reads
    assert read >= OF_PRETRAINED


def test_fields_of_the_other_data_set_are_read_by_it(tmp_path, monkeypatch):
    pytest.importorskip("dqe_jax.data.builders.fashion_products")
    from dqe_jax.data.builders import fashion_products

    config = common.get_config()
    config.data.dataset = "fashion_products"
    config.data.data_dir = "somewhere"
    config.data.prepared_dir = str(tmp_path)
    told = {}

    def make_builder(**arguments):
        told.update(arguments)
        raise UserError("far enough")

    monkeypatch.setattr(fashion_products, "make_builder", make_builder)
    with recorded_reads(config) as reads, pytest.raises(UserError, match="far enough"):
        datasets.open_dataset(config.data)
    assert set(NOT_READ) <= reads
    assert told["raw_dir"] == "somewhere"
    assert told["relevance"] == "fine"
    assert told["max_bad_fraction"] == config.data.max_bad_fraction


# ------------------------------------------------------------------------------ opening data sets


def test_every_data_set_of_the_check_can_be_opened():
    check = FIELDS["data.dataset"]
    assert all(check.test(name) for name in datasets.DATASETS)
    assert check.words == "one of " + ", ".join(datasets.DATASETS)


def test_a_prepared_dir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of("shapes", "smoke")
    config.data.prepared_dir = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"config\.data\.prepared_dir: cannot make .*below"):
        datasets.open_dataset(config.data)


def test_raw_data_that_is_not_named_is_asked_for(tmp_path):
    config = common.get_config()
    config.data.dataset = "fashion_products"
    config.data.prepared_dir = str(tmp_path)
    with pytest.raises(UserError, match="--data_dir"):
        datasets.open_dataset(config.data)


def test_variants_of_the_check_are_those_of_shapes():
    from dqe_jax.data.builders import shapes

    check = FIELDS["data.variant"]
    assert all(check.test(config.name) for config in shapes.CONFIGS)
    assert check.words.count(",") == len(shapes.CONFIGS) - 1


@pytest.mark.parametrize("variant", ["hard", "smoke", "coarse_smoke"])
def test_a_variant_that_fashion_products_does_not_have_is_named(tmp_path, variant):
    config = config_of("fashion_products")
    config.data.data_dir = str(tmp_path)
    config.data.prepared_dir = str(tmp_path / "data")
    config.data.variant = variant
    with pytest.raises(UserError, match=rf"variant is '{variant}': .* has 'plain' and 'coarse'"):
        datasets.open_dataset(config.data)


def test_a_size_that_a_generated_data_set_does_not_have_is_refused(tmp_path):
    config = config_of("shapes", "smoke")
    config.data.image_size = 32
    config.data.prepared_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"config\.data\.image_size"):
        datasets.open_dataset(config.data)
