"""The training step: the same on any number of devices, and equal to its plain statement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import shapes
from dqe_jax.config import RunConfig
from dqe_jax.distributed import mesh
from dqe_jax.method.batch import Batch
from dqe_jax.method.mining import MiningRule, draw
from dqe_jax.method.objective import Objective
from dqe_jax.models.build import build_model
from dqe_jax.training.optimizer import make_optimizer
from dqe_jax.training.state import TrainState
from dqe_jax.training.step import StepParts, make_train_step
from dqe_jax.utils.errors import UserError

# Eight units of two references, of which the first has two queries and the second has one.
R, B, L, P, SIZE, VOCAB, PHOTOS = 16, 24, 6, 3, 32, 20, 14
REFERENCE = (2 * np.arange(8)[:, None] + np.array([0, 0, 1])).ravel().astype(np.int32)
RULES = ("trns", "random", "hardest", "in_batch")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compilation is most of these tests' time, and no test here is about the compiler's work."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def make_config(rule="trns", **changes):
    config = shapes.get_config("smoke")
    tiny = config.model.tiny
    tiny.image_depth, tiny.text_depth, tiny.composer_depth = 0, 0, 1
    config.data.image_size, config.data.max_length = SIZE, L
    config.model.tiny.patch_size = 16
    config.negatives.rule, config.negatives.per_query = rule, 5
    config.optimizer.warmup_steps = 0
    config.loss.alignment = 0.1  # which the config of shapes leaves out
    config.update_from_flattened_dict(changes)
    return RunConfig.of(config)


def make_model(config):
    return build_model(config.model, vocab_size=VOCAB, max_length=L, image_size=SIZE)


@functools.cache
def init_params(enabled=True):
    config = make_config(**{"model.attributes.enabled": enabled})
    batch = make_batch(0)
    model = make_model(config)

    @jax.jit
    def init(key):
        images = batch.reference_image, batch.text, batch.target_image, batch.reference
        return model.init({"params": key}, *images, train=False)["params"]

    params = init(jax.random.key(0))
    # Zero-initialised heads hide mistakes: every parameter gets values.
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    moved = [x + np.float32(0.05) * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return params, jax.tree.unflatten(tree, moved)


@functools.cache
def make_batch(seed, padding=True):
    """Image ids repeat across rows, positives are several, and some rows are padding."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, PHOTOS, B).astype(np.int32)
    target[-3] = target[0]  # the first and the last device share a target's image
    known = rng.integers(-1, PHOTOS, (B, P)).astype(np.int32)
    known[:, 0] = target
    text = rng.integers(2, VOCAB, (B, L)).astype(np.int32)
    text[:, 4:] *= rng.integers(0, 2, (B, 1)).astype(np.int32)
    query_mask = np.ones(B, bool)
    if padding:
        query_mask[[5, 10, 21, 22, 23]] = False  # some references have no query at all
    return Batch(
        reference_image=rng.integers(0, 256, (R, SIZE, SIZE, 3)).astype(np.uint8),
        reference_id=rng.integers(0, PHOTOS, R).astype(np.int32),
        reference_mask=np.bincount(REFERENCE, query_mask) > 0,
        reference=REFERENCE,
        text=text,
        target_image=rng.integers(0, 256, (B, SIZE, SIZE, 3)).astype(np.uint8),
        query=np.arange(B, dtype=np.int32),
        target_id=target,
        target_row=target,
        relevant=np.zeros((B, 0), np.int32),
        known_positives=known,
        mentions=rng.integers(0, 2, (B, 4)).astype(np.float32),
        query_mask=query_mask,
    )


def objective_of(config):
    return Objective(
        apply_fn=make_model(config).apply,
        rule=MiningRule.of(config.negatives),
        oracle=config.negatives.oracle,
        weights=config.loss,
        axis=mesh.AXIS,
    )


def on_one_device(fn):
    """`fn(params, batch, key)` over the axis of a mesh of one device, compiled."""

    def call(params, batch, key):
        mapped = jax.vmap(fn, in_axes=(None, 0, None), axis_name=mesh.AXIS)
        out = mapped(params, jax.tree.map(lambda x: x[None], batch), key)
        return jax.tree.map(lambda x: x[0], out)

    return jax.jit(call)


def make_step(config, tx, num_devices, wrap=lambda f: f):
    """The step as `training/loop.py` maps it, and the devices."""
    devices = jax.devices("cpu")[:num_devices]
    if len(devices) < num_devices:
        pytest.skip(f"needs {num_devices} devices")
    step = make_train_step(StepParts(objective_of(config), tx, seed=7))
    mapped = mesh.pmap(
        wrap(step), in_axes=(None, 0, 0), out_axes=None, donate_argnums=(0,), devices=devices
    )
    return mapped, devices


