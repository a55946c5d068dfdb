"""Backbones give what PyTorch gives: from golden files, and live where torch is installed."""

import dataclasses
import functools
import gc
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from dqe_jax.models import dino
from dqe_jax.models.build import BACKBONES, VARIANTS
from dqe_jax.models.encoder import Compute, flash_takes, grid_of
from dqe_jax.models.weights import hugging_face, initial, rules, sizes, transfer
from dqe_jax.models.weights.source import open_source
from dqe_jax.models.weights.stacking import stack_layers

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
NAMES = ("clip", "siglip", "blip2")
# Families of DINO, and the golden model whose text tower each gets.
DINO = {"dinov2": "clip", "dinov2_with_registers": "clip", "dinov3_vit": "siglip"}


@functools.cache
def torch_models():
    pytest.importorskip("torch", reason="PyTorch is not installed; the golden files are compared")
    from dqe_jax.testing import torch_models

    return torch_models


def load(directory, name, image_size=32, compute=None, **fields):
    """The backbone of a Hugging Face directory, and its parameters."""
    source = open_source(str(directory))
    its_sizes = sizes.from_hugging_face(name, source.config, str(directory))
    module = BACKBONES[name](its_sizes, image_size, compute=compute or Compute(), **fields)
    return module, transfer.read_backbone(source, name, its_sizes)


def load_dino(directory, text, image_size=32, compute=None):
    """DINO of a directory with the text tower of a golden model, and its parameters."""
    opened = initial.open_dino(str(directory), str(GOLDEN / text), "auto", "auto")
    module = BACKBONES["dino"](opened.sizes, image_size, "last", compute=compute or Compute())
    return module, opened.read()


def dino_outputs_of(module, params, image):
    """The same outputs as `torch_models.dino_outputs` gives."""

    def call(*args, method):
        return module.apply({"params": params}, *args, method=method)

    last, before = call(image, method=lambda m, x: m.vision(x))
    last = call(last, method=lambda m, x: m.vision.norm(x))
    states = call(image, method="image_states")
    skipped = 1 + module.sizes.vision.registers
    np.testing.assert_allclose(states["tokens"], last[:, skipped:], atol=1e-6)
    return {"last": last, "penultimate": before, "pooled": states["pooled"]}


def image_of(call, image):
    return call(call(image, method="image_states"), method="image_features")


def text_of(call, ids):
    return call(ids, call(ids, method="text_states"), method="text_features")


def outputs_of(name, module, params, image, ids):
    """The same outputs as `torch_models` gives, from our modules."""

    def call(*args, method=None):
        return module.apply({"params": params}, *args, method=method)

    ids = np.asarray(ids, np.int32)
    text = text_of(call, ids)
    features = image_of(call, image)
    scores = call(image, ids[: len(image)]) if name == "blip2" else call(image, ids)
    out = {"text_tokens": text.tokens * text.mask[..., None], "text": text.pooled}
    if name in ("clip", "siglip"):
        last, before = call(image, method=lambda m, x: m.vision(x))
        # Tokens that composer and attributes see leave out the class token.
        seen = before if name == "siglip" else before[:, 1:]
        np.testing.assert_array_equal(features.tokens, seen)
        if name == "siglip":
            last = call(last, method=lambda m, x: m.vision.norm(x))
            of_last = module.clone(features="last").apply
            states = of_last({"params": params}, image, method="image_states")
            np.testing.assert_array_equal(states["tokens"], last)
        return out | {
            "last": last,
            "penultimate": before,
            "image": features.gallery[:, 0],
            "scores": scores,
        }
    paired = ids[: len(image)]
    composed = call(features, text_of(call, paired), method="compose")
    every = module.apply({"params": params}, image, ids[: len(image)])
    contrast = np.einsum("imd,td->itm", unit(features.gallery), unit(text.pooled)).max(-1)
    np.testing.assert_allclose(every[0], contrast[:, : len(image)], atol=1e-5)
    return out | {
        "tokens": features.tokens,
        "gallery": features.gallery,
        "fused": call(features.tokens, paired, method="fuse"),
        "composed": composed,
        "scores": contrast,
        "matching": every[1],
    }


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def assert_close(ours, theirs, tolerance=1e-4):
    assert set(ours) == set(theirs)
    for key, expected in theirs.items():
        expected, got = np.asarray(expected), np.asarray(ours[key])
        assert got.shape == expected.shape, key
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < tolerance, (key, error)


