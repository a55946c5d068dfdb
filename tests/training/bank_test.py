"""Training against the bank: devices, snapshots, resuming, what is logged, and its errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dqe_jax.checkpoints import store
from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data.text import encode_wordings
from dqe_jax.data.tokenizer import train_word_tokenizer
from dqe_jax.feature_store.features import Features
from dqe_jax.method.batch import Batch
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.models import setup
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.training.bank import make_bank_keeper
from dqe_jax.training.bank_programs import rows_of_device
from dqe_jax.training.step import warmup_rule
from dqe_jax.utils.errors import UserError

BANK = {
    "negatives.pool": "bank",
    "negatives.first_refresh": 2,
    "negatives.refresh_every": 2,
    "loss.preference": 1.0,
    "total_steps": 6,
    "log_every": 1,
    "eval_every": 6,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("bank")
    prepared(base)
    return base


def config_of(base, **changes):
    return small_config(base / "prepared", **BANK | changes)


def lines_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def params_of(workdir, step=6):
    manager = store.open_for_reading(workdir)
    return flatten_dict(store.restore_params(manager, step), sep="/")


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=tolerance, err_msg=name)


# What is mined on 1 and 8 devices, `mining_test.py` compares; steps, `multi_process_test.py`.
@pytest.mark.slow
@pytest.mark.parametrize("mining", ["step", "refresh"])
def test_training_does_not_depend_on_devices(base, mining):
    runs = []
    for devices in (1, 8):
        config = config_of(base, num_devices=devices, **{"negatives.mining": mining})
        loop.train_and_evaluate(config, base / f"{mining}-{devices}")
        runs.append(base / f"{mining}-{devices}")
    assert_close(*map(params_of, runs), 1e-5)
    one, other = map(lines_of, runs)
    for step in one:
        for name, value in one[step].items():
            if name.startswith(("negatives/", "loss")):
                assert other[step][name] == pytest.approx(value, abs=1e-4), (step, name)
    assert "negatives/delta" not in one[2]  # no bank yet: InfoNCE alone
    assert all("negatives/delta" in one[step] for step in (3, 4, 5, 6))
    if mining == "step":
        assert all(one[step]["negatives/false"] <= 1 for step in (3, 6))


@pytest.mark.slow  # `fault_test.py` says the same of "step"
@pytest.mark.parametrize("mining", ["step", "refresh"])
def test_an_interrupted_run_goes_on_exactly(base, mining):
    bounds = {"negatives.bounds": "absolute", "negatives.lower": 0.05, "negatives.upper": 0.09}
    fields = {**bounds, "negatives.per_query": 2, "negatives.mining": mining}
    config = config_of(base, **fields)
    loop.train_and_evaluate(config, base / f"whole-{mining}")
    loop.train_and_evaluate(config, base / f"parts-{mining}", stop_at=3)  # between two refreshes
    loop.train_and_evaluate(config, base / f"parts-{mining}")
    one, other = (params_of(base / f"{name}-{mining}") for name in ("whole", "parts"))
    assert_close(one, other, 0)
    lines = lines_of(base / f"whole-{mining}")
    assert "negatives/delta" not in lines[2]  # no bank yet: InfoNCE alone
    assert all("negatives/delta" in lines[step] for step in (3, 4, 5, 6))
    for step in (3, 5):  # the bank is fresh: what was drawn lies in the zone
        assert 0.05 < lines[step]["negatives/delta"] <= 0.09


def test_mining_at_every_other_step(base):
    """Those between are steps of InfoNCE; a run that goes on keeps to the same ones."""
    config = config_of(base, **{"negatives.every": 2})
    loop.train_and_evaluate(config, base / "every", stop_at=3)
    loop.train_and_evaluate(config, base / "every")
    lines = lines_of(base / "every")
    assert {step for step in lines if "negatives/delta" in lines[step]} == {4, 6}
    for step in (3, 5):
        assert lines[step].keys() == lines[1].keys()
        assert not [name for name in lines[step] if name in ("loss/preference", "loss/margin")]


@pytest.mark.parametrize("warmup", ["random", pytest.param("rule", marks=pytest.mark.slow)])
def test_warm_up(base, warmup):
    config = config_of(base, **{"negatives.warmup": warmup})
    loop.train_and_evaluate(config, base / f"warm-{warmup}", stop_at=1)
    line = lines_of(base / f"warm-{warmup}")[1]
    assert "loss/preference" in line
    assert ("negatives/fallback" in line) == (warmup == "rule")


def test_infonce_has_no_warm_up():
    def rule_of(**changes):
        negatives = NegativesConfig(**{"warmup": "random", "pool": "bank", **changes})
        rule = warmup_rule(negatives)
        return rule and rule.name

    assert rule_of(rule="in_batch") is None
    assert rule_of(rule="trns") == "random"
    assert rule_of(rule="trns", pool="batch") == "trns"


@pytest.mark.slow
def test_both_sides_of_a_refresh_are_logged(base):
    refreshes = {"negatives.first_refresh": 1, "negatives.refresh_every": 3}
    loop.train_and_evaluate(config_of(base, log_every=100, **refreshes), base / "sides")
    assert sorted(lines_of(base / "sides")) == [1, 2, 4, 5, 6]


def keeper_of(config, model, split, text):
    """A keeper on 8 devices."""
    devices = jax.devices()[:8]
    features = Features(config, model, devices)
    return make_bank_keeper(config, model, split, text, devices, features)


@pytest.fixture(scope="module")
def keeper(base):
    """A keeper on 8 devices, its split, and parameters."""
    config = RunConfig.of(config_of(base, num_devices=8, **{"negatives.mining": "refresh"}))
    split = splits.open_split(config.data, datasets.open_dataset(config.data), "train")
    words = train_word_tokenizer(split.queries.texts, config.data.max_length)
    model = setup.model_of(config.model, config.data, words)
    text = encode_wordings(words, split, "forward")
    params = setup.init_params(model, config.model, config.data)
    keeper = keeper_of(config, model, split, text)
    keeper.refresh(params, 0)
    return keeper, split, model, params, text


def test_the_bank_holds_the_whole_gallery_in_its_order(keeper):
    keeper, split, model, params, _ = keeper
    tokens = np.asarray(keeper.bank.tokens)
    image_id = np.asarray(keeper.bank.image_id).ravel()
    count = len(split.gallery)
    assert tokens.shape[:2] == (8, rows_of_device(count, 8))
    np.testing.assert_array_equal(image_id[:count], split.gallery.image_ids)
    assert (image_id[count:] == -1).all()
    tokens = tokens.reshape(-1, *tokens.shape[2:])
    for row in (0, 1, count // 2, count - 1):
        image = split.gallery[row][None]
        expected = model.apply({"params": params}, image, method="encode_gallery")[0]
        np.testing.assert_allclose(tokens[row], expected, atol=1e-5)


def test_what_is_mined_at_a_refresh_is_never_a_known_positive(keeper):
    keeper, split, *_ = keeper
    rows, drawn = keeper.mined
    assert rows.shape == (len(split.queries), 16)
    assert drawn.all()
    assert rows.max() < len(split.gallery)
    known = splits.known_positive_ids(split)
    mined = split.gallery.image_ids[rows]
    assert not (mined[:, :, None] == known[:, None, :]).any()
    assert all(len(set(line)) == 16 for line in rows.tolist())
    spec = Batch.spec(queries=2, references=1, image_size=8, max_length=4, attributes=2)
    batch = keeper.add_mined(spec.replace(query=np.array([3, 1])))
    np.testing.assert_array_equal(batch.mined.rows[1], rows[1])


@pytest.mark.slow  # `train_step_test.py` and the next test have its parts
def test_an_oracle_trains_against_nothing_that_is_in_truth_valid(base):
    changes = {"negatives.rule": "hardest", "data.variant": "coarse_smoke"}
    share = {}
    for oracle in ("none", "mined"):
        config = config_of(base, **changes, **{"negatives.oracle": oracle})
        loop.train_and_evaluate(config, base / f"oracle-{oracle}")
        lines = lines_of(base / f"oracle-{oracle}")
        share[oracle] = [lines[step]["negatives/false"] for step in (3, 4, 5, 6)]
    assert max(share["none"]) > 0
    assert share["mined"] == [0] * 4


def test_an_oracle_mines_nothing_that_is_in_truth_valid(base, keeper):
    """With all but five images valid for each query, none but these are drawn."""
    held, split, model, params, text = keeper
    few = np.arange(5, len(split.gallery), dtype=np.int32)
    queries = dataclasses.replace(split.queries, relevant=[few] * len(split.queries))
    told = dataclasses.replace(split, queries=queries)
    config = RunConfig.of(config_of(base, num_devices=8, **{"negatives.oracle": "mined"}))
    mining = keeper_of(config, model, told, text)
    mining.bank = held.bank
    mined = mining.mine_all(params, jax.random.key(0), np.arange(40))
    assert mined.drawn.any()
    assert not (
        set(split.gallery.image_ids[mined.rows[mined.drawn]]) & set(split.gallery.image_ids[few])
    )


def test_an_oracle_needs_truth(base, monkeypatch):
    config = config_of(base, **{"negatives.oracle": "mined"})
    open_split = splits.open_split

    def without_truth(*args):
        split = open_split(*args)
        split.queries.relevant[:] = [np.zeros(0, np.int32)] * len(split.queries)
        return split

    monkeypatch.setattr(splits, "open_split", without_truth)
    with pytest.raises(UserError, match=r"negatives\.oracle is 'mined': shapes does not say which"):
        loop.train_and_evaluate(config, base / "no-truth")


def test_queries_are_embedded_as_the_model_does(keeper):
    keeper, split, model, params, text = keeper
    found = keeper.embed_queries(params, np.array([5, 0, 9]))
    for i, query in enumerate((5, 0, 9)):
        image = split.gallery[split.queries.reference[query]][None]
        out = model.apply({"params": params}, image, text.ids[query], method="encode_query")
        np.testing.assert_allclose(found[i], out.embedding[0], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"negatives.pool": "gallery"}, r"negatives\.pool is 'gallery': .* batch, bank"),
    ],
)
def test_errors(base, changes, words):
    with pytest.raises(UserError, match=words):
        RunConfig.of(config_of(base, **changes))


def test_a_bank_of_bfloat16(base, keeper):
    held, split, model, params, text = keeper
    config = RunConfig.of(config_of(base, num_devices=8, **{"negatives.bank_dtype": "bfloat16"}))
    rounded = keeper_of(config, model, split, text)
    rounded.refresh(params, 0)
    assert rounded.bank.tokens.dtype == "bfloat16"
    one, other = (np.asarray(bank.tokens, np.float32) for bank in (held.bank, rounded.bank))
    np.testing.assert_allclose(other, one, rtol=2**-8, atol=1e-6)
    assert (one != other).any()
