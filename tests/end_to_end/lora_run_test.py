"""A run with adapters: it goes on exactly, trains nothing else, and its export is merged."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dqe_jax.checkpoints import store
from dqe_jax.checkpoints.export import export_run
from dqe_jax.checkpoints.opened import open_model
from dqe_jax.config import RunConfig
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.models import lora
from dqe_jax.models.weights import initial
from dqe_jax.search.loading import load
from dqe_jax.testing.pretrained import copy_weights
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
pytestmark = pytest.mark.slow


def config_of(base, **changes):
    fields = {
        "total_steps": 4,
        "checkpoint_every": 2,
        "eval_every": 4,
        "data.max_length": 12,
        "model.backbone": "clip",
        "model.weights": str(base / "clip"),
        "model.clip.variant": "auto",
        "model.clip.composer_width": 16,
        "model.clip.composer_heads": 2,
        "model.frozen": ("vision", "text", "logit_scale"),
        "model.frozen_dtype": "bfloat16",
        "model.attributes.width": 8,
        "model.lora.rank": 2,
        "optimizer.learning_rate": 1e-2,
        "optimizer.ema_decay": 0.9,
    }
    return small_config(base / "prepared", **fields | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("lora")
    prepared(base)
    copy_weights(GOLDEN / "clip", "clip", base / "clip")
    config = config_of(base)
    loop.train_and_evaluate(config, base / "run", stop_at=2)
    metrics = loop.train_and_evaluate(config, base / "run")
    return base, config, metrics


def params_of(workdir):
    manager = store.open_for_reading(workdir)
    _, params = store.read_chosen(manager, None, lambda n: store.restore_params(manager, n))
    return flatten_dict(params, sep="/")


def test_it_goes_on_exactly_and_kernels_stay(run):
    base, config, metrics = run
    straight = loop.train_and_evaluate(config, base / "straight")
    assert metrics == straight
    one, other = params_of(base / "run"), params_of(base / "straight")
    assert one.keys() == other.keys()
    for path, x in one.items():
        np.testing.assert_array_equal(x, other[path])
    held = flatten_dict(initial.open_pretrained(RunConfig.of(config).model).read(), sep="/")
    for path in held:
        own = one[f"backbone/{path}"]
        if path.startswith(("vision/encoder", "text/encoder")):
            np.testing.assert_array_equal(own, held[path].astype(own.dtype))
    adapters = {path: x for path, x in one.items() if lora.is_adapter(path)}
    assert len(adapters) == 5 * 2 * 2  # of five layers in two towers: query and value, A and B
    assert all(np.abs(x).max() > 0 for x in adapters.values())


def test_export_and_run_are_one_model(run, tmp_path):
    base, config, metrics = run
    export_run(base / "run", tmp_path / "out")
    opened, exported = open_model(base / "run"), open_model(tmp_path / "out")
    assert opened.fingerprint == exported.fingerprint
    assert exported.config.model.lora.rank == 0
    assert not any(map(lora.is_adapter, flatten_dict(exported.params, sep="/")))
    assert any(
        map(
            lora.is_adapter,
            flatten_dict(open_model(base / "run", keep_adapters=True).params, sep="/"),
        )
    )
    # What the run evaluates, unmerged, is what the export gives.
    rows = ("text", "image", "sum", "product")
    again = evaluate_checkpoint(
        config, base / "run", output=tmp_path / "eval", zero_shot=rows, page=True
    )
    assert again.metrics == pytest.approx(metrics, abs=1e-6)
    # Rows without training stand beside it.
    facts = json.loads((tmp_path / "eval" / "test-4.json").read_text())
    shown = ["random", "reference_only", *(f"zero-shot {name}" for name in rows)]
    assert list(facts["baselines"]) == shown
    assert facts["composition_gain"]["composed"] in ("model", "sum", "product")
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "zero-shot product" in page
    assert "Composition gain: " in page
    model = load(tmp_path / "out")
    image = np.random.default_rng(0).integers(0, 255, (72, 72, 3), np.uint8)
    both = [m.encode_query(image, "make it red").embedding for m in (model, load(base / "run"))]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_a_run_starts_from_one_with_adapters(run, tmp_path):
    base, config, _ = run
    metrics = loop.train_and_evaluate(config, tmp_path / "next", init=base / "run")
    assert metrics["queries"] > 0


def test_stored_layers_below_adapters_change_nothing(run, tmp_path):
    base, _, _ = run
    fields = {
        "model.lora.layers": 1,
        "model.frozen_dtype": "float32",
        "optimizer.ema_decay": 0.0,
        "optimizer.learning_rate": 1e-3,
    }
    found = []
    for place in ("host", "off"):
        config = config_of(base, **fields, **{"features.place": place})
        config.features.directory = str(tmp_path / "features")
        loop.train_and_evaluate(config, tmp_path / place)
        found.append(params_of(tmp_path / place))
    assert list((tmp_path / "features").iterdir())
    assert found[0].keys() == found[1].keys()
    for path, x in found[0].items():
        # On average: where the true gradient is 0, as of biases of keys, Adam follows the rounding
        # of sums.
        limit = 1e-3 if path.endswith(("/key_value/bias", "/qkv/bias")) else 1e-4
        assert np.abs(x - found[1][path]).mean() < limit, path