def golden(name):
    arrays = load_file(GOLDEN / f"{name}_outputs.safetensors")
    return arrays.pop("input_image"), arrays.pop("input_ids"), arrays


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    """Name, PyTorch model and its directory."""
    models = torch_models()
    directory = tmp_path_factory.mktemp(request.param)
    model = models.MODELS[request.param][0]()
    model.save_pretrained(directory)
    return request.param, model, directory


@pytest.mark.parametrize("name", NAMES)
def test_golden_files(name):
    image, ids, expected = golden(name)
    module, params = load(GOLDEN / name, name)
    assert_close(outputs_of(name, module, params, image, ids), expected)


@pytest.mark.parametrize("name", DINO)
def test_golden_files_of_dino(name):
    image, ids, expected = golden(name)
    text = DINO[name]
    module, params = load_dino(GOLDEN / name, text)
    assert_close(dino_outputs_of(module, params, image), expected)
    # Texts are read as by the model that the text tower is of.
    call = functools.partial(module.apply, {"params": params})
    other, own = load(GOLDEN / text, text)
    theirs = text_of(functools.partial(other.apply, {"params": own}), np.int32(ids))
    for one, two in zip(jax.tree.leaves(text_of(call, np.int32(ids))), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(one, two, atol=1e-6)
    half, _ = load_dino(GOLDEN / name, text, compute=Compute(jnp.bfloat16))
    low = half.apply({"params": params}, image, method="image_states")["pooled"]
    apart = np.abs(unit(np.float32(low)) - unit(expected["pooled"])).max()
    assert 0 < apart < 2e-2


@pytest.mark.parametrize("name", DINO)
def test_gradients_of_dino(name):
    """Those of PyTorch, from golden files."""
    theirs = load_file(GOLDEN / f"{name}_gradients.safetensors")
    image = theirs.pop("input_image")
    weights = {key: theirs.pop(f"weights_of_{key}") for key in ("last", "pooled")}
    module, params = load_dino(GOLDEN / name, DINO[name])

    def loss(params):
        last, _ = module.apply({"params": params}, image, method=lambda m, x: m.vision(x))
        last = module.apply({"params": params}, last, method=lambda m, x: m.vision.norm(x))
        return (last * weights["last"]).sum() + (last[:, 0] * weights["pooled"]).sum()

    ours = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    layout = next(
        one
        for one in rules.layouts_of(module.sizes)
        if all(set(rule.names) <= theirs.keys() for rule in one.rules if "vision/" in rule.path)
    )
    seen = [rule for rule in layout.rules if rule.path.startswith("vision/")]
    assert {rule.path for rule in seen} == {path for path in ours if path.startswith("vision/")}
    for rule in seen:
        expected = transfer.to_parameter(rule, [theirs[tensor] for tensor in rule.names])
        scale = max(np.abs(expected).max(), 1e-3)
        assert np.abs(ours[rule.path] - expected).max() / scale < 1e-3, rule.path


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dinov2", {}),
        pytest.param("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 4}, marks=pytest.mark.slow),
        pytest.param("dinov2_with_registers", {"qkv_bias": False}, marks=pytest.mark.slow),
        pytest.param(
            "dinov3_vit",
            {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
            marks=pytest.mark.slow,
        ),
        ("dinov3_vit", {"use_gated_mlp": True}),
    ],
)
def test_a_round_trip_of_dino(name, fields, tmp_path):
    """PyTorch to Flax, changed, and back: `transformers` loads both towers by their directories."""
    models = torch_models()
    import torch
    import transformers

    model = models.small_dino(name, **fields)
    model.save_pretrained(tmp_path / "theirs")
    image, ids = models.inputs()
    module, params = load_dino(tmp_path / "theirs", DINO[name])
    with torch.no_grad():
        expected = models.dino_outputs(model, image, ids)
    assert_close(dino_outputs_of(module, params, image), expected)
    moved = jax.tree.map(lambda x: x + 0.01, params)
    meta = {
        "config": {"model": {"backbone": "dino"}, "data": {"image_size": 32}},
        "sizes": sizes.to_json(module.sizes),
        "tokenizer": None,
    }
    assert sizes.from_json("dino", json.loads(json.dumps(meta["sizes"]))) == module.sizes
    out = tmp_path / "ours"
    whole = {"backbone": stack_layers(moved), "log_scale": np.float32(1)}
    hugging_face.write(out, whole, meta)
    again, info = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(again) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        returned = models.dino_outputs(again.eval(), image, ids)
    assert_close(dino_outputs_of(module, moved, image), returned)
    kind = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel"}[DINO[name]]
    text, info = getattr(transformers, kind).from_pretrained(out / "text", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in text.parameters()) == sum(
        x.size for path, x in flatten_dict(moved).items() if path[0] != "vision"
    )
    read = initial.open_dino(str(out), str(out / "text"), "auto", "auto")
    assert read.sizes == module.sizes
    jax.tree.map(np.testing.assert_array_equal, read.read(), moved)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("clip", "vit_b_32"),
        ("clip", "vit_l_14"),
        ("siglip", "vit_b_16"),
        ("siglip", "vit_l_16"),
        ("siglip", "so400m_14"),
        ("blip2", "vit_g_14"),
    ],
)
def test_full_size(name, variant, tmp_path):
    """Up to 16 GB of memory for ViT-g."""
    models = torch_models()
    import torch
    import transformers

    its_sizes = VARIANTS[name][variant]
    fields = hugging_face.config_of(its_sizes)
    kind, config = {
        "clip": (transformers.CLIPModel, transformers.CLIPConfig),
        "siglip": (transformers.SiglipModel, transformers.SiglipConfig),
        "blip2": (transformers.Blip2ForImageTextRetrieval, transformers.Blip2Config),
    }[name]
    model = models.randomize(kind(config.from_dict(fields)), scale=0.02)
    end = its_sizes.end_id if name == "clip" else 102
    size = its_sizes.vision.image_size
    image, ids = models.inputs(texts=2, images=1, size=size, vocab=its_sizes.vocab_size, end=end)
    with torch.no_grad():
        expected = models.MODELS[name][1](model, image, ids)
    model.save_pretrained(tmp_path)
    del model
    gc.collect()
    module, params = load(tmp_path, name, image_size=size)
    assert module.sizes == its_sizes
    assert_close(outputs_of(name, module, params, image, ids), expected)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    ["dinov2_vit_b_14", "dinov2_vit_b_14_reg", "dinov2_vit_g_14", "dinov3_vit_b_16"],
)
def test_full_size_of_dino(variant, tmp_path):
    """Up to 16 GB of memory for ViT-g."""
    models = torch_models()
    import torch
    import transformers

    vision, family = dino.TOWERS[variant]
    text = load(GOLDEN / "clip", "clip")[0].sizes
    fields = hugging_face.config_of(dino.DinoSizes(vision, family, text))
    config = transformers.AutoConfig.for_model(**fields)
    model = models.randomize(transformers.AutoModel.from_config(config), scale=0.02)
    image, _ = models.inputs(images=1, size=vision.image_size)
    with torch.no_grad():
        expected = models.dino_outputs(model, image, None)
    model.save_pretrained(tmp_path)
    del model
    gc.collect()
    module, params = load_dino(tmp_path, "clip", image_size=vision.image_size)
    assert module.sizes.vision == vision
    assert_close(dino_outputs_of(module, params, image), expected)


