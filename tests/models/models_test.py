"""The model over each backbone: what its entry points give, and that they agree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dqe_jax.config import RunConfig
from dqe_jax.models import build as models
from dqe_jax.models import freeze, layers, setup, summary
from dqe_jax.models.settings import TWO_TOWERS
from dqe_jax.models.siglip import Siglip
from dqe_jax.models.weights.stacking import stack_layers
from dqe_jax.testing.small_models import (
    ATTRIBUTE_WIDTH,
    ATTRIBUTES,
    BACKBONES,
    EMBED_DIM,
    END,
    LENGTH,
    SIZE,
    build_small_model,
    small_model_config,
)
from dqe_jax.utils.errors import UserError

R, Q = 2, 3


# CLIP's form stands for that of two towers in every test run.
SLOW = ("siglip", "dino")


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
        for name in sorted(models.BACKBONES)
    ],
    scope="module",
)
def backbone(request):
    assert request.param in BACKBONES, f"give {request.param!r} a row in dqe_jax/testing"
    return request.param


def trained(params, seed=1):
    """Parameters as after training: nothing is left at zero."""
    rng = np.random.default_rng(seed)

    def move(x):
        return jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype) if x.ndim else x

    return jax.tree.map(move, jax.device_get(params))


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, 256, (R, SIZE, SIZE, 3), np.uint8)
    target = rng.integers(0, 256, (R * Q, SIZE, SIZE, 3), np.uint8)
    text = rng.integers(1, END, (R * Q, LENGTH), np.int32)
    text[..., 4] = END
    text[..., 5:] = 0
    return reference, text, target


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling takes most of the time here; the models are too small to be worth optimising."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def entry_points(model):
    """Both, compiled, as functions of the parameters."""
    query = jax.jit(lambda p, i, t: model.apply({"params": p}, i, t, method="encode_query"))
    gallery = jax.jit(lambda p, i: model.apply({"params": p}, i, method="encode_gallery"))
    return query, gallery


# For tests that compile much: the largest backbone, too, is for the slow ones.
WITHOUT_BLIP2 = pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("blip2", *SLOW) else ())
        for name in sorted(models.BACKBONES)
    ],
    indirect=True,
)


@pytest.fixture(scope="module")
def initial(backbone):
    """Parameters before training."""
    config = small_model_config(backbone)
    return setup.init_params(build_small_model(config), config.model, config.data)


@pytest.fixture(scope="module")
def model(backbone, initial):
    """The model, parameters as after training, and both entry points."""
    module = build_small_model(small_model_config(backbone))
    return module, trained(initial), *entry_points(module)


def flat_inputs():
    reference, text, target = inputs()
    return np.repeat(reference, Q, axis=0), text, target


def test_every_small_model_is_of_a_backbone():
    assert set(BACKBONES) == set(models.BACKBONES)


def test_shapes_types_and_unit_norms(model, backbone):
    _, params, query, gallery = model
    reference, text, _ = flat_inputs()
    dim = EMBED_DIM
    out, images = query(params, reference, text), gallery(params, reference)
    assert out.embedding.shape == (R * Q, dim)
    assert out.attribute_weights.shape == (R * Q, len(ATTRIBUTES))
    assert out.attribute_features.shape == (R * Q, len(ATTRIBUTES), ATTRIBUTE_WIDTH)
    assert images.shape == (R * Q, BACKBONES[backbone].tokens, dim)
    assert out.embedding.dtype == out.attribute_weights.dtype == images.dtype == jnp.float32
    for embedding in (out.embedding, images):
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=-1), 1, atol=1e-5)


def test_embeddings_depend_on_what_they_should(model):
    _, params, query, gallery = model
    reference, text, target = flat_inputs()
    other_text, other_image = text.copy(), target
    other_text[:, 0] = other_text[:, 0] % (END - 1) + 1
    q = query(params, reference, text)
    assert np.abs(q.embedding - query(params, reference, other_text).embedding).max() > 1e-3
    assert np.abs(q.embedding - query(params, other_image, text).embedding).max() > 1e-3
    assert np.abs(gallery(params, reference) - gallery(params, other_image)).max() > 1e-3
    # Weights are a function of the text alone.
    np.testing.assert_array_equal(
        q.attribute_weights, query(params, other_image, text).attribute_weights
    )


def test_one_pass_equals_the_entry_points(model):
    module, params, query, gallery = model
    reference, text, target = inputs()
    out = jax.jit(lambda p, *a: module.apply({"params": p}, *a, train=False))(
        params, reference, text, target
    )
    flat_reference, flat_text, _ = flat_inputs()
    alone = query(params, flat_reference, flat_text)
    close = {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(out.query.embedding, alone.embedding, **close)
    np.testing.assert_allclose(out.query.attribute_weights, alone.attribute_weights, **close)
    np.testing.assert_allclose(out.query.attribute_features, alone.attribute_features, **close)
    np.testing.assert_allclose(out.reference, gallery(params, reference), **close)
    np.testing.assert_allclose(out.target, gallery(params, target), **close)
    # Features of the targets are those of a query with the target as its image.
    of_target = query(params, target, flat_text).attribute_features
    np.testing.assert_allclose(out.target_attribute_features, of_target, **close)


@WITHOUT_BLIP2
def test_references_may_have_different_numbers_of_queries(model):
    """Values and gradients are those of one reference for each query; of a part of a batch too."""
    module, params, *_ = model
    _, text, target = inputs()
    reference, rows = target[::-1][:3], np.array([0, 1, 1, 1, 2, 2])
    weights = np.random.default_rng(2).normal(size=(R * Q, EMBED_DIM)).astype(np.float32)

    @jax.jit
    def value(params, reference, rows):
        def total(params):
            out = module.apply({"params": params}, reference, text, target, rows, train=False)
            return (out.query.embedding * weights).sum() + out.query.attribute_features.sum(), out

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, out), grads = value(params, reference, rows + 12)  # the fifth part of such a batch
    (_, alone), own = value(params, reference[rows], None)
    np.testing.assert_allclose(out.query.embedding, alone.query.embedding, atol=1e-5)
    features = out.query.attribute_features, alone.query.attribute_features
    np.testing.assert_allclose(*features, atol=1e-4, rtol=1e-4)
    assert out.reference.shape[0] == 3
    size = max(np.abs(x).max() for x in jax.tree.leaves(own))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * size), grads, own)


def test_a_composer_without_blocks():
    """Its tokens are those of the reference, one for all its texts."""
    config = small_model_config("clip", **{"model.clip.composer_depth": 0})
    module = build_small_model(config)
    params = trained(setup.init_params(module, config.model, config.data))
    query, _ = entry_points(module)
    reference, text, _ = inputs()
    together = query(params, reference, text).embedding
    for r in range(R):
        alone = query(params, reference[r : r + 1], text[r * Q + 1 : r * Q + 2]).embedding
        np.testing.assert_allclose(together[r * Q + 1 : r * Q + 2], alone, atol=1e-5)


def test_a_composer_that_normalises_its_inputs():
    """It hears the text however large the embedding of the reference is, from the start."""
    parts = {}
    for norm in (False, True):
        config = small_model_config("features", **{"model.features.composer_norm": norm})
        module = build_small_model(config)
        bound = module.bind({"params": setup.init_params(module, config.model, config.data)})
        reference, text, _ = flat_inputs()
        image, words = bound._image(reference), bound._text(text)
        large = image.replace(gallery=100 * image.gallery)
        own = layers.normalize(image.gallery[:, 0])
        parts[norm] = [bound.backbone.compose(x, words) - own for x in (image, large)]
    assert np.abs(parts[False]).max() < 1e-6  # it starts as the reference
    assert np.abs(parts[True]).min(axis=0).max() > 0.1
    np.testing.assert_allclose(*parts[True], atol=1e-3)


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=() if name == "tiny" else pytest.mark.slow)  # each operation alone
        for name in sorted(models.BACKBONES)
    ],
    indirect=True,
)
def test_jit_changes_nothing(model):
    module, params, query, gallery = model
    reference, text, _ = flat_inputs()
    eager = module.apply({"params": params}, reference, text, method="encode_query")
    np.testing.assert_allclose(query(params, reference, text).embedding, eager.embedding, atol=1e-5)
    eager = module.apply({"params": params}, reference, method="encode_gallery")
    np.testing.assert_allclose(gallery(params, reference), eager, atol=1e-5)


def test_padding_of_the_text_does_not_matter(model):
    module, params, query, _ = model
    reference, text, _ = flat_inputs()
    assert (text[:, 5:] == 0).all()
    expected = query(params, reference, text)
    shorter = query(params, reference, text[:, :5])
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(shorter)):
        np.testing.assert_allclose(a, b, atol=1e-5)

    def pooled(module, ids):  # of states that a store holds, which have all tokens
        return module.backbone.text_features(ids, module.backbone.text_states(text)).pooled

    whole, cut = (
        module.apply({"params": params}, ids, method=pooled) for ids in (text, text[:, :5])
    )
    np.testing.assert_allclose(whole, cut, atol=1e-5)
    # Neither do the embeddings of padding and of the positions where it stands, but for SigLIP:
    # it was trained on texts that attend to their padding.
    flat = flatten_dict(params)
    for name, x in flat.items():
        if name[-2:] == ("words", "embedding") or name[-2:] == ("words_table", "embedding"):
            flat[name] = x.at[0].set(50.0)
        if name[-2:] in (("text_positions", "embedding"), ("text", "positions")):
            flat[name] = x.at[5:].set(50.0)
    other = query(unflatten_dict(flat), reference, text)
    if isinstance(module.backbone, Siglip):
        assert np.abs(other.embedding - expected.embedding).max() > 0.1
        return
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_of_the_batch_does_not_matter(model):
    _, params, query, gallery = model
    reference, text, _ = flat_inputs()
    alone = query(params, reference[:1], text[:1]).embedding
    np.testing.assert_allclose(query(params, reference, text).embedding[:1], alone, atol=1e-5)
    alone = gallery(params, reference[:1])
    np.testing.assert_allclose(gallery(params, reference)[:1], alone, atol=1e-5)


def test_bfloat16_is_close_to_float32_over_the_same_parameters(model, backbone):
    _, params, query, gallery = model
    config = small_model_config(backbone, **{"model.dtype": "bfloat16"})
    half_model = build_small_model(config)
    half_query, half_gallery = entry_points(half_model)
    reference, text, _ = flat_inputs()
    shapes = jax.eval_shape(lambda: setup.init_params(half_model, config.model, config.data))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    out, half = query(params, reference, text), half_query(params, reference, text)
    assert half.embedding.dtype == half.attribute_weights.dtype == jnp.float32
    np.testing.assert_allclose(out.embedding, half.embedding, atol=2e-2)
    np.testing.assert_allclose(out.attribute_weights, half.attribute_weights, atol=2e-2)
    images, half_images = gallery(params, reference), half_gallery(params, reference)
    np.testing.assert_allclose(images, half_images, atol=2e-2)
    assert np.abs(images - half_images).max() > 0  # bfloat16 is really used


def test_temperature(backbone):
    config = small_model_config(backbone, **{"model.initial_tau": 0.05})
    module = build_small_model(config)
    image, text = np.zeros((1, SIZE, SIZE, 3), np.uint8), np.ones((1, LENGTH), np.int32)

    @jax.jit
    def start_of(key):  # alone, so that nothing else is compiled
        variables = module.init(key, image, text, image, train=False)
        return variables["params"]["log_scale"]

    def tau(log_scale):
        return module.apply({"params": {"log_scale": log_scale}}, method="tau")

    start = start_of(jax.random.key(0))
    for scalar in (start, tau(start)):
        assert scalar.shape == ()
        assert scalar.dtype == jnp.float32
        assert not scalar.weak_type
    np.testing.assert_allclose(tau(start), 0.05, rtol=1e-5)
    np.testing.assert_allclose(tau(jnp.float32(50.0)), 0.01, rtol=1e-5)  # its least
    np.testing.assert_allclose(tau(jnp.float32(0.0)), 1.0, rtol=1e-5)


def test_the_temperature_of_a_pass_is_the_model_s(model):
    module, params, *_ = model
    out = jax.eval_shape(lambda: module.apply({"params": params}, *inputs(), train=False))
    assert out.tau.shape == ()
    assert out.tau.dtype == jnp.float32
    assert not out.tau.weak_type


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_attribute_weights(model, backbone, activation):
    module = build_small_model(
        small_model_config(backbone, **{"model.attributes.activation": activation})
    )
    reference, text, _ = flat_inputs()
    weights = entry_points(module)[0](model[1], reference, text).attribute_weights
    assert ((weights > 0) & (weights < 1)).all()
    if activation == "softmax":
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    else:
        assert np.abs(weights.sum(-1) - 1).max() > 1e-3


def test_without_attributes_the_model_is_the_plain_composer(model, backbone, initial):
    query = model[2]
    config = small_model_config(backbone, **{"model.attributes.enabled": False})
    module = build_small_model(config)
    shapes = jax.eval_shape(lambda: setup.init_params(module, config.model, config.data))
    assert set(initial) - set(shapes) == {"attributes"}
    bare = {name: value for name, value in initial.items() if name in shapes}
    out = entry_points(module)[0](bare, *flat_inputs()[:2])
    assert out.attribute_weights.shape == (R * Q, 0)
    assert out.attribute_features.shape[:2] == (R * Q, 0)
    whole = jax.eval_shape(lambda: module.apply({"params": bare}, *inputs(), train=False))
    assert whole.target_attribute_features.shape[:2] == (R * Q, 0)
    # At initialisation the attribute weights add nothing.
    full = query(initial, *flat_inputs()[:2]).embedding
    np.testing.assert_allclose(full, out.embedding, atol=1e-6)


@pytest.mark.parametrize(
    "query", ["text", "image", "sum", pytest.param("product", marks=pytest.mark.slow)]
)
def test_a_query_without_a_composer(model, backbone, query):
    fields = {"model.attributes.enabled": False, "negatives.rule": "in_batch"}
    config = small_model_config(backbone, **fields | {"model.query": query})
    module = build_small_model(config)
    params = trained(setup.init_params(module, config.model, config.data))
    paths = set(flatten_dict(params, sep="/"))
    assert not any("composer" in path or "residual" in path for path in paths)
    assert ("text_head_out/kernel" in paths) == (query != "image")
    reference, text, target = flat_inputs()
    encode, gallery = entry_points(module)
    found = encode(params, reference, text)
    assert found.attribute_weights.shape == (R * Q, 0)
    own = layers.normalize(gallery(params, reference).mean(1))
    other = encode(params, target, text).embedding  # of other images
    if query == "text":
        np.testing.assert_array_equal(found.embedding, other)
        return
    assert np.abs(found.embedding - other).max() > 1e-3
    if query == "image":
        np.testing.assert_allclose(found.embedding, own, atol=1e-6)
        return
    bound = module.bind({"params": params})
    asked = layers.normalize(
        bound.text_head_out(jax.nn.relu(bound.text_head_hidden(bound._text(text).pooled)))
    )
    expected = own + asked if query == "sum" else own * asked
    np.testing.assert_allclose(found.embedding, layers.normalize(expected), atol=1e-5)


@WITHOUT_BLIP2
def test_gates_choose_between_the_reference_and_the_text(model, backbone):
    config = small_model_config(
        backbone, **{"model.attributes.form": "gate", "model.attributes.parts": 4}
    )
    module = build_small_model(config)
    params = trained(setup.init_params(module, config.model, config.data))
    reference, text, target = inputs()

    @jax.jit
    def run(gate, bias):
        gates = params["gates"] | {"gate": {"kernel": gate, "bias": bias}}
        held = params | {"gates": gates}
        return module.apply({"params": held}, reference, text, target, train=False)

    kernel = params["gates"]["gate"]["kernel"]
    out = run(kernel, jnp.zeros(4))
    weights = out.query.attribute_weights
    assert weights.shape == (R * Q, len(ATTRIBUTES))
    assert ((weights > 0) & (weights < 1)).all()
    assert np.abs(weights - weights[:1]).max() > 1e-3  # of the text
    parts = (R * Q, len(ATTRIBUTES), EMBED_DIM // 4)
    assert out.query.attribute_features.shape == parts
    assert out.target_attribute_features.shape == parts
    # Closed, they leave the plain composer; the target's parts are those of its embedding.
    closed = run(kernel * 0, jnp.full(4, -1e9))
    plain = build_small_model(small_model_config(backbone, **{"model.attributes.enabled": False}))
    bare = {name: value for name, value in params.items() if name != "gates"}
    apply = jax.jit(lambda p: plain.apply({"params": p}, reference, text, target, train=False))
    expected = apply(bare)
    np.testing.assert_allclose(closed.query.embedding, expected.query.embedding, atol=1e-5)
    own = np.asarray(out.target).mean(1).reshape(R * Q, 4, -1)[:, : len(ATTRIBUTES)]
    np.testing.assert_allclose(out.target_attribute_features, own, atol=1e-5)
    # Open in one part, they change this part of the sum alone, whatever the reference is there.
    q = np.asarray(run(kernel * 0, jnp.array([1e9, -1e9, -1e9, -1e9])).query.embedding)
    closed_q = np.asarray(closed.query.embedding)
    rest, closed_rest = q[:, EMBED_DIM // 4 :], closed_q[:, EMBED_DIM // 4 :]
    cosine = (rest * closed_rest).sum(-1)
    norms = np.linalg.norm(rest, axis=-1) * np.linalg.norm(closed_rest, axis=-1)
    np.testing.assert_allclose(cosine, norms, rtol=1e-5)
    assert np.abs(q[:, : EMBED_DIM // 4] - closed_q[:, : EMBED_DIM // 4]).max() > 1e-3


def test_parts_that_do_not_divide_the_embedding_are_refused(backbone):
    fields = {"model.attributes.form": "gate", "model.attributes.parts": 3}
    with pytest.raises(UserError, match=r"parts, 3|parts is 3: it must"):
        build_small_model(small_model_config(backbone, **fields))
    with pytest.raises(UserError, match="parts is 2: it must be at least"):
        small_model_config(backbone, **fields | {"model.attributes.parts": 2})


def test_what_an_untrained_query_is(model, backbone, initial):
    module, _, query, gallery = model
    reference, text, _ = flat_inputs()
    out = query(initial, reference, text).embedding
    expected = np.asarray(gallery(initial, reference))[:, 0]
    if backbone == "blip2":  # the multimodal path, whatever it gives
        assert np.abs(out - expected).max() > 1e-3
        return
    if backbone in TWO_TOWERS:  # the image + text baseline
        backbone = module.bind({"params": initial}).backbone
        pooled = backbone.text_features(text, backbone.text_states(text)).pooled
        expected = layers.normalize(expected + layers.normalize(pooled))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_dropout_only_in_training(model, backbone):
    if backbone in TWO_TOWERS:
        pytest.skip("these towers have no dropout")
    config = small_model_config(backbone, **{f"model.{backbone}.dropout": 0.5})
    module, params = build_small_model(config), model[1]

    @jax.jit
    def train(key):
        return module.apply({"params": params}, *inputs(), rngs={"dropout": key}).query.embedding

    first, same, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 1e-3
    # Without training it needs no key.
    jax.eval_shape(lambda: module.apply({"params": params}, *inputs(), train=False))


def test_a_zero_vector_stays_zero_with_a_finite_gradient():
    zero = jnp.zeros((1, 4))
    np.testing.assert_array_equal(layers.normalize(zero), zero)
    gradient = jax.grad(lambda x: layers.normalize(x).sum())(zero)
    assert np.isfinite(gradient).all()


def test_parameters_of_the_default_config():
    """Counted by hand for the default sizes, a vocabulary of 100 and 4 attributes."""
    config = RunConfig().with_changes({"model.attributes.names": ("a", "b", "c", "d")})
    module = models.build_model(config.model, vocab_size=100, max_length=24, image_size=64)
    params = jax.eval_shape(lambda: setup.init_params(module, config.model, config.data))
    counts = summary.count_parameters(params, models.parts_of("tiny"))

    def dense(inputs, outputs):
        return inputs * outputs + outputs

    def attention(width, context=None):
        inputs = (
            dense(width, width) + dense(context, 2 * width) if context else dense(width, 3 * width)
        )
        return inputs + dense(width, width)

    D, d, patches, token = 128, 256, 16, 64
    norm = 2 * D
    block = 2 * norm + attention(D) + dense(D, 4 * D) + dense(4 * D, D)
    cross = block + norm + attention(D, D)
    head = norm + dense(D, token) + dense(patches * token, d)
    expected = {
        "vision": dense(8 * 8 * 3, 64) + dense(4 * 64, D) + patches * D + 4 * block,
        "text": 100 * D + 24 * D + norm + 2 * block,
        "composer": 2 * cross + head,
        "projections": head,
        # Queries, text condition, attention over the tokens, norm, weights, contribution.
        "attributes": 4 * D
        + dense(D, D)
        + attention(D, D)
        + norm
        + dense(D, D)
        + dense(D, 4)
        + D * d,
        "temperature": 1,
    }
    assert counts == expected
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_every_parameter_is_in_exactly_one_part(initial, backbone):
    parts = models.parts_of(backbone)
    for path in flatten_dict(initial, sep="/"):
        holders = [
            p for p, patterns in parts.items() if freeze.part_of(path, {p: patterns, "": "*"}) == p
        ]
        assert len(holders) == 1, (path, holders)
    # This model has no adapters.
    assert set(summary.count_parameters(initial, parts)) == set(parts) - {freeze.ADAPTERS}


@pytest.mark.parametrize(
    "backbone",
    [
        pytest.param(name, marks=() if name == "clip" else pytest.mark.slow)
        for name in sorted(models.PRETRAINED)
    ],
    indirect=True,
)
@pytest.mark.parametrize(
    ("remat", "scan"), [pytest.param(True, False, marks=pytest.mark.slow), (True, True)]
)
def test_remat_and_scan_change_nothing(model, backbone, remat, scan):
    _, params, query, gallery = model
    changes = {"model.remat": remat, "model.scan_layers": scan}
    module = build_small_model(small_model_config(backbone, **changes))
    same = stack_layers(params) if scan else params
    reference, text, target = inputs()
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), reference, text, target, train=False)
    )
    assert jax.tree.map(jnp.shape, same) == jax.tree.map(lambda x: x.shape, shapes["params"])
    flat_reference, flat_text, _ = flat_inputs()
    other_query, other_gallery = entry_points(module)
    close = {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(
        query(params, flat_reference, flat_text).embedding,
        other_query(same, flat_reference, flat_text).embedding,
        **close,
    )
    np.testing.assert_allclose(gallery(params, reference), other_gallery(same, reference), **close)

    def gradient(module, params):
        def loss(p):
            out = module.apply({"params": p}, reference, text, target, train=False)
            return (out.query.embedding * out.target[:, 0]).sum()

        return jax.jit(jax.grad(loss))(params)

    expected = gradient(model[0], params)
    expected = stack_layers(expected) if scan else expected
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
        gradient(module, same),
        expected,
    )
