"""Stores that are computed ahead, listed and deleted."""

import logging
import os
import shutil

import pytest

from dqe_jax.feature_store import manage
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("manage")
    prepared(base)
    return base


def config_of(base, **changes):
    fields = {"total_steps": 1, "eval_every": 0, "checkpoint_every": 1}
    fields |= {"model.frozen": ("vision",), "data.augment": "flip"}
    return small_config(base / "prepared", **fields | changes)


def test_what_is_computed_ahead_a_run_does_not_compute(base, caplog):
    manage.compute(config_of(base), ["train"])
    with caplog.at_level(logging.INFO):
        manage.compute(config_of(base))  # the other splits that a run needs
    rows = int(caplog.text.rpartition(" tower makes of ")[2].split()[0].replace(",", ""))
    assert f"; {rows}" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        loop.train_and_evaluate(config_of(base), base / "run")
    assert "; 0 of them were computed now" in caplog.text
    assert "image tower is not computed in each step" in caplog.text

    (held,) = manage.list_stores(base / "prepared" / "features")
    assert (held.kind, held.backbone, held.dtype) == ("image", "tiny", "float32")
    assert held.rows == rows
    assert held.shape == "tokens 9x32"
    assert held.nbytes > held.rows * 9 * 32 * 4
    caplog.clear()
    with caplog.at_level(logging.INFO):
        manage.show_stores(config_of(base))
    assert held.name in caplog.text
    assert f"{held.rows:,}" in caplog.text
    with pytest.raises(UserError, match=rf"--delete=none: there are no such .* are {held.name}\."):
        manage.delete_stores(config_of(base), ["none"])
    with caplog.at_level(logging.INFO):
        manage.delete_stores(config_of(base), ["all"])
        assert f"1 deleted: {held.name}." in caplog.text
        assert manage.list_stores(base / "prepared" / "features") == []
        manage.show_stores(config_of(base))
        assert "There are no features in " in caplog.text


def test_directories_that_are_no_stores_are_passed_over(tmp_path):
    facts = (
        '{"kind": "image", "backbone": "clip", "arrays": {"pooled": {"shape": %s, "dtype": %s}}}'
    )
    for name, text in (
        *(("a", "{"), ("b", "[]"), ("c", '{"kind": "image"}'), ("deep", "[" * 10**5)),
        *(("odd", facts % ("[6]", '"no-dtype"')), ("odder", facts % ("[1e400]", '"float32"'))),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").write_text(text)
    (tmp_path / "d").mkdir()
    (tmp_path / "e").write_text("")
    (tmp_path / "f").mkdir()
    os.mkfifo(tmp_path / "f" / "store.json")  # which would be read for ever
    (tmp_path / "number").mkdir()
    (tmp_path / "number" / "store.json").write_text(
        facts.replace('"clip"', "1.5") % ("[6]", '"float32"')
    )
    (stored,) = manage.list_stores(tmp_path)  # whose text is the table's
    assert stored.backbone == "1.5"
    shutil.rmtree(tmp_path / "number")
    assert manage.list_stores(tmp_path) == []
    assert manage.list_stores(tmp_path / "none") == []


def test_a_config_without_frozen_towers_has_nothing_to_store(base):
    with pytest.raises(
        UserError,
        match=r"config\.model\.frozen names no whole tower",
    ):
        manage.compute(config_of(base, **{"model.frozen": ()}))