@pytest.mark.slow  # golden files are compared always
@pytest.mark.torch
def test_live(saved):
    name, model, directory = saved
    models = torch_models()
    image, ids = models.inputs(texts=5, images=4, seed=1)
    import torch

    with torch.no_grad():
        expected = models.MODELS[name][1](model, image, ids)
    module, params = load(directory, name)
    assert_close(outputs_of(name, module, params, image, ids), expected)


@pytest.mark.slow  # golden files are compared always
@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip", {"activation": "gelu"}),
        ("clip", {"end_id": 2}),
        ("siglip", {"activation": "gelu", "text_width": 12}),
        ("blip2", {"qkv_bias": False}),
    ],
)
def test_live_variants(name, options, tmp_path):
    models = torch_models()
    import torch

    make, outputs = models.MODELS[name]
    model = make(**options)
    model.save_pretrained(tmp_path)
    image, ids = models.inputs()
    module, params = load(tmp_path, name)
    if options.get("end_id") == 2:
        # The highest id ends a text in models that were saved with the wrong id, 2.
        mask = torch.from_numpy((ids > 0).astype(np.int64))
        with torch.no_grad():
            text = model.text_model(torch.from_numpy(ids), attention_mask=mask)
            expected = model.text_projection(text.pooler_output)
        call = functools.partial(module.apply, {"params": params})
        ours = text_of(call, np.int32(ids)).pooled
        return assert_close({"text": ours}, {"text": expected})
    with torch.no_grad():
        expected = outputs(model, image, ids)
    return assert_close(outputs_of(name, module, params, image, ids), expected)


