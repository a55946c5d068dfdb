"""LoRA on every backbone: the model starts as it was, adapters alone train, merging is exact."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.checkpoints.merging import merged
from dqe_jax.config import RunConfig
from dqe_jax.feature_store.features import stored_kinds
from dqe_jax.models import freeze, lora, setup
from dqe_jax.models.build import parts_of
from dqe_jax.models.summary import parameter_table
from dqe_jax.models.weights.stacking import stack_layers
from dqe_jax.testing.small_models import build_small_model, small_model_config
from dqe_jax.training.state import make_optimizer, splitter
from dqe_jax.utils.errors import UserError

FROZEN = {
    "tiny": ("vision", "text"),
    "clip": ("vision", "text", "logit_scale"),
    "blip2": ("vision", "text", "qformer"),
}
CASES = [
    pytest.param("tiny", {}, marks=pytest.mark.slow),
    ("clip", {"model.scan_layers": True, "model.remat": True}),
    pytest.param(
        "clip", {"model.lora.targets": ("*",), "model.lora.layers": 1}, marks=pytest.mark.slow
    ),
    pytest.param(
        "blip2", {"model.remat": True, "model.frozen_dtype": "bfloat16"}, marks=pytest.mark.slow
    ),
]
IMAGES = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), np.uint8)
IDS = np.array([[1, 2, 3, 19, 0, 0, 0, 0], [4, 5, 19, 0, 0, 0, 0, 0]], np.int32)


def config_of(backbone, **changes):
    fields = {"model.frozen": FROZEN[backbone], "model.lora.rank": 2, **changes}
    return small_model_config(backbone, **fields)


def made(config):
    """A model and its parameters, as NumPy arrays by path."""
    model = build_small_model(config)
    params = setup.init_params(model, config.model, config.data)
    return model, {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}


def moved(flat, which=lora.is_adapter):
    """Parameters some of which have learnt something."""
    rng = np.random.default_rng(0)
    return {
        path: x + 0.1 * rng.normal(size=x.shape).astype(np.float32) if which(path) else x
        for path, x in flat.items()
    }


def nested(flat):
    return unflatten_dict(flat, sep="/")


def embeddings(model, flat):
    @jax.jit
    def both(params):
        query = model.apply({"params": params}, IMAGES, IDS, method="encode_query").embedding
        return query, model.apply({"params": params}, IMAGES, method="encode_gallery")

    return tuple(map(np.asarray, both(nested(flat))))


@pytest.mark.parametrize(("backbone", "changes"), CASES)
def test_it_starts_as_the_model_without_and_merged_is_the_same(backbone, changes):
    config = config_of(backbone, **changes)
    model, flat = made(config)
    plain, base = made(config.with_changes({"model.lora.rank": 0}))
    assert {path: x for path, x in flat.items() if not lora.is_adapter(path)}.keys() == base.keys()
    before = embeddings(plain, base)
    for one, other in zip(before, embeddings(model, flat)):
        np.testing.assert_array_equal(one, other)

    learnt = moved(flat)
    after = embeddings(model, learnt)
    assert np.abs(after[0] - before[0]).max() > 1e-3
    other_config, params = merged(config, nested(learnt))
    assert other_config.model.lora.rank == 0
    without = build_small_model(other_config)
    for one, other in zip(after, embeddings(without, flatten_dict(params, sep="/"))):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("backbone", "changes"), CASES)
def test_adapters_and_heads_are_all_that_train(backbone, changes):
    config = config_of(backbone, **changes)
    model, flat = made(config)
    parts = parts_of(backbone)
    # Heads too: some start at zero, and let no gradient through.
    head = ("residual", "lora_")
    learnt = moved(flat, lambda path: any(part in path for part in head))
    training, frozen = splitter(config.model)(nested(learnt))
    own = flatten_dict(training, sep="/")
    adapters = {path for path in own if lora.is_adapter(path)}
    assert adapters == {path for path in flat if lora.is_adapter(path)}
    assert {freeze.part_of(path, parts) for path in own.keys() - adapters}.isdisjoint(
        config.model.frozen
    )
    assert all(x.dtype == np.float32 for x in own.values())

    def loss(training):
        variables = {"params": freeze.merge(training, frozen)}
        out = model.apply(variables, IMAGES, IDS, IMAGES[::-1], train=False)
        return (out.query.embedding * out.target[:, 0]).sum()

    grads = flatten_dict(jax.jit(jax.grad(loss))(training), sep="/")
    assert all(np.abs(grads[path]).max() > 0 for path in adapters)
    # The optimiser holds two moments of what trains, and of nothing else.
    state = jax.tree.leaves(make_optimizer(config, nested(flat), 1).saved)
    assert sum(x.size for x in state) == 2 * sum(x.size for x in own.values()) + 5
    table = parameter_table(nested(flat), config.model)
    count = sum(flat[path].size for path in adapters)
    assert any(line.split() == ["lora", f"{count:,}", "trains"] for line in table.splitlines())


def test_a_layer_by_hand():
    """`qkv` with adapters of query and value, in NumPy."""
    from flax import linen as nn

    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 4)).astype(np.float32)
    w = rng.normal(size=(4, 6)).astype(np.float32)
    a, b = (
        {n: rng.normal(size=s).astype(np.float32) for n in ("query", "value")}
        for s in ((4, 2), (2, 2))
    )
    held = {"kernel": w, "bias": np.zeros(6, np.float32)}
    held |= {f"lora_a_{n}": a[n] for n in a} | {f"lora_b_{n}": b[n] for n in b}

    class Model(nn.Module):
        lora_scale: float

        @lora.with_adapters
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="qkv")(x)

    found = Model(0.5).apply({"params": {"qkv": held}}, x)
    expected = x @ w
    expected[:, :2] += 0.5 * x @ a["query"] @ b["query"]
    expected[:, 4:] += 0.5 * x @ a["value"] @ b["value"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(Model(0.0).apply({"params": {"qkv": held}}, x), x @ w, rtol=1e-5)
    kernel = lora.merged({"qkv": held}, 0.5)["qkv"]["kernel"]
    np.testing.assert_allclose(x @ kernel, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_scanned_adapters_are_those_of_the_layers_stacked():
    config = config_of("clip", **{"model.clip.features": "last"})
    model, flat = made(config)
    scanned = build_small_model(config.with_changes({"model.scan_layers": True}))
    learnt = nested(moved(flat))
    for one, other in zip(
        embeddings(model, flatten_dict(learnt, sep="/")),
        embeddings(scanned, flatten_dict(stack_layers(learnt), sep="/")),
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {"vision": {0, 1}, "text": {0, 1}}),
        ({"model.lora.layers": 1}, {"vision": {1}, "text": {1}}),
        ({"model.lora.targets": ("vision/*/mlp_in",)}, {"vision": {0, 1}}),
        ({"model.frozen": ("text",)}, {"text": {0, 1}}),
    ],
)
def test_targets_are_chosen_by_name_part_and_layer(changes, layers):
    _, flat = made(config_of("clip", **changes))
    found = {}
    for path in filter(lora.is_adapter, flat):
        _, tower, _, layer, *_ = path.split("/")
        found.setdefault(tower, set()).add(int(layer.removeprefix("layers_")))
    assert found == layers


def test_recomputed_layers_are_not_cut():
    config = config_of("clip", **{"model.lora.layers": 1, "model.remat": True})
    assert stored_kinds(config, made(config)[0]) == ()


def test_layers_below_the_first_adapter_are_stored():
    config = config_of("clip", **{"model.lora.layers": 1})
    model, flat = made(config)
    assert stored_kinds(config, model) == ("image",)  # that of texts has adapters too
    learnt = moved(flat)
    states = model.apply({"params": nested(learnt)}, IMAGES, method="image_states")
    assert {name: x.shape for name, x in states.items()} == {"entering": (2, 5, 16)}
    # They do not depend on the layers above; nor does what follows on those below.
    above = moved(learnt, lambda path: "vision/encoder/layers_1" in path)
    below = moved(learnt, lambda path: "layers_0" in path or "vision/patches" in path)
    same = model.apply({"params": nested(above)}, IMAGES, method="image_states")
    np.testing.assert_array_equal(states["entering"], same["entering"])

    @jax.jit
    def both(params, image):
        def loss(params):
            embedding = model.apply({"params": params}, image, method="encode_gallery")
            return (embedding[0] * embedding[1]).sum(), embedding

        return jax.grad(loss, has_aux=True)(params)

    grads, expected = both(nested(learnt), IMAGES)
    for params in (learnt, below):
        own, found = both(nested(params), states)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        for path, x in flatten_dict(own, sep="/").items():
            if "vision/encoder/layers_1" in path or "projection" in path:
                other = flatten_dict(grads, sep="/")[path]
                np.testing.assert_allclose(x, other, atol=1e-5)
            if "vision/encoder/layers_0" in path:
                assert not np.abs(x).max()


def test_a_tower_with_adapters_is_not_stored():
    config = config_of("clip")
    model = build_small_model(config)
    assert stored_kinds(config, model) == ()
    plain = config.with_changes({"model.lora.rank": 0})
    assert stored_kinds(plain, build_small_model(plain)) == ("image", "text")
    own = config.with_changes({"model.lora.targets": ("text/*",)})
    assert stored_kinds(own, build_small_model(own)) == ("image",)
    with pytest.raises(UserError, match="adapters change vision"):
        stored_kinds(config.with_changes({"features.place": "host"}), model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.frozen": ()}, r"config.model.lora.rank is 2: .*name their parts"),
        ({"model.lora.layers": 1, "model.scan_layers": True}, "config.model.lora.layers is 1"),
        ({"model.lora.targets": ()}, "config.model.lora.targets is .*must be a tuple"),
        ({"model.lora.alpha": 0.0}, "config.model.lora.alpha is 0.0"),
    ],
)
def test_what_cannot_be_is_said(changes, words):
    with pytest.raises(UserError, match=words):
        config_of("clip", **changes)


def test_targets_that_do_not_exist_are_named():
    config = config_of("clip", **{"model.lora.targets": ("quary",)})
    with pytest.raises(UserError, match=r"config.model.lora.targets is \('quary',\)"):
        setup.param_shapes(build_small_model(config), config.model, config.data)


def test_adapters_alone_may_train():
    parts = parts_of("clip")
    own = tuple(part for part in parts if part != freeze.ADAPTERS)
    freeze.check_frozen(own, parts, adapters=True)
    with pytest.raises(UserError, match="nothing would train"):
        freeze.check_frozen(own, parts)
    with pytest.raises(UserError, match="names 'lora': the parts of this model are vision"):
        freeze.check_frozen(("lora",), parts)


def test_a_config_without_adapters_is_as_before():
    config = RunConfig()
    assert config.model.lora.scale == 0.0
    params = {"a": {"kernel": np.ones((2, 2))}}
    assert merged(config, params) == (config, params)