def start_state(tx, devices, params):
    params = jax.tree.map(jnp.array, params)  # donated: a copy
    state = TrainState(jnp.asarray(0, jnp.int32), params, jax.jit(tx.init)(params))
    return mesh.replicate(state, devices)


@functools.cache
def three_steps(rule, num_devices):
    """Metrics of each step and the parameters after; plain SGD, so that they show the gradients."""
    tx = optax.sgd(0.05)
    step, devices = make_step(make_config(rule), tx, num_devices)
    state, history = start_state(tx, devices, init_params()[1]), []
    for i in range(3):
        batch, stop = mesh.shard(make_batch(i), num_devices), np.zeros((num_devices, 1), np.int32)
        output = step(state, batch, stop)
        state = output.state
        history.append(jax.device_get(output.metrics))
    return history, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("rule", "num_devices"),
    # What the rules draw on several devices is tested in `mining_test.py`.
    [("trns", 8)]
    + [
        pytest.param(rule, number, marks=pytest.mark.slow)
        for rule in RULES
        for number in (2, 4, 8)
        if (rule, number) != ("trns", 8)
    ],
)
def test_same_on_any_number_of_devices(rule, num_devices):
    one, one_params = three_steps(rule, 1)
    many, many_params = three_steps(rule, num_devices)
    assert [m.keys() for m in one] == [m.keys() for m in many]
    for a, b in zip(one, many):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=2e-5, atol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5), one_params, many_params
    )
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one_params, start())))]
    assert np.mean(np.array(moved) > 1e-4) > 0.9  # the comparison is of parameters that moved


def start():
    return jax.device_get(init_params()[1])


def plain_loss(config, out, batch, indices, drawn):
    """The loss in loops: `indices`, `drawn` `[B, n]` are the mined negatives."""
    tau, bias = float(out.tau), None if out.bias is None else float(out.bias)
    q = np.asarray(out.query.embedding, np.float64)
    target, reference = (np.asarray(x, np.float64) for x in (out.target, out.reference))
    pool = np.concatenate([target, reference])
    ids = np.concatenate([batch.target_id, batch.reference_id])
    query_mask, known = batch.query_mask, batch.known_positives
    usable = np.concatenate([query_mask, batch.reference_mask])

    def score(i, c):
        return max(q[i] @ token for token in pool[c])

    def negative(i, c):
        return usable[c] and ids[c] not in known[i]

    def cross_entropy(positive, negatives):
        logits = np.array([positive, *negatives]) / tau
        return np.log(np.exp(logits).sum()) - logits[0]

    parts = {name: [] for name in ("in_batch", "preference", "margin", "intent", "alignment")}
    w, a, b = (
        np.asarray(x, np.float64)
        for x in (
            out.query.attribute_weights,
            out.query.attribute_features,
            out.target_attribute_features,
        )
    )
    mentions = batch.mentions
    for i in np.flatnonzero(query_mask):
        s = score(i, i)
        rows = [score(i, c) for c in range(len(pool)) if negative(i, c)]
        columns = [score(j, i) for j in range(B) if j != i and query_mask[j] and negative(j, i)]
        if config.loss.in_batch_form == "sigmoid":
            logits = np.array([s / tau + bias, *(-(x / tau + bias) for x in rows)])
            parts["in_batch"].append(np.log1p(np.exp(-logits)).sum())
        else:
            parts["in_batch"].append((cross_entropy(s, rows) + cross_entropy(s, columns)) / 2)
        mined = [score(i, c) for c, kept in zip(indices[i], drawn[i]) if kept]
        assert all(negative(i, c) for c, kept in zip(indices[i], drawn[i]) if kept)
        parts["preference"].append(
            np.mean([np.log(1 + np.exp((n - s) / tau)) for n in mined] or [0])
        )
        parts["margin"].append(
            np.mean([max(0, config.loss.margin_size - (s - n)) for n in mined] or [0])
        )
        y = mentions[i]
        entropy = -(y * np.log(w[i]) + (1 - y) * np.log(1 - w[i])).mean()
        parts["intent"].append(entropy if y.any() else 0)
        length = np.linalg.norm(a[i], axis=-1) * np.linalg.norm(b[i], axis=-1)
        cosine = (a[i] * b[i]).sum(-1) / length
        parts["alignment"].append((w[i] * (1 - cosine)).sum() / w[i].sum())
    means = {name: np.mean(values) for name, values in parts.items()}
    return means, sum(getattr(config.loss, name) * value for name, value in means.items())


