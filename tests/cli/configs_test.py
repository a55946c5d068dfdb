"""Config files: every file and combination of variants; every field is read."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import common
from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig, check_batch, fields
from dqe_jax.data import datasets
from dqe_jax.feature_store.features import sizes_of
from dqe_jax.models import build, setup
from dqe_jax.training import loop, session, step
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs"
FIELDS = fields()
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
    if name.startswith(("model.clip.", "model.siglip.", "model.dino.", "model.blip2."))
    or name.removeprefix("model.") in ("weights", "tokenizer", "attention", "remat", "scan_layers")
}


# Fields that only a bank reads, beside `RunConfig.of`: `bank_test.py` sees that it does.
OF_BANK = {
    "negatives.mining",
    "negatives.first_refresh",
    "negatives.refresh_every",
    "negatives.every",
    "negatives.warmup",
    "negatives.bank_dtype",
}
# Fields that are read where a tower is frozen: `feature_store/run_test.py` sees that they are.
OF_FEATURES = {"features.dtype", "features.directory"}
# Fields of the backbone on features from outside.
OF_GIVEN = {name for name in FIELDS if name.startswith("model.features.")}
# Fields of adapters, of which a run has none with the rank of 0: `models/lora_test.py` has some.
OF_ADAPTERS = {"model.lora.alpha", "model.lora.targets", "model.lora.layers"}


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
EXCLUSIVE = {
    "fiq_siglip": ("vit_l_16", "so400m_14"),
    "shapes": ("hard", "coarse"),
    "triplets": ("tiny", "pretrained"),
    "zero_shot": importlib.import_module("configs.zero_shot").BENCHMARKS,
}
COMBINATIONS = [
    (name, ",".join(chosen))
    for name in NAMES
    for number in range(len(variants_of(name)) + 1)
    for chosen in itertools.combinations(variants_of(name), number)
    if len(set(EXCLUSIVE.get(name, ())).intersection(chosen)) < 2
]


def config_of(name: str, variants: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(variants)


# ------------------------------------------------------------------------------------ every config


@pytest.mark.parametrize(("name", "variants"), COMBINATIONS)
def test_every_combination_of_variants_is_a_config(name, variants):
    config = config_of(name, variants)
    typed = RunConfig.of(config)
    assert typed.to_dict() == config.to_dict()
    assert config.data.dataset in datasets.DATASETS
    backwards = config_of(name, ",".join(reversed(variants.split(","))))
    assert backwards.to_dict() == config.to_dict()
    spaced = config_of(name, variants.replace(",", " , "))
    assert spaced.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("typed", "name", "variants"),
    [
        ("shapes", "shapes", ""),
        ("shapes:hard,smoke", "shapes", "hard,smoke"),
        ("configs/fiq.py:smoke", "fiq", "smoke"),
        (str(FOLDER / "cirr.py"), "cirr", ""),
    ],
)
def test_a_config_is_loaded_by_what_a_user_types(typed, name, variants, tmp_path, monkeypatch):
    expected = config_of(name, variants)
    for directory in (ROOT, tmp_path):
        monkeypatch.chdir(directory)
        config = load_config(typed)
        assert config.to_dict() == expected.to_dict()
    with pytest.raises(AttributeError, match="total_step"):
        config.total_step = 3


def test_a_config_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    text = "from configs import common\n\n\ndef get_config():\n    config = common.get_config()\n"
    (folder / "shapes.py").write_text(f"{text}    config.seed = 77\n    return config\n")
    assert load_config("shapes").seed == 77
    with pytest.raises(UserError, match=r"no config 'nothing': name a file, or one of circo, cirr"):
        load_config("nothing")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_smoke_variant_of_a_few_steps(name):
    assert "smoke" in variants_of(name)
    smoke, whole = config_of(name, "smoke"), config_of(name)
    assert smoke.total_steps <= 20 < whole.total_steps
    assert smoke.data.dataset == whole.data.dataset
    check_batch(RunConfig.of(smoke), 8)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_changes_something_and_is_documented(name):
    module = importlib.import_module(f"configs.{name}")
    for variant in variants_of(name):
        assert config_of(name, variant).to_dict() != config_of(name).to_dict()
        assert re.search(rf"[:,`]{variant}\b", module.__doc__)
        assert f"`{variant}`" in module.get_config.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_variant_is_named(name):
    with pytest.raises(ValueError, match=r"unknown variant nonsense.*smoke"):
        config_of(name, "nonsense")


@pytest.mark.parametrize(("name", "variants"), EXCLUSIVE.items())
def test_variants_that_do_not_go_together_are_named(name, variants):
    with pytest.raises(ValueError, match=f"{' and '.join(variants)} of the config do not go"):
        config_of(name, ",".join(variants))


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_made_anew(name):
    first = config_of(name)
    first.total_steps += 1
    assert config_of(name).total_steps == first.total_steps - 1


# --------------------------------------------------------------------------- fields that are read


# What makes, checks or copies a config as a whole: its reads do not count.
WHOLE = (
    (RunConfig, "of"),
    (RunConfig, "to_dict"),
    (RunConfig, "with_changes"),
    (dataclasses, "replace"),
)


def sections(config: type, prefix: str = "") -> Iterator[tuple[type, str]]:
    """The dataclasses of a config, each of which stands at one place, with its prefix."""
    yield config, prefix
    for own in dataclasses.fields(config):
        if dataclasses.is_dataclass(own.default_factory):
            yield from sections(own.default_factory, f"{prefix}{own.name}.")


@contextlib.contextmanager
def recorded_reads():
    """The fields that are read of any config in the block; copies of the whole do not count."""
    reads: set[str] = set()
    whole = []

    def recording(prefix, names):
        def get(self, name):
            if name in names and not whole:
                reads.add(prefix + name)
            return object.__getattribute__(self, name)

        return get

    def silent(function):
        def call(*args, **kwargs):
            whole.append(function)
            try:
                return function(*args, **kwargs)
            finally:
                whole.pop()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for section, prefix in sections(RunConfig):
            names = {own.name for own in dataclasses.fields(section)}
            patch.setattr(section, "__getattribute__", recording(prefix, names))
        for owner, name in WHOLE:
            function = silent(getattr(owner, name))
            patch.setattr(owner, name, staticmethod(function) if name == "of" else function)
        yield reads


@pytest.fixture
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_the_recorder_sees_reads_and_not_copies():
    config = RunConfig()
    with recorded_reads() as reads:
        RunConfig.of(config).to_dict()
        changed = config.with_changes({"model.tiny.width": 64})
        assert not reads
        assert changed.model.tiny.width == config.seed + 64
        assert dataclasses.replace(config.negatives, rule="random").rule == "random"
        assert dataclasses.asdict(config.loss)["margin"] == 0.1
    expected = {"model", "model.tiny", "model.tiny.width", "seed", "negatives", "negatives.rule"}
    losses = {f"loss.{own.name}" for own in dataclasses.fields(config.loss)}
    assert reads == expected | {"loss"} | losses
    before = set(reads)
    assert config.num_devices == 0  # outside nothing is recorded
    assert reads == before


def test_every_field_is_read_by_a_run(tmp_path, quick_compilation, monkeypatch):
    config = config_of("shapes", "smoke")
    config.total_steps = 2
    config.num_devices = 1
    config.batch.references = 2
    config.batch.queries_per_reference = 2
    config.eval.sheet_queries = 1
    config.data.prepared_dir = str(tmp_path / "data")
    # Not a remembered step, nor one that is remembered: that would read all fields of a model.
    monkeypatch.setattr(session, "make_step", step.make_step)
    with recorded_reads() as reads:
        metrics = loop.train_and_evaluate(config, tmp_path / "run")
    assert metrics["queries"] > 0
    unread = set(FIELDS) - reads
    known = OF_PRETRAINED | OF_BANK | OF_FEATURES | OF_GIVEN | OF_ADAPTERS
    assert unread == set(NOT_READ) | known, (
        "a field that nothing reads, or one that is read after all"
    )


def test_fields_of_the_pretrained_backbones_are_read_by_them():
    read = set()
    for backbone in ("clip", "siglip", "dino", "blip2"):
        config = RunConfig().with_changes({"model.backbone": backbone, "data.image_size": 224})
        with recorded_reads() as reads:
            pretrained = setup.open_weights(config.model, config.data)
            build.build_model(
                config.model,
                vocab_size=1,
                max_length=16,
                image_size=224,
                sizes=pretrained.sizes,
            )
            with pytest.raises(UserError, match=r"config\.model\.tokenizer is empty"):
                setup.tokenizer_of(config.model, config.data, pretrained)
        read |= reads
    assert read >= OF_PRETRAINED


def test_fields_of_the_backbone_on_features_are_read_by_it(tmp_path):
    encoders = "dqe_jax.testing.encoders"
    changes = {"images": (f"{encoders}:images",), "texts": (f"{encoders}:texts",)}
    config = RunConfig().with_changes(
        {"model.backbone": "features", "features.directory": str(tmp_path)}
        | {f"model.features.{name}": value for name, value in changes.items()}
    )
    with recorded_reads() as reads:
        sizes = sizes_of(config, None)
        build.build_model(config.model, vocab_size=1, max_length=16, image_size=64, sizes=sizes)
    assert reads >= OF_GIVEN


def test_fields_of_the_other_data_set_are_read_by_it(tmp_path, monkeypatch):
    pytest.importorskip("dqe_jax.data.builders.fashion_products")
    from dqe_jax.data.builders import fashion_products

    changes = {"dataset": "fashion_products", "data_dir": "somewhere"}
    changes["prepared_dir"] = str(tmp_path)
    config = RunConfig().with_changes({f"data.{name}": x for name, x in changes.items()})
    told = {}

    def make_builder(**arguments):
        told.update(arguments)
        raise UserError("far enough")

    monkeypatch.setattr(fashion_products, "make_builder", make_builder)
    with recorded_reads() as reads, pytest.raises(UserError, match="far enough"):
        datasets.open_dataset(config.data)
    assert set(NOT_READ) <= reads
    assert told["raw_dir"] == "somewhere"
    assert told["relevance"] == "fine"
    assert told["max_bad_fraction"] == config.data.max_bad_fraction


# ------------------------------------------------------------------------------ opening data sets


def test_a_prepared_dir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of("shapes", "smoke")
    config.data.prepared_dir = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match=r"config\.data\.prepared_dir: cannot make .*below"):
        datasets.open_dataset(RunConfig.of(config).data)


def test_raw_data_that_is_not_named_is_asked_for(tmp_path):
    config = common.get_config()
    config.data.dataset = "fashion_products"
    config.data.prepared_dir = str(tmp_path)
    with pytest.raises(UserError, match="--data_dir"):
        datasets.open_dataset(RunConfig.of(config).data)


@pytest.mark.parametrize("variant", ["hard", "smoke", "coarse_smoke"])
def test_a_variant_that_fashion_products_does_not_have_is_named(tmp_path, variant):
    config = config_of("fashion_products")
    config.data.data_dir = str(tmp_path)
    config.data.prepared_dir = str(tmp_path / "data")
    config.data.variant = variant
    with pytest.raises(UserError, match=rf"variant is '{variant}': .* has 'plain' and 'coarse'"):
        datasets.open_dataset(RunConfig.of(config).data)


def test_a_size_that_a_generated_data_set_does_not_have_is_refused(tmp_path):
    config = config_of("shapes", "smoke")
    config.data.image_size = 32
    config.data.prepared_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"config\.data\.image_size"):
        datasets.open_dataset(RunConfig.of(config).data)