@pytest.mark.torch
def test_metaclip_2(tmp_path):
    """CLIP's form under another name, whose texts end with the first token of id 2."""
    models = torch_models()
    import torch
    import transformers

    if not hasattr(transformers, "MetaClip2Model"):
        pytest.skip("this release of transformers has no MetaCLIP 2")
    model = models.small_metaclip_2()
    model.save_pretrained(tmp_path / "theirs")
    image, ids = models.inputs()
    # 2 ends a text, and 1 pads. Higher ids come before: CLIP's old configs would take these.
    ids = np.select([ids == models.END, ids == 0, ids < 3], [2, 1, 40], ids)
    with torch.no_grad():
        expected = models.clip_outputs(model, image, ids)
    module, params = load(tmp_path / "theirs", "clip")
    assert module.sizes.family == "metaclip_2"
    assert_close(outputs_of("clip", module, params, image, ids), expected)
    meta = {
        "config": {"model": {"backbone": "clip"}, "data": {"image_size": 32}},
        "sizes": sizes.to_json(module.sizes),
        "tokenizer": None,
    }
    whole = {"backbone": params, "log_scale": np.float32(1)}
    hugging_face.write(tmp_path / "ours", whole, meta)
    again, info = transformers.AutoModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert isinstance(again, transformers.MetaClip2Model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        returned = models.clip_outputs(again.eval(), image, ids)
    assert_close(outputs_of("clip", module, params, image, ids), returned)


@pytest.mark.slow  # golden files are compared always
@pytest.mark.torch
def test_blip2_with_a_clip_tower(tmp_path):
    """ViT-L/14's kind: a CLIP tower without its last layer, a norm behind it, then the Q-Former."""
    models = torch_models()
    import torch

    clip, blip2 = models.small_clip(), models.small_blip2()
    image, _ = models.inputs()
    norm = models.randomize(torch.nn.LayerNorm(16), seed=3)
    with torch.no_grad():
        hidden = clip.vision_model(models.pixels(image), output_hidden_states=True).hidden_states
        tokens = norm(hidden[-2])
        queries = blip2.query_tokens.expand(len(image), -1, -1)
        expected = blip2.vision_projection(
            blip2.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
        )
    tensors = {k: v.numpy() for k, v in blip2.state_dict().items() if "vision_model" not in k}
    tower = {k: v.numpy() for k, v in clip.state_dict().items() if "vision_model" in k}
    tower = {k: v for k, v in tower.items() if "layers.2." not in k and "post_" not in k}
    tower["vision_model.post_layernorm.weight"] = norm.weight.detach().numpy()
    tower["vision_model.post_layernorm.bias"] = norm.bias.detach().numpy()
    save_file(tensors | tower, tmp_path / "ours.safetensors")
    blip2.save_pretrained(tmp_path / "hf")
    clip.save_pretrained(tmp_path / "clip")
    base = load(tmp_path / "hf", "blip2")[0].sizes
    vision = load(tmp_path / "clip", "clip")[0].sizes.vision
    its_sizes = dataclasses.replace(base, vision=dataclasses.replace(vision, depth=2))
    module = BACKBONES["blip2"](its_sizes, 32)
    source = open_source(str(tmp_path / "ours.safetensors"))
    params = transfer.read_backbone(source, "blip2", its_sizes)
    features = image_of(functools.partial(module.apply, {"params": params}), image)
    assert_close(
        {"tokens": features.tokens, "gallery": features.gallery},
        {"tokens": tokens, "gallery": expected},
    )
    # The same parameters under the names of LAVIS.
    lavis, flat = {}, flatten_dict(params, sep="/")
    for rule in rules.blip2_lavis_layout(its_sizes).rules:
        lavis |= transfer.to_tensors(rule, flat[rule.path], 8)
    lavis["Qformer.cls.predictions.bias"] = np.zeros(3, np.float32)
    assert "visual_encoder.transformer.resblocks.0.attn.in_proj_weight" in lavis
    save_file(lavis, tmp_path / "lavis.safetensors")
    again = transfer.read_backbone(
        open_source(str(tmp_path / "lavis.safetensors")), "blip2", its_sizes
    )
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """Those of PyTorch, from golden files."""
    theirs = load_file(GOLDEN / f"{name}_gradients.safetensors")
    image, ids = theirs.pop("input_image"), theirs.pop("input_ids")
    weights = {
        key.removeprefix("weights_of_"): theirs.pop(key)
        for key in list(theirs)
        if key.startswith("weights_of_")
    }
    module, params = load(GOLDEN / name, name)

    def loss(params):
        def call(*args, method=None):
            return module.apply({"params": params}, *args, method=method)

        text = text_of(call, np.int32(ids))
        features = image_of(call, image)
        if name in ("clip", "siglip"):
            out = {"image": features.gallery[:, 0], "scores": call(image, np.int32(ids))}
        else:
            out = {
                "gallery": features.gallery,
                "composed": call(features, text, method="compose"),
                "matching": call(image, np.int32(ids))[1],
            }
        out["text"] = text.pooled
        return sum((out[k] * weight).sum() for k, weight in weights.items())

    ours = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    layout = rules.layouts_of(module.sizes)[0]
    largest = 0.0
    for rule in layout.rules:
        if not all(tensor in theirs for tensor in rule.names):  # no output depends on them
            assert not any(tensor in theirs for tensor in rule.names)
            assert np.abs(ours[rule.path]).max() < 2e-3, rule.path
            continue
        expected = transfer.to_parameter(rule, [theirs[tensor] for tensor in rule.names])
        scale = np.abs(expected).max()
        largest = max(largest, scale)
        if scale > 1e-3:
            assert np.abs(ours[rule.path] - expected).max() / scale < 1e-3, rule.path
        else:
            assert np.abs(ours[rule.path]).max() < 2e-3, rule.path
    assert largest > 0.1


@pytest.mark.slow  # golden files are compared always
@pytest.mark.torch
def test_round_trip_through_safetensors(saved, tmp_path):
    import torch
    import transformers

    name, model, directory = saved
    models = torch_models()
    module, params = load(directory, name)
    moved = jax.tree.map(lambda x: x + 0.01, params)
    meta = {
        "config": {"model": {"backbone": name}, "data": {"image_size": 32}},
        "sizes": sizes.to_json(module.sizes),
        "tokenizer": None,
    }
    whole = {"backbone": stack_layers(moved), "log_scale": np.float32(1)}
    hugging_face.write(tmp_path, whole, meta)
    # Named by nothing but its directory, as a user of `transformers` would.
    auto = transformers.AutoModel if name == "siglip" else type(model)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    image, ids = models.inputs()
    with torch.no_grad():
        expected = models.MODELS[name][1](again.eval(), image, ids)
        before = models.MODELS[name][1](model, image, ids)
    assert not np.allclose(expected["text"], before["text"])
    assert_close(outputs_of(name, module, moved, image, ids), expected)
    assert load_file(tmp_path / "dqe.safetensors").keys() == {"log_scale"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "siglip" else ()) for name in NAMES],
)
def test_bfloat16_is_close(name):
    image, ids, _ = golden(name)
    module, params = load(GOLDEN / name, name)
    half, _ = load(GOLDEN / name, name, compute=Compute(jnp.bfloat16))

    def embeddings(module):
        call = functools.partial(module.apply, {"params": params})
        features = image_of(call, image)
        text = text_of(call, np.int32(ids[: len(image)]))
        out = [features.gallery, text.pooled]
        if name == "blip2":  # a composer over two towers has no weights here
            out.append(call(features, text, method="compose"))
        return [unit(np.float32(x)) for x in out]

    for full, low in zip(embeddings(module), embeddings(half)):
        assert np.abs(full - low).max() < 2e-2
        assert np.abs(full - low).max() > 0