@pytest.mark.parametrize("rule", ["hardest", "trns"])
def test_loss_equals_its_plain_statement(rule):
    config, batch, key = make_config(rule), make_batch(3), jax.random.key(5)
    params = init_params()[1]
    images = batch.reference_image, batch.text, batch.target_image, batch.reference
    out = jax.jit(make_model(config).apply)({"params": params}, *images)
    loss, metrics = on_one_device(objective_of(config))(params, batch, key)

    scores = np.einsum(
        "bd,nd->bn", out.query.embedding, np.concatenate([out.target, out.reference])[:, 0]
    )
    delta = np.diag(scores[:, :B])[:, None] - scores
    ids = np.concatenate([batch.target_id, batch.reference_id])
    usable = np.concatenate([batch.query_mask, batch.reference_mask])
    known = batch.known_positives
    forbidden = np.array([[c in row for c in ids] for row in known])
    forbidden |= ~usable[None] | ~batch.query_mask[:, None]
    if rule == "hardest":
        order = np.argsort(np.where(forbidden, np.inf, delta), axis=1, kind="stable")[:, :5]
        indices, drawn = order, ~np.take_along_axis(forbidden, order, 1)
    else:
        sample_key = jax.random.split(key)[0]
        mined = draw(sample_key, delta, forbidden, np.arange(B), MiningRule.of(config.negatives))
        indices, drawn = mined.rows, mined.drawn
    means, expected = plain_loss(config, out, batch, np.asarray(indices), np.asarray(drawn))
    for name, value in means.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert all(value > 0 for value in means.values())


SIGMOID = {"loss.in_batch_form": "sigmoid", "model.initial_bias": -2.0}


def with_bias():
    return {**init_params()[1], "logit_bias": jnp.float32(-2.5)}


def test_the_sigmoid_form_equals_its_plain_statement():
    config, batch = make_config("in_batch", **SIGMOID), make_batch(3)
    images = batch.reference_image, batch.text, batch.target_image, batch.reference
    out = jax.jit(make_model(config).apply)({"params": with_bias()}, *images)
    value = on_one_device(jax.value_and_grad(objective_of(config), has_aux=True))
    (_, metrics), grads = value(with_bias(), batch, jax.random.key(5))
    none = np.zeros((B, 0), int)
    means, _ = plain_loss(config, out, batch, none, none)
    np.testing.assert_allclose(metrics["loss/in_batch"], means["in_batch"], rtol=1e-4)
    assert np.abs(grads["logit_bias"]) > 1e-3
    assert np.abs(grads["log_scale"]) > 1e-3


@pytest.mark.slow
def test_the_sigmoid_form_is_the_same_on_eight_devices():
    tx, found = optax.sgd(0.01), []
    for number in (1, 8):
        step, devices = make_step(make_config("in_batch", **SIGMOID), tx, number)
        state = start_state(tx, devices, with_bias())
        batch, stop = mesh.shard(make_batch(0), number), np.zeros((number, 1), np.int32)
        found.append(jax.device_get(step(state, batch, stop)))
    one, eight = found
    for name, value in one.metrics.items():
        np.testing.assert_allclose(eight.metrics[name], value, rtol=2e-5, atol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5),
        one.state.params,
        eight.state.params,
    )
    assert abs(one.state.params["logit_bias"] + 2.5) > 1e-4


def test_the_sigmoid_form_needs_a_bias():
    with pytest.raises(UserError, match=r"in_batch_form is 'sigmoid'.*config\.model\.initial_bias"):
        make_config("in_batch", **{"loss.in_batch_form": "sigmoid"})


def test_the_preference_term_of_one_softmax():
    """As InfoNCE over the mined negatives: above the mean over pairs, and of one the same."""
    batch, key, params = make_batch(3), jax.random.key(5), init_params()[1]
    found = {
        form: on_one_device(objective_of(make_config("hardest", **{"loss.form": form})))(
            params, batch, key
        )[1]["loss/preference"]
        for form in ("pairs", "softmax")
    }
    assert found["softmax"] > found["pairs"] > 0
    one = {
        form: on_one_device(
            objective_of(make_config("hardest", **{"loss.form": form, "negatives.per_query": 1}))
        )(params, batch, key)[1]["loss/preference"]
        for form in ("pairs", "softmax")
    }
    np.testing.assert_allclose(one["softmax"], one["pairs"], rtol=1e-5)  # of one negative the same


