"""A batch in chunks (GradCache): the gradients of the whole batch, in the memory of a chunk."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig, check_batch
from dqe_jax.distributed import mesh
from dqe_jax.models import setup
from dqe_jax.models.build import BACKBONES
from dqe_jax.models.features import StoredText
from dqe_jax.performance.step_benchmark import random_batch
from dqe_jax.testing.small_models import VOCAB, build_small_model, small_model_config
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.training import state as states
from dqe_jax.training.step import make_step
from dqe_jax.utils.errors import UserError

# So that there are 16 units of the batches of FashionIQ.
REFERENCES = 32


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compilation is most of these tests' time, and no test here is about the compiler's work."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def gradients_of(config, devices):
    """Gradients and metrics of a step: those of an optimiser that adds what it is given."""
    model = build_small_model(config)
    params = setup.init_params(model, config.model, config.data, 0)
    moved = np.random.default_rng(1)  # heads that start at zero hide mistakes
    params = jax.tree.map(lambda x: x + (0.1 * moved.normal(size=x.shape)).astype(x.dtype), params)
    made = states.make_optimizer(config, params, devices)
    own = mesh.devices_of(devices)
    step = make_step(config, model, made, own)
    state = states.init_state(config, made, params, own)
    batch = random_batch(config, model, params)
    held = isinstance(batch.text, StoredText)
    ids = (batch.text.ids if held else batch.text) % (VOCAB - 1) + 1
    batch = batch.replace(text=StoredText(ids, batch.text.states) if held else ids)
    batch = mesh.shard(batch, devices)
    output = step(state, batch, np.zeros((devices, 1), np.int32))
    moments = output.state.opt_state.inner_state[1][0].mu  # of the first step: 1 - b1 of them
    return jax.device_get((moments, output.metrics))


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=() if name == "tiny" else pytest.mark.slow)
        for name in sorted(BACKBONES)
    ],
)
def test_gradients_are_those_of_the_whole_batch(backbone):
    """Of TRNS over the batch, with attribute weights; one device against chunks on eight."""
    changes = {
        **{"batch.references": REFERENCES, "batch.queries_per_reference": 2},
        **{"negatives.pool": "batch", "negatives.per_query": 4, "optimizer.clip_norm": 1e6},
        # All are in the zone: of noise, which looks all the same, ranks differ by rounding alone.
        **{"negatives.bounds": "absolute", "negatives.lower": -9.0, "negatives.upper": 9.0},
        **{"negatives.floor": -math.inf, "negatives.sample_temperature": 0.0},
        "loss.alignment": 0.1,
        "data.dataset": "fashioniq",  # its references have one query or two
        # Which is drawn for each chunk.
        **{"model.blip2.dropout": 0.0, "model.features.dropout": 0.0},
    }
    (whole, metrics), (own, values) = (
        gradients_of(small_model_config(backbone, **changes, **{"batch.chunks": chunks}), devices)
        for chunks, devices in ((1, 1), (2, 8))
    )
    size = max(np.abs(x).max() for x in jax.tree.leaves(whole))
    assert metrics["loss"] > 0
    assert size > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size), own, whole)
    metrics.pop("batch_r@1")  # likewise
    for name, value in metrics.items():
        assert values[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.slow  # three runs; the gradients of a step are compared always
def test_a_run_with_a_bank_is_the_same(tmp_path, prepared):
    """TRNS over the bank, refreshed twice; on two devices, and in chunks also on one."""
    prepared(tmp_path)
    fields = {
        **{"total_steps": 6, "log_every": 1, "eval_every": 6, "checkpoint_every": 6},
        **{"batch.references": 8, "optimizer.warmup_steps": 2, "eval.sheet_queries": 1},
        **{"negatives.pool": "bank", "negatives.first_refresh": 2, "negatives.refresh_every": 3},
    }
    lines = []
    for chunks, devices in ((1, 2), (4, 2), (4, 1)):
        workdir = tmp_path / f"run-{chunks}-{devices}"
        changes = {"batch.chunks": chunks, "num_devices": devices}
        config = small_config(tmp_path / "prepared", **fields, **changes)
        loop.train_and_evaluate(config, workdir)
        text = (workdir / "metrics.jsonl").read_text().splitlines()
        lines.append([line for line in map(json.loads, text) if "loss" in line])
    whole, *others = lines
    assert len(whole) == 6
    assert any("negatives/zone" in line for line in whole)
    for run in others:
        for line, again in zip(whole, run, strict=True):
            for name in ("loss", "grad_norm", "loss/preference", "negatives/zone"):
                if name in line:
                    assert again[name] == pytest.approx(line[name], rel=1e-4), (line["step"], name)


def temporary_bytes(references, chunks):
    """What XLA says that a step needs beside its arguments and results."""
    changes = {"batch.references": references, "batch.chunks": chunks, "negatives.pool": "batch"}
    config = load_config("shapes")
    config.update_from_flattened_dict(changes | {"data.image_size": 48})
    config = RunConfig.of(config)
    model = build_small_model(config)
    params = setup.param_shapes(model, config.model, config.data)
    made = states.make_optimizer(config, params, 1)
    devices = mesh.devices_of(1)
    state = states.TrainState(jax.ShapeDtypeStruct((), "int32"), params, made.shapes)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), random_batch(config, model, params)
    )
    stop = jax.ShapeDtypeStruct((1, 1), "int32")
    step = make_step(config, model, made, devices)
    return step.lower(state, batch, stop).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow  # compiles as a run does
def test_eight_times_the_batch_takes_the_same_memory():
    jax.config.update("jax_disable_most_optimizations", False)
    one, eight, whole = (temporary_bytes(*sizes) for sizes in ((16, 1), (128, 16), (128, 1)))
    print(f"{one / 1e6:.1f} MB for 16 references; {eight / 1e6:.1f} MB for 128 in 16 chunks")
    print(f"{whole / 1e6:.1f} MB for 128 references without chunks")
    assert eight <= one
    assert whole > 4 * one


def test_chunks_divide_the_references_of_a_device():
    config = small_model_config(**{"batch.references": 24, "batch.chunks": 3})
    check_batch(config, 8)
    with pytest.raises(UserError, match=r"config\.batch\.chunks is 3: it must divide the 4 refer"):
        check_batch(config, 6)
