"""A run that starts from the parameters of another: an aligned start, and queries of one part."""

import json
import logging

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dqe_jax.checkpoints.opened import open_model
from dqe_jax.config import RunConfig
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.training.start import open_start, start_from
from dqe_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    """`aligned/`: a run on captions with a query of text alone."""
    directory = tmp_path_factory.mktemp("start")
    prepared(directory)
    loop.train_and_evaluate(aligning(directory), directory / "aligned")
    return directory


def config_of(base, **changes):
    fields = {"total_steps": 2, "eval_every": 0, "checkpoint_every": 2, "num_devices": 1}
    return small_config(base / "prepared", **fields | {"eval.sheet_queries": 1} | changes)


def aligning(base):
    changes = {"data.queries": "captions", "model.query": "text", "negatives.rule": "in_batch"}
    changes |= {"model.attributes.enabled": False, "batch.queries_per_reference": 1}
    return config_of(base, **changes)


def flat(params):
    return {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}


def fresh(params):
    return jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), params)


def test_what_both_runs_have_is_taken(base, caplog):
    opened = open_model(base / "aligned")
    held = flat(opened.params)
    assert any(path.startswith("text_head_") for path in held)
    assert not any("composer" in path for path in held)  # it has none
    config = RunConfig.of(config_of(base, **{"init.run": str(base / "aligned")}))
    params = {**fresh(opened.params), "gates": {"kernel": np.full(3, 7.0)}}
    with caplog.at_level(logging.INFO):
        found = flat(start_from(config, params, opened.tokenizer))
    np.testing.assert_array_equal(found["gates/kernel"], [7, 7, 7])
    for path, x in held.items():
        np.testing.assert_array_equal(found[path], x)
    assert f"{len(held)} of {len(held) + 1} arrays of parameters start" in caplog.text
    # Tables of words are of no use with other words.
    other = start_from(config, fresh(opened.params), _Other())
    words = {p for p, x in flat(other).items() if (x == 7).all()}
    assert words
    assert all("words" in path.split("/") for path in words)


class _Other:
    """A tokenizer of other words."""

    def to_str(self):
        return "other"


def test_without_a_run_parameters_stay(base):
    config, params = RunConfig.of(config_of(base)), {"a": np.zeros(2)}
    assert start_from(config, params, _Other()) is params


def test_two_runs_to_start_from_are_refused(tmp_path):
    """Whether they are there or not."""
    config = RunConfig.of(config_of(tmp_path, **{"init.run": "one"}))
    with pytest.raises(UserError, match=r"--init=two and config\.init\.run=one both say"):
        open_start("two", config)


@pytest.mark.slow
def test_a_run_goes_on_from_an_aligned_one(base, caplog):
    config = config_of(base, **{"init.run": str(base / "aligned")})
    with caplog.at_level(logging.INFO):
        metrics = loop.train_and_evaluate(config, base / "run")
    assert metrics == {} or metrics
    assert "arrays of parameters start as those of step 2 of" in caplog.text
    held = json.loads((base / "run" / "config.json").read_text())
    assert held["init"]["run"] == str(base / "aligned")


def test_a_run_that_cannot_be_a_start(base):
    config = RunConfig.of(config_of(base, **{"init.run": str(base / "aligned")}))
    with pytest.raises(UserError, match=r"config\.init\.run: .* no parameter of the same path"):
        start_from(config, {"other": np.zeros(2)}, _Other())
    missing = RunConfig.of(config_of(base, **{"init.run": str(base / "nothing")}))
    with pytest.raises(UserError, match=r"there is no directory .*nothing"):
        start_from(missing, {"other": np.zeros(2)}, _Other())


@pytest.mark.parametrize("query", ["text", "image", "sum", "product"])
def test_a_query_without_a_composer_weighs_nothing(base, query):
    with pytest.raises(UserError, match=rf"config\.model\.query is '{query}': .*in_batch"):
        RunConfig.of(config_of(base, **{"model.query": query}))