@pytest.mark.torch
def test_positions_are_interpolated_as_in_transformers(tmp_path):
    models = torch_models()
    import torch

    model = models.small_clip()
    model.save_pretrained(tmp_path)
    image, ids = models.inputs(size=48)
    with torch.no_grad():
        expected = models.clip_outputs(model, image, ids, interpolate_pos_encoding=True)
    module, params = load(tmp_path, "clip", image_size=48)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, np.int32(ids)))
    fitted = transfer.fit(params, flatten_dict(shapes["params"], sep="/"), "here")
    assert fitted["vision/positions"].shape == (37, 16)
    fitted = unflatten_dict(fitted, sep="/")
    assert_close(outputs_of("clip", module, fitted, image, ids), expected)


def odd_shape(rng):
    """Sizes of a vision tower as no published model has them, and height and width of images."""
    heads, patch = int(rng.integers(1, 6)), int(rng.choice([4, 5, 8, 14]))
    tower = dict(
        hidden_size=heads * int(rng.integers(3, 9)),
        num_attention_heads=heads,
        intermediate_size=int(rng.integers(5, 50)),
        num_hidden_layers=int(rng.integers(1, 6)),
        patch_size=patch,
        image_size=patch * int(rng.integers(2, 6)),
        hidden_act=str(rng.choice(["gelu", "quick_gelu", "gelu_pytorch_tanh"])),
        layer_norm_eps=float(rng.choice([1e-6, 1e-5])),
    )
    height, width = (patch * int(x) for x in rng.choice([2, 3, 4, 5, 7], 2, replace=False))
    return tower, (height, width)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", DINO)
