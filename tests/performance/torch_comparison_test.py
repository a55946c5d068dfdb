"""The step in PyTorch does the same work: embeddings, loss and gradients of small models agree."""

import json
import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from dqe_jax.distributed import mesh  # noqa: E402
from dqe_jax.method.objective import Objective  # noqa: E402
from dqe_jax.models import setup  # noqa: E402
from dqe_jax.performance import step_benchmark, torch_comparison  # noqa: E402
from dqe_jax.performance.in_torch import copying  # noqa: E402
from dqe_jax.performance.in_torch import step as in_torch  # noqa: E402
from dqe_jax.performance.torch_comparison import (  # noqa: E402
    COMPILED,
    EAGER,
    OURS,
    STORED,
    agree,
    comparable,
    compare_with_torch,
    without_zeros,
)
from dqe_jax.testing.small_models import BACKBONES, small_model_config  # noqa: E402
from dqe_jax.utils.errors import UserError  # noqa: E402

pytestmark = pytest.mark.torch
# FashionIQ's batches are packed: not all references have as many queries.
PACKED = {"data.dataset": "fashioniq", "batch.references": 8, "batch.queries_per_reference": 2}
CASES = {
    "tiny": ("tiny", {}),
    "tiny with gates": (
        "tiny",
        {"model.attributes.form": "gate", "model.attributes.parts": 4, **PACKED},
    ),
    "tiny without attributes": ("tiny", {"model.attributes.enabled": False}),
    "clip": ("clip", {**PACKED, "model.attributes.activation": "softmax"}),
    "clip, the last layer": ("clip", {"model.clip.features": "last", "loss.alignment": 0.0}),
    "blip2": ("blip2", {**PACKED, "model.blip2.dropout": 0.0}),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Pretrained backbones of a few thousand parameters, wherever sizes are asked for."""
    monkeypatch.setattr(
        step_benchmark, "sizes_for", lambda config, _=0: BACKBONES[config.model.backbone].sizes
    )


def made(case, **changes):
    """The config of a case, its parameters and sizes."""
    backbone, own = CASES[case]
    config = comparable(small_model_config(backbone, **{"batch.references": 8, **own, **changes}))
    model = step_benchmark.model_of(config)
    params = setup.init_params(model, config.model, config.data)
    return config, model, without_zeros(params), BACKBONES[backbone].sizes


@pytest.mark.parametrize("case", CASES)
def test_embeddings_and_loss_agree(case):
    config, _, params, sizes = made(case)
    found = agree(config, params, sizes)
    assert found.holds
    assert found.embeddings < 1e-5
    assert found.loss < 1e-5
    assert found.value > 1


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("tiny with gates", marks=pytest.mark.slow),
        "clip",
        pytest.param("blip2", marks=pytest.mark.slow),
    ],
)
def test_gradients_agree(case):
    config, model, params, sizes = made(case)
    batch = step_benchmark.random_batch(config, model, params)
    theirs, _ = in_torch.make_model(config, params, sizes, step_benchmark.VOCABULARY)
    loss, _ = theirs.train()(in_torch.as_tensors(batch, torch.device("cpu")))
    loss.backward()
    objective = Objective(model.apply, None, "none", config.loss, mesh.AXIS)

    def gradients(params, batch):
        return jax.grad(objective, has_aux=True)(params, batch, jax.random.key(0))[0]

    run = mesh.pmap(gradients, in_axes=(None, 0), out_axes=None, devices=mesh.devices_of(1))
    grads = jax.device_get(run(params, mesh.shard(batch, 1)))
    ours, _ = copying.to_torch(grads, sizes)
    found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert len(found) > 30
    for name, grad in found.items():
        expected = ours[name].numpy()
        scale = max(np.abs(expected).max(), 1e-2)  # of biases of keys it is 0
        np.testing.assert_allclose(grad.numpy(), expected, atol=1e-4 * scale, err_msg=name)
    for name in ours.keys() - found.keys():  # what has none has none in ours either
        assert not ours[name].any(), name


@pytest.mark.slow  # gradients are compared always
def test_steps_lower_the_loss_alike():
    """Clipping, the learning rate and AdamW's decay are those of the config."""
    changes = {"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 2}
    config, model, params, sizes = made("tiny", **changes)
    ours = step_benchmark.Maker(mesh.devices_of(1)).make(config, params)  # has taken a step
    ours.run(4)
    batch = step_benchmark.random_batch(config, model, params)
    vocabulary = step_benchmark.VOCABULARY
    theirs = in_torch.make_torch_step(config, params, sizes, vocabulary, batch, torch.device("cpu"))
    theirs.run(5)
    after, _ = copying.to_torch(jax.device_get(ours.holder[0].params), sizes)
    before, _ = copying.to_torch(params, sizes)
    moved = difference = 0.0
    for name, parameter in theirs.model.state_dict().items():
        moved += float((after[name] - before[name]).square().sum())
        difference += float((after[name] - parameter).square().sum())
    assert moved > 1e-2
    # Where gradients are next to zero, rounding decides the sign of AdamW's step.
    assert math.sqrt(difference / moved) < 0.05


@pytest.mark.slow
def test_frozen_towers_do_not_train_and_their_features_are_stored(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda _: fails)
    backbone, own = CASES["clip"]
    frozen = {"model.frozen": ("vision", "text", "logit_scale"), "data.augment": "flip"}
    config = small_model_config(backbone, **own, **frozen, total_steps=10)
    with caplog.at_level("INFO"):
        found = compare_with_torch(config, rounds=2, steps=1, label="small", started=1.0)
    assert list(found.ours.times) == [OURS, STORED]
    assert list(found.theirs) == [EAGER]
    assert found.notes == ("torch.compile did not work: there is no compiler.",)
    assert found.ours.times[OURS].flop > 1.2 * found.ours.times[STORED].flop
    for name, ratio in found.ratios.items():
        expected = found.ours.times[name].seconds / found.theirs[EAGER].median
        assert ratio.median == pytest.approx(expected)
        assert ratio.lowest <= ratio.median <= ratio.highest
        assert f"{name}: {ratio.median:.2f} of the time of 'PyTorch'" in caplog.text
    held = json.loads(json.dumps(found.as_json()))
    assert held["fastest"] == EAGER
    assert held["theirs"][EAGER]["examples_per_second"] > 0
    assert held["agreement"]["embeddings"] < 1e-4
    assert held["ours"]["times"][STORED]["mfu"] > 0
    assert held["threads"] == torch.get_num_threads()

    theirs = in_torch.make_torch_step(*arguments(config))
    before = {name: x.clone() for name, x in theirs.model.state_dict().items()}
    theirs.run(3)  # the first has a learning rate of 0
    changed = {n for n, x in theirs.model.state_dict().items() if not torch.equal(x, before[n])}
    assert not any("vision_model" in n or "text_model" in n for n in changed)
    assert any("visual_projection" in n for n in changed)


def fails(_):
    raise RuntimeError("there is no compiler")


def arguments(config):
    config = comparable(config)
    model = step_benchmark.model_of(config)
    params = setup.init_params(model, config.model, config.data)
    plain = config.with_changes({"features.place": "off"})
    batch = step_benchmark.random_batch(plain, model, params)
    sizes = BACKBONES[config.model.backbone].sizes
    return config, params, sizes, step_benchmark.VOCABULARY, batch, torch.device("cpu")


@pytest.mark.parametrize("backbone", ["clip", "blip2"])
def test_steps_in_half_precision_keep_frozen_towers_in_it(backbone):
    half = {"model.dtype": "bfloat16", "model.frozen_dtype": "bfloat16"}
    config = small_model_config(backbone, **half, **{"model.frozen": ("vision",)})
    theirs = in_torch.make_torch_step(*arguments(config))
    theirs.run(1)
    kinds = {n: p.dtype for n, p in theirs.model.named_parameters()}
    assert {kinds[n] for n in kinds if "vision_model" in n} == {torch.bfloat16}
    assert {kinds[n] for n in kinds if "vision_model" not in n} == {torch.float32}


def test_nothing_is_timed_where_both_differ(monkeypatch):
    forward = in_torch.forward_once

    def other(*inputs):
        return {n: x + 2e-4 * (n == "target") for n, x in forward(*inputs).items()}

    monkeypatch.setattr(in_torch, "forward_once", other)
    monkeypatch.setattr(in_torch, "make_torch_step", lambda *_: pytest.fail("it is timed"))
    backbone, own = CASES["tiny"]
    with pytest.raises(UserError, match=r"differ by 0\.0002 and losses by .*nothing is timed"):
        compare_with_torch(small_model_config(backbone, **own))
    assert not torch_comparison.Agreement(math.nan, 0.0, 1.0).holds


def test_what_cannot_be_compared(monkeypatch):
    with pytest.raises(UserError, match=r"config\.model\.backbone is 'features', whose encoders"):
        compare_with_torch(small_model_config("features"))
    with pytest.raises(UserError, match=r"config\.num_devices is 2, and PyTorch works on one"):
        compare_with_torch(small_model_config("tiny", num_devices=2))
    monkeypatch.setattr(torch_comparison.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="--vs=torch needs torch: run `pip install torch"):
        compare_with_torch(small_model_config("tiny"))


@pytest.mark.slow
def test_a_tower_that_transformers_does_not_have(monkeypatch):
    sizes = BACKBONES["blip2"].sizes
    vision = BACKBONES["clip"].sizes.vision  # with a norm before it, as in LAVIS
    monkeypatch.setattr(
        step_benchmark, "sizes_for", lambda *_: type(sizes)(**{**vars(sizes), "vision": vision})
    )
    with pytest.raises(UserError, match="transformers has no model of this shape"):
        compare_with_torch(small_model_config("blip2"))


def test_every_parameter_has_its_place():
    _, _, params, sizes = made("blip2")
    tensors, paths = copying.to_torch(params, sizes)
    assert set(paths.values()) == set(flatten_dict(params, sep="/"))
    assert tensors.keys() == paths.keys()


@pytest.mark.slow
def test_compiled_steps_are_timed():
    found = compare_with_torch(small_model_config("tiny"), rounds=1, steps=1)
    assert list(found.theirs) == [EAGER, COMPILED], found.notes