def test_an_oracle_takes_what_is_in_truth_valid_for_known_positives():
    batch, key, params = make_batch(3), jax.random.key(5), init_params()[1]
    relevant = np.random.default_rng(0).integers(-1, PHOTOS, (B, 4)).astype(np.int32)
    known = np.concatenate([batch.known_positives, relevant], axis=-1)

    def metrics(oracle, **changes):
        config = make_config("trns", **{"negatives.oracle": oracle})
        return on_one_device(objective_of(config))(params, batch.replace(**changes), key)[1]

    none, mined, whole = (metrics(oracle, relevant=relevant) for oracle in ("none", "mined", "all"))
    told = metrics("none", relevant=relevant, known_positives=known)
    for name, value in told.items():  # "all": as if the valid ones were annotated
        np.testing.assert_allclose(whole[name], value, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(mined["loss/in_batch"], none["loss/in_batch"])
    np.testing.assert_array_equal(mined["loss/preference"], whole["loss/preference"])
    assert none["negatives/false"] > 0
    assert mined["negatives/false"] == whole["negatives/false"] == 0
    assert whole["loss/in_batch"] < none["loss/in_batch"]  # fewer negatives


@pytest.mark.parametrize("rule", ["trns", "in_batch"])
def test_padding_changes_nothing(rule):
    config, batch = make_config(rule), make_batch(4)
    other, changed = make_batch(5), jax.tree.map(np.copy, batch)
    padding = ~batch.query_mask
    for name in ("text", "target_image", "target_id", "known_positives", "mentions"):
        getattr(changed, name)[padding] = getattr(other, name)[padding]
    nobody = ~batch.reference_mask  # a reference that is padding as a whole
    assert nobody.any()
    for name in ("reference_image", "reference_id"):
        getattr(changed, name)[nobody] = getattr(other, name)[nobody]
    value = on_one_device(jax.value_and_grad(objective_of(config), has_aux=True))
    one, two = (value(init_params()[1], b, jax.random.key(1)) for b in (batch, changed))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # They are rows that would count: the same change without the mask is seen.
    full = {"query_mask": np.ones(B, bool), "reference_mask": np.ones(R, bool)}
    losses = [
        value(init_params()[1], b.replace(**full), jax.random.key(1))[0][0]
        for b in (batch, changed)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_batch_of_padding_alone_is_zero_and_finite():
    config = make_config("trns")
    none = {"query_mask": np.zeros(B, bool), "reference_mask": np.zeros(R, bool)}
    batch = make_batch(6).replace(**none)
    # One query and, but for its reference, nothing to compare with.
    batch.query_mask[0] = batch.reference_mask[0] = True
    value = on_one_device(jax.value_and_grad(objective_of(config), has_aux=True))
    (loss, _), grads = value(init_params()[1], batch, jax.random.key(0))
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_gradients_reach_the_attribute_weights():
    # From the true start, where the contribution to the query is zero, and without the attribute
    # terms: what the query's own loss teaches.
    config = make_config("trns", **{"loss.intent": 0.0, "loss.alignment": 0.0})
    tx = make_optimizer(config.optimizer, 100)
    value = on_one_device(jax.grad(objective_of(config), has_aux=True))
    params = init_params()[0]
    assert not np.any(params["attributes"]["contribution"]["kernel"])
    opt_state = jax.jit(tx.init)(params)

    @jax.jit
    def update(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for step in range(2):
        grads, _ = value(params, make_batch(step), jax.random.key(step))
        params, opt_state = update(grads, opt_state, params)
        if step == 0:
            assert np.any(grads["attributes"]["contribution"]["kernel"])
    found = jax.tree_util.tree_leaves_with_path(grads["attributes"])
    assert len(found) >= 12
    for path, grad in found:
        assert np.abs(grad).max() > 1e-9, jax.tree_util.keystr(path)
    assert np.abs(grads["log_scale"]) > 1e-6


@pytest.mark.parametrize("name", ["intent", "alignment"])
def test_attribute_terms_teach_from_the_first_step(name):
    zero = {f"loss.{n}": 0.0 for n in ("in_batch", "preference", "margin", "intent", "alignment")}
    config = make_config("in_batch", **{**zero, f"loss.{name}": 1.0})
    grads, _ = on_one_device(jax.grad(objective_of(config), has_aux=True))(
        init_params()[0], make_batch(0), jax.random.key(0)
    )
    part = {"intent": "weight_out", "alignment": "attention"}[name]
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads["attributes"][part]))
    assert largest > 1e-5


def test_weighting_starts_as_the_plain_composer_and_is_it_at_zero_weights():
    with_weights = make_model(make_config())
    without = make_model(make_config(**{"model.attributes.enabled": False}))
    batch = make_batch(0)
    image, text = batch.target_image[:R], batch.text[:R]

    @functools.partial(jax.jit, static_argnums=0)
    def query(model, params):
        return model.apply({"params": params}, image, text, method="encode_query")

    at_start, moved = init_params()
    for params in (at_start, moved):
        plain = {name: tree for name, tree in params.items() if name != "attributes"}
        composed = query(without, plain)
        assert composed.attribute_weights.shape == (R, 0)
        if params is at_start:
            weighted = query(with_weights, params)
            assert weighted.attribute_weights.shape == (R, 4)
            np.testing.assert_array_equal(weighted.embedding, composed.embedding)
            continue
        assert np.abs(query(with_weights, params).embedding - composed.embedding).max() > 1e-3
        out = params["attributes"]["weight_out"]
        off = {"kernel": out["kernel"], "bias": np.full_like(out["bias"], -1e9)}
        switched = query(
            with_weights, params | {"attributes": params["attributes"] | {"weight_out": off}}
        )
        np.testing.assert_array_equal(switched.attribute_weights, 0)
        np.testing.assert_array_equal(switched.embedding, composed.embedding)


def test_attributes_do_not_change_how_the_backbone_starts():
    plain, weighted = init_params(enabled=False)[0], init_params(enabled=True)[0]
    assert plain.keys() == weighted.keys() - {"attributes"}
    jax.tree.map(np.testing.assert_array_equal, plain, {k: weighted[k] for k in plain})


def test_trains_without_attributes():
    config = make_config("trns", **{"model.attributes.enabled": False})
    loss, metrics = on_one_device(objective_of(config))(
        init_params(enabled=False)[1], make_batch(0), jax.random.key(0)
    )
    assert np.isfinite(loss)
    assert "loss/intent" not in metrics
    assert "loss/alignment" not in metrics


def test_one_compilation_donated_state_and_no_transfer(caplog):
    config = make_config("trns")
    tx = make_optimizer(config.optimizer, 100)
    traces = []

    def counted(step):
        def wrapped(state, batch, stop):
            traces.append(1)
            return step(state, batch, stop)

        return wrapped

    step, devices = make_step(config, tx, 4, counted)
    state, stop = start_state(tx, devices, init_params()[0]), np.zeros((4, 1), np.int32)
    compilations = []
    for i in range(5):
        batch, before = mesh.shard(make_batch(i), 4), state
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            output = step(state, batch, stop)
            state = output.state
        compilations.append(sum("XLA compilation" in r.getMessage() for r in caplog.records))
        # Scalars apart: optax keeps a flag that no step reads.
        assert all(x.is_deleted() for x in jax.tree.leaves(before) if x.ndim)
    assert len(traces) == 1
    assert compilations[0] >= 1
    assert compilations[1:] == [0] * 4
    assert int(state.step) == 5
    assert all(np.isfinite(v) for v in output.metrics.values())

    # The step alone moves nothing between host and devices.
    own_mesh = jax.sharding.Mesh(np.asarray(devices), (mesh.AXIS,))
    spec = jax.sharding.NamedSharding(own_mesh, jax.sharding.PartitionSpec(mesh.AXIS))
    placed = jax.device_put((mesh.shard(make_batch(6), 4), stop), spec)
    state = jax.block_until_ready(step(state, *placed)).state
    with jax.transfer_guard("disallow"):
        output = jax.block_until_ready(step(state, *placed))
    assert int(output.state.step) == 7


def test_bfloat16_step_is_finite_and_near_float32():
    values = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config("in_batch", **{"model.dtype": dtype})
        value = on_one_device(jax.value_and_grad(objective_of(config), has_aux=True))
        (loss, _), grads = value(init_params()[1], make_batch(0), jax.random.key(0))
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        values[dtype] = float(loss)
    assert values["bfloat16"] == pytest.approx(values["float32"], rel=0.05)


def test_one_batch_is_learnt_by_heart():
    tx = optax.adam(3e-3)
    step, devices = make_step(make_config("trns"), tx, 1)
    state = start_state(tx, devices, start())
    batch, stop = mesh.shard(make_batch(0), 1), np.zeros((1, 1), np.int32)
    losses = []
    for _ in range(60):
        output = step(state, batch, stop)
        state = output.state
        losses.append(float(output.metrics["loss/in_batch"]))
    assert losses[0] > 2
    assert losses[-1] < 0.1
