"""The curve of the loss is the same with stored features as with towers in each step.

`pytest -m slow -rP` prints how far apart the curves are.
"""

import json
import pathlib

import jax
import pytest

from dqe_jax.cli.config_files import load_config
from dqe_jax.testing.pretrained import copy_weights
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
STEPS = 50
# The config whose learning rate is taken, the parts that are frozen, and what is small.
OWN = {
    "clip": ("fiq_clip", ("vision", "text", "logit_scale"), {"model.clip.composer_width": 16}),
    "siglip": (
        "fiq_siglip",
        ("vision", "pooling", "text", "logit_scale"),
        {"model.siglip.composer_width": 16, "model.siglip.composer_heads": 2},
    ),
    "blip2": ("fiq", ("vision", "itm_head"), {}),
}
BACKBONES = tuple(OWN)


@pytest.fixture(scope="module", autouse=True)
def _as_users_compile():
    """Fusions decide how numbers are rounded: tests compile without most of them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    directory = tmp_path_factory.mktemp("curves")
    prepared(directory)
    for name in BACKBONES:
        copy_weights(GOLDEN / name, name, directory / name)
    return directory


@pytest.fixture(scope="module")
def curve_of(base):
    """A function of backbone, dtype, place and devices: the loss of each step of a run.

    The run mirrors images, mines a bank that it fills three times, and is evaluated on its way.
    """
    made = {}

    def curve(name, dtype, place, devices, **changes):
        key = (name, dtype, place, devices, *changes.items())
        if key not in made:
            config, frozen, sizes = OWN[name]
            fields = {
                **{"total_steps": STEPS, "log_every": 1, "eval_every": 20, "checkpoint_every": 50},
                **{"batch.references": 8, "num_devices": devices, "data.max_length": 12},
                **{"data.augment": "flip", "features.place": place, "model.backbone": name},
                **{"model.weights": str(base / name), f"model.{name}.variant": "auto"},
                **{"model.frozen": frozen, "model.dtype": dtype, "model.frozen_dtype": dtype},
                **{"model.attributes.width": 8, "eval.sheet_queries": 1},
                **{"negatives.pool": "bank", "negatives.first_refresh": 5},
                **{"negatives.refresh_every": 20},
                "optimizer.learning_rate": load_config(config).optimizer.learning_rate,
            }
            if name == "clip":
                fields["model.clip.composer_heads"] = 2
            workdir = base / f"run-{len(made)}"
            config = small_config(base / "prepared", **fields | sizes | changes)
            loop.train_and_evaluate(config, workdir)
            text = (workdir / "metrics.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            made[key] = [line["loss"] for line in lines if "loss" in line]
            assert len(made[key]) == STEPS
            assert sum("validation/R@1" in line for line in lines) == 3
        return made[key]

    return curve


def apart(one, other):
    """The largest difference of losses of a step, relative to the loss."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other))


@pytest.mark.slow  # `run_test.py` has a run of 8 steps of the tiny backbone
@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("name", BACKBONES)
def test_in_float32(curve_of, name, place):
    """BLIP-2 with the dropout of its Q-Former."""
    off = curve_of(name, "float32", "off", 2)
    found = apart(off, curve_of(name, "float32", place, 2))
    print(f"{name}, float32, {place}: {found:.1e} apart; losses {off[0]:.3f} to {off[-1]:.3f}")
    assert found <= 1e-5


def mean_apart(one, other):
    """The mean difference of losses of a step, relative to the loss."""
    return sum(abs(a - b) / abs(a) for a, b in zip(one, other)) / STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_in_bfloat16_it_matters_as_much_as_the_number_of_devices(curve_of, name):
    """Products of bfloat16 are rounded by how many images a tower takes at a time."""
    # Dropout differs with the number of devices. One device has more images than the 32 below
    # which the CPU multiplies in another way; one of eight has fewer.
    changes = {"model.blip2.dropout": 0.0, "batch.references": 32}
    one, eight = (curve_of(name, "bfloat16", "off", count, **changes) for count in (1, 8))
    stored = curve_of(name, "bfloat16", "device", 1, **changes)
    between, found = mean_apart(one, eight), mean_apart(one, stored)
    print(f"{name}, bfloat16: {found:.1e} apart; 1 and 8 devices are {between:.1e} apart")
    assert 0 < between < 1e-2
    assert found <= 1.5 * between
