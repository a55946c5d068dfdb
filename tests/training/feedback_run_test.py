"""A run that starts from another one and learns from a log."""

import json
import logging

import jax
import numpy as np
import pytest
from PIL import Image

from dqe_jax.checkpoints.opened import open_model
from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data.feedback import Click, append
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training.loop import train_and_evaluate
from dqe_jax.training.session import Feedback
from dqe_jax.utils.errors import UserError

BANK = {
    "negatives.pool": "bank",
    "negatives.first_refresh": 0,
    "negatives.refresh_every": 2,
    "log_every": 1,
    "total_steps": 4,
    "eval_every": 4,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, prepared):
    """A run of a few steps, and a log over images of the validation split."""
    base = tmp_path_factory.mktemp("feedback-run")
    prepared(base)
    config = small_config(base / "prepared", **BANK)
    train_and_evaluate(config, base / "first")
    data = RunConfig.of(config).data
    held_out = splits.open_split(data, datasets.open_dataset(data), "validation")
    folder = base / "photos"
    folder.mkdir()
    for row in range(12):
        Image.fromarray(held_out.gallery[row]).save(folder / f"{row}.png")
    for i in range(4):
        for kind, image in (("pick", i + 4), ("reject", i + 8), ("reject", (i + 1) % 4)):
            one = Click(*(kind, "c", i, str(folder), (f"{i}.png",), "paint it red", f"{image}.png"))
            append(base / "log.jsonl", one, {})
    return base


def config_of(place, **changes):
    return small_config(place / "prepared", **{**BANK, **changes})


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_it_starts_from_the_run_and_takes_the_log(place):
    log = Feedback(place / "log.jsonl", 0.5)
    train_and_evaluate(config_of(place), place / "second", init=place / "first", feedback=log)
    first, second = (open_model(place / name) for name in ("first", "second"))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.params, second.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1  # it went on, and not from anywhere else
    steps = [line for line in lines(place / "second") if "loss" in line]
    assert steps[0]["negatives/rejected"] > 0
    assert steps[0]["negatives/drawn"] > 0
    # Interrupted, the same command goes on.
    arguments = {"init": place / "first", "feedback": log}
    train_and_evaluate(config_of(place), place / "parts", stop_at=2, **arguments)
    train_and_evaluate(config_of(place), place / "parts", **arguments)
    assert lines(place / "parts")[-1] == lines(place / "second")[-1]
    with pytest.raises(UserError, match="was trained on other data"):
        train_and_evaluate(config_of(place), place / "parts", init=place / "first")


@pytest.mark.slow
def test_rejections_push_images_away(place):
    """With rejections as the only mined negatives, their scores fall below the target's."""
    log = Feedback(place / "log.jsonl", 0.9)
    changes = {
        "negatives.per_query": 1,
        "loss.preference": 5.0,
        "total_steps": 30,
        "eval_every": 30,
        "checkpoint_every": 30,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 2,
    }
    train_and_evaluate(
        config_of(place, **changes), place / "pushed", init=place / "first", feedback=log
    )

    def gap(name):
        from dqe_jax.search.loading import load

        model = load(place / name, num_devices=1, batch_size=16)
        images = [str(place / "photos" / f"{i}.png") for i in range(12)]
        gallery = model.encode_gallery(images)
        queries = model.encode_query(images[:4], ["paint it red"] * 4).embedding
        scores = np.einsum("qd,nmd->qnm", queries, gallery).max(-1)
        return np.mean([scores[i, i + 4] - scores[i, i + 8] for i in range(4)])

    assert gap("pushed") > gap("first") + 0.05


@pytest.mark.slow
def test_without_a_bank_rejections_are_not_used(place, caplog):
    log = Feedback(place / "log.jsonl", 0.5)
    changes = {"negatives.pool": "batch", "total_steps": 2, "eval_every": 2}
    with caplog.at_level(logging.WARNING):
        train_and_evaluate(config_of(place, **changes), place / "batch", feedback=log)
    assert "What users rejected is not used" in caplog.text


@pytest.mark.slow
def test_a_model_of_another_config_is_refused(place):
    with pytest.raises(UserError, match=r"--init: .* it differs in model\.tiny\.width"):
        train_and_evaluate(
            config_of(place, **{"model.tiny.width": 96}), place / "other", init=place / "first"
        )
    with pytest.raises(UserError, match="there is no directory"):
        train_and_evaluate(config_of(place), place / "none", init=place / "nowhere")