def test_odd_shapes_of_dino(name, seed, tmp_path):
    models = torch_models()
    import torch

    rng = np.random.default_rng([seed, len(name)])
    tower, (height, width) = odd_shape(rng)
    if name != "dinov3_vit":
        del tower["intermediate_size"]
        tower["mlp_ratio"] = int(rng.integers(1, 5))
    else:  # heads of a multiple of 4 channels
        tower["hidden_size"] = 4 * int(rng.integers(1, 4)) * tower["num_attention_heads"]
    if name != "dinov2":
        tower["num_register_tokens"] = int(rng.integers(1, 6))
    model = models.small_dino(name, **tower)
    model.save_pretrained(tmp_path)
    image = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    with torch.no_grad():
        expected = models.dino_outputs(model, image, None)
    module, params = load_dino(tmp_path, DINO[name], image_size=(height, width))
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), image, np.zeros((1, 12), np.int32))
    )
    fitted = transfer.fit(
        params,
        flatten_dict(shapes["params"], sep="/"),
        "here",
        grid_of((height, width), tower["patch_size"]),
        module.sizes.vision.antialias,
    )
    assert_close(dino_outputs_of(module, unflatten_dict(fitted, sep="/"), image), expected)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_odd_shapes(name, seed, tmp_path):
    """Drawn at random: grids that are no squares, other heads, depths, patches, activations."""
    models = torch_models()
    import torch

    rng = np.random.default_rng([seed, len(name)])
    tower, (height, width) = odd_shape(rng)
    make, outputs = models.MODELS[name]
    model = make(**tower)
    model.save_pretrained(tmp_path)
    _, ids = models.inputs(texts=2)
    image = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    with torch.no_grad():
        expected = outputs(model, image, ids, interpolate_pos_encoding=True)
    module, params = load(tmp_path, name, image_size=(height, width))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, np.int32(ids)))
    shapes = flatten_dict(shapes["params"], sep="/")
    grid = grid_of((height, width), tower["patch_size"])
    assert grid[0] != grid[1]
    params = unflatten_dict(transfer.fit(params, shapes, "here", grid), sep="/")
    assert_close(outputs_of(name, module, params, image, ids), expected)


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 6), (7, 3), (2, 5), (37, 16)])
def test_bicubic_matrix(old, new):
    matrix = transfer.bicubic_matrix(old, new)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)  # a constant stays
    if old == new:
        np.testing.assert_allclose(matrix, np.eye(old), atol=1e-12)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: it would interpolate")
    x = np.random.default_rng(0).normal(size=(1, 1, old, old))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(new, new), mode="bicubic", align_corners=False
    )
    np.testing.assert_allclose(matrix @ x[0, 0] @ matrix.T, expected[0, 0], atol=1e-9)
    smooth = transfer.smooth_bicubic_matrix(old, new)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=(new, new), mode="bicubic", align_corners=False, antialias=True
    )
    np.testing.assert_allclose(smooth @ x[0, 0] @ smooth.T, expected[0, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("length", "keys", "size", "dtype", "masked", "expected"),
    [
        (257, 257, 88, "bfloat16", False, True),  # EVA ViT-g
        (32, 257, 64, "bfloat16", False, True),  # queries over the image
        (64, 64, 64, "bfloat16", True, True),  # queries and text
        (33, 33, 64, "bfloat16", True, False),
        (32, 32, 64, "float32", True, False),
        (32, 32, 12, "bfloat16", False, False),
        (32, 32, 136, "bfloat16", False, False),
    ],
)
def test_what_flash_attention_takes(length, keys, size, dtype, masked, expected):
    q = jax.ShapeDtypeStruct((2, length, 4, size), dtype)
    k = jax.ShapeDtypeStruct((2, keys, 4, size), dtype)
    assert flash_takes(q, k, np.ones((2, keys), bool) if masked else None) == expected
