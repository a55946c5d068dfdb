"""Pretrained weights: sources, converting, strictness, and each error's sentence."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from dqe_jax.models import blip2, clip, dino
from dqe_jax.models.build import VARIANTS
from dqe_jax.models.dino import DinoSizes
from dqe_jax.models.encoder import PIXEL_MEAN
from dqe_jax.models.settings import ModelConfig
from dqe_jax.models.weights import hugging_face, initial, sizes, source, transfer
from dqe_jax.models.weights.conversion import convert
from dqe_jax.testing.commands import run_module
from dqe_jax.utils.errors import UserError

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
NAMES = ("clip", "siglip", "blip2")


def model_config(backbone, weights, variant="auto"):
    config = ModelConfig(backbone=backbone, weights=str(weights))
    own = dataclasses.replace(getattr(config, backbone), variant=variant)
    return dataclasses.replace(config, **{backbone: own})


def read(backbone, weights, variant="auto"):
    return initial.open_pretrained(model_config(backbone, weights, variant)).read()


@pytest.fixture
def copy(tmp_path):
    """A directory with a copy of CLIP's golden weights, and its tensors."""
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "clip", directory)
    return directory, load_file(directory / "model.safetensors")


def assert_equal(one, other):
    one, other = flatten_dict(one, sep="/"), flatten_dict(other, sep="/")
    assert one.keys() == other.keys()
    for path, x in one.items():
        np.testing.assert_array_equal(x, other[path])


# ---------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.core
def test_a_file_and_shards_give_what_a_directory_gives(name, tmp_path):
    expected = read(name, GOLDEN / name)
    shutil.copytree(GOLDEN / name, tmp_path / "one")
    assert_equal(read(name, tmp_path / "one" / "model.safetensors"), expected)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    shards, index = tmp_path / "shards", {}
    shards.mkdir()
    for i in range(3):
        part = {k: v for j, (k, v) in enumerate(sorted(tensors.items())) if j % 3 == i}
        save_file(part, shards / f"part-{i}.safetensors")
        index |= dict.fromkeys(part, f"part-{i}.safetensors")
    (shards / source.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    shutil.copy(GOLDEN / name / "config.json", shards)
    assert_equal(read(name, shards), expected)
    assert_equal(read(name, shards / source.INDEX), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float16, 1e-3), (ml_dtypes.bfloat16, 1e-2), (np.float64, 0)]
)
@pytest.mark.core
def test_half_precision_sources_become_float32(copy, dtype, tolerance):
    directory, tensors = copy
    expected = flatten_dict(read("clip", directory))
    save_file({k: v.astype(dtype) for k, v in tensors.items()}, directory / source.SINGLE)
    for path, x in flatten_dict(read("clip", directory)).items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, expected[path], rtol=tolerance, atol=tolerance)


def test_buffers_of_old_checkpoints_are_ignored(copy):
    directory, tensors = copy
    expected = read("clip", directory)
    tensors["text_model.embeddings.position_ids"] = np.arange(12)[None]
    save_file(tensors, directory / source.SINGLE)
    assert_equal(read("clip", directory), expected)


@pytest.mark.parametrize(("mean", "std"), [([0.5] * 3, [0.25, 0.5, 1]), (None, [0.5] * 3)])
def test_pixels_are_standardized_as_the_processor_says(copy, mean, std):
    directory, _ = copy
    plain = initial.open_pretrained(model_config("clip", directory)).sizes.vision
    assert plain.pixel_mean == PIXEL_MEAN
    content = {"image_mean": mean, "image_std": std, "size": {"shortest_edge": 32}}
    (directory / source.PROCESSOR).write_text(json.dumps(content))
    found = initial.open_pretrained(model_config("clip", directory)).sizes
    assert found.vision.pixel_mean == (tuple(mean) if mean else PIXEL_MEAN)
    assert found.vision.pixel_std == tuple(std)
    assert sizes.from_json("clip", json.loads(json.dumps(sizes.to_json(found)))) == found
    # What is exported says the same.
    meta = {
        "config": {"model": {"backbone": "clip"}, "data": {"image_size": 32}},
        "sizes": sizes.to_json(found),
    }
    out = directory / "out"
    whole = {"backbone": read("clip", directory), "log_scale": np.float32(1)}
    hugging_face.write(out, whole, meta)
    again = initial.open_pretrained(model_config("clip", out)).sizes
    assert again == found


@pytest.mark.parametrize("bad", [[0.5], [0.5, 0.5, 2.0], ["x", 0.5, 0.5], "mean", 3])
def test_pixels_that_a_processor_cannot_say(copy, bad):
    directory, _ = copy
    (directory / source.PROCESSOR).write_text(json.dumps({"image_std": bad}))
    with pytest.raises(UserError, match=r"preprocessor_config\.json is refused .*get it again\.$"):
        read("clip", directory)


def test_configs_that_siglip_and_dino_refuse(tmp_path):
    for name, changes, words in (
        ("siglip", {"text_config": {"projection_size": 17}}, "projection_size is 17"),
        ("siglip", {"vision_config": {"vision_use_head": False}}, "no pooling head"),
        ("dinov3_vit", {"num_attention_heads": 8}, "do not divide into 4"),
        ("dinov3_vit", {"query_bias": False}, "do not fit together"),
        ("dinov2", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ):
        directory = tmp_path / name / words
        shutil.copytree(GOLDEN / name, directory)
        config = json.loads((directory / "config.json").read_text())
        for field, value in changes.items():
            config[field] = config[field] | value if isinstance(value, dict) else value
        (directory / "config.json").write_text(json.dumps(config))
        opened = source.open_source(str(directory))
        kind, text = ("siglip", None) if name == "siglip" else ("dino", clip.VARIANTS["vit_b_32"])
        with pytest.raises(UserError, match=f"config.json is refused .*{words}"):
            sizes.from_hugging_face(kind, opened.config, "here", text=text)


@pytest.mark.parametrize("variant", dino.TOWERS)
def test_variants_of_dino_are_the_published_sizes(variant):
    """By the widths that each model's own `config.json` has, given back by ours."""
    held = DinoSizes(*dino.TOWERS[variant], dino.TEXTS["clip_vit_b_32"])
    config = hugging_face.config_of(held)
    found = sizes.from_hugging_face("dino", config, "here", text=held.text)
    assert found == held
    assert sizes.from_json("dino", json.loads(json.dumps(sizes.to_json(held)))) == held


# ----------------------------------------------------------------------------------------- errors


def damaged(directory, tensors):
    (directory / source.SINGLE).write_bytes(b"no safetensors")


def empty(directory, tensors):
    (directory / source.SINGLE).unlink()


def pickled(directory, tensors):
    (directory / source.SINGLE).rename(directory / "pytorch_model.bin")


def without_config(directory, tensors):
    (directory / "config.json").unlink()


def broken_config(directory, tensors):
    (directory / "config.json").write_text("{")


def other_model(directory, tensors):
    (directory / "config.json").write_text('{"model_type": "bert"}')


def other_activation(directory, tensors):
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "mish"
    (directory / "config.json").write_text(json.dumps(config))


def refused_config(directory, tensors):
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 3
    (directory / "config.json").write_text(json.dumps(config))


def two_missing(directory, tensors):
    del tensors["logit_scale"], tensors["text_projection.weight"]
    save_file(tensors, directory / source.SINGLE)


def many_missing(directory, tensors):
    kept = {k: v for k, v in tensors.items() if "text_model" not in k}
    save_file(kept, directory / source.SINGLE)


def unused(directory, tensors):
    save_file(tensors | {"head.weight": np.zeros(3, np.float32)}, directory / source.SINGLE)


def wrong_axes(directory, tensors):
    tensors["visual_projection.weight"] = np.zeros(3, np.float32)
    save_file(tensors, directory / source.SINGLE)


def quantised(directory, tensors):
    tensors["visual_projection.weight"] = np.zeros((8, 16), np.int8)
    save_file(tensors, directory / source.SINGLE)


def two_files(directory, tensors):
    (directory / source.SINGLE).rename(directory / "a.safetensors")
    save_file(tensors, directory / "b.safetensors")


def lost_shard(directory, tensors):
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (directory / source.INDEX).write_text(json.dumps(index))


def lying_index(directory, tensors):
    index = {"weight_map": dict.fromkeys([*tensors, "more"], source.SINGLE)}
    (directory / source.INDEX).write_text(json.dumps(index))


def no_index(directory, tensors):
    (directory / source.INDEX).write_text("{}")


def wrong_index(directory, tensors):
    (directory / source.INDEX).write_text('{"weight_map": {"logit_scale": 3, "x": []}}')


def binary_index(directory, tensors):
    (directory / source.INDEX).write_bytes(b"\xff\xfe{}")


def deep_index(directory, tensors):
    (directory / source.INDEX).write_text('{"weight_map":' * 100_000)


def endless_weights(directory, tensors):
    (directory / source.SINGLE).unlink()
    (directory / source.SINGLE).symlink_to("/dev/zero")


def binary_config(directory, tensors):
    (directory / "config.json").write_bytes(b'{"model_type": "\xff"}')


def listed_config(directory, tensors):
    (directory / "config.json").write_text("[]")


def deep_config(directory, tensors):
    (directory / "config.json").write_text("[" * 100_000)


def odd_type(directory, tensors):
    (directory / "config.json").write_text('{"model_type": ["clip"]}')


def text_of_sections(directory, tensors):
    (directory / "config.json").write_text(
        '{"model_type": "clip", "vision_config": "large", "text_config": 3}'
    )


def million_layers(directory, tensors):
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1_000_000
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damaged, ["model.safetensors", "no safetensors file", "get it again"]),
        (empty, ["neither model.safetensors", "model.safetensors.index.json"]),
        (pickled, ["pytorch_model.bin", "never read", "save_pretrained"]),
        (without_config, ["config.json", "config.model.clip.variant"]),
        (broken_config, ["config.json", "JSON"]),
        (other_model, ["model_type 'bert'", "clip", "blip-2"]),
        (other_activation, ["hidden_act 'mish'", "quick_gelu"]),
        (refused_config, ["config.json is refused", "attention heads"]),
        (two_missing, ["2 tensors are missing: logit_scale, text_projection.weight."]),
        (many_missing, ["36 tensors are missing", "and 28 more"]),
        (unused, ["1 tensors are not used: head.weight."]),
        (wrong_axes, ["visual_projection.weight", "wrong shape (3,)"]),
        (quantised, ["visual_projection.weight", "I8", "quantised"]),
        (two_files, ["more than one safetensors file"]),
        (lost_shard, ["model-1.safetensors", "missing"]),
        (lying_index, ["lacks more"]),
        (no_index, ["weight_map"]),
        (wrong_index, ["weight_map", "not an index"]),
        (binary_index, [source.INDEX, "not UTF-8"]),
        (deep_index, [source.INDEX, "not JSON"]),
        (endless_weights, ["model.safetensors", "no regular file"]),
        (binary_config, ["config.json", "not UTF-8"]),
        (listed_config, ["config.json", "must hold an object"]),
        (deep_config, ["config.json", "not JSON"]),
        (odd_type, ["model_type ['clip']"]),
        (text_of_sections, ["config.json is refused"]),
        (million_layers, ["config.json", "vision_config.num_hidden_layers is 1000000", "1,000"]),
    ],
)
@pytest.mark.core
def test_errors_of_sources(copy, spoil, words):
    directory, tensors = copy
    spoil(directory, tensors)
    with pytest.raises(UserError) as error:
        read("clip", directory)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")
    assert "\n" not in message


@pytest.mark.core
def test_errors_of_names(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file or directory"):
        read("clip", tmp_path / "nothing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"'some/model'.*from the hub.*copy the model here"):
        read("clip", "some/model")
    # A model that the hub has in pickled files alone.
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match=r"'some/model'.*no safetensors on the hub"):
        read("clip", "some/model")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="never read"):
        read("clip", tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"blip2.*auto.*name weights"):
        initial.open_pretrained(model_config("blip2", ""))


def test_weights_of_the_other_backbone():
    with pytest.raises(UserError, match=r"model_type 'blip-2'.*backbone is 'clip'"):
        read("clip", GOLDEN / "blip2")
    with pytest.raises(UserError, match=r"tensors are missing: .*tensors are not used"):
        read("clip", GOLDEN / "blip2", "vit_b_32")


def test_a_wrong_shape_names_the_parameter():
    params = read("clip", GOLDEN / "clip")
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for path, x in flatten_dict(params, sep="/").items()
    }
    transfer.fit(params, shapes, "here")
    other = shapes | {"visual_projection/kernel": jax.ShapeDtypeStruct((16, 9), np.float32)}
    with pytest.raises(UserError, match=r"visual_projection/kernel is \[16, 8\], not \[16, 9\]"):
        transfer.fit(params, other, "here")
    odd = params | {"vision": params["vision"] | {"positions": np.zeros((13, 16), np.float32)}}
    with pytest.raises(UserError, match=r"vision/positions is \[13, 16\], not \[17, 16\]"):
        transfer.fit(odd, shapes, "here")
    del shapes["logit_scale"]
    with pytest.raises(UserError, match=r"here hold what the model does not: logit_scale"):
        transfer.fit(params, shapes, "here")


# ------------------------------------------------------------------------------- sizes and configs


@pytest.mark.parametrize("backbone", NAMES)
@pytest.mark.core
def test_sizes_as_json(backbone):
    for held in VARIANTS[backbone].values():
        again = sizes.from_json(backbone, json.loads(json.dumps(sizes.to_json(held))))
        assert again == held


@pytest.mark.core
def test_variants_are_the_published_sizes():
    """The defaults of `transformers` are those of CLIP ViT-B/32 and BLIP-2 ViT-g."""
    found = sizes.from_hugging_face("clip", {"model_type": "clip"}, "defaults")
    assert found == clip.VARIANTS["vit_b_32"]
    found = sizes.from_hugging_face("blip2", {"model_type": "blip-2"}, "defaults")
    published = sizes.to_json(blip2.VARIANTS["vit_g_14"]) | {"vocab_size": 30522}
    assert sizes.to_json(found) == published  # the published files add one word


@pytest.mark.parametrize("backbone", NAMES)
@pytest.mark.core
def test_a_config_json_of_our_sizes_gives_them_back(backbone):
    for held in VARIANTS[backbone].values():
        config = hugging_face.config_of(held)
        if config is None:
            assert held.vision.pre_norm
            assert backbone == "blip2"
        else:
            assert sizes.from_hugging_face(backbone, config, "here") == held


# ---------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.core
def test_converted_weights_are_the_same(name, tmp_path):
    convert(str(GOLDEN / name), str(tmp_path / "out"))
    assert_equal(read(name, tmp_path / "out"), read(name, GOLDEN / name))
    held = initial.open_pretrained(model_config(name, tmp_path / "out"))
    assert held.sizes == initial.open_pretrained(model_config(name, GOLDEN / name)).sizes
    assert held.tokenizer is None
    # Nothing of the machine where they were converted stays in them.
    assert str(GOLDEN) not in (tmp_path / "out" / initial.FACTS).read_text()
    with pytest.raises(UserError, match=r"--output: .*already holds weights"):
        convert(str(GOLDEN / name), str(tmp_path / "out"))
    other = {"clip": "blip2", "siglip": "clip", "blip2": "clip"}[name]
    with pytest.raises(UserError, match=f"holds weights of '{name}'"):
        read(other, tmp_path / "out")
    with pytest.raises(UserError, match=r"is not of config.model.*'auto' takes the sizes"):
        read(name, tmp_path / "out", next(v for v in VARIANTS[name] if v.startswith("vit_l_1")))


def test_errors_of_convert(tmp_path):
    with pytest.raises(UserError, match=r"--variant=vit_x: it must be one of auto, vit_b_32"):
        convert(str(GOLDEN / "clip"), str(tmp_path / "o"), variant="vit_x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output: cannot write"):
        convert(str(GOLDEN / "clip"), str(tmp_path / "file" / "o"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / initial.FACTS).write_text("{}")
    with pytest.raises(UserError, match=r"weights.json cannot be read.*convert the weights again"):
        read("clip", tmp_path / "bad")


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("text_config", "num_hidden_layers", 10**6),
        ("text_config", "hidden_size", 3 * 10**8),
        ("text_config", "vocab_size", 10**12),
        ("text_config", "layer_norm_eps", 1e9),
        ("vision_config", "image_size", 10**6),
        ("vision_config", "intermediate_size", 0),
        (None, "projection_dim", -1),
    ],
)
def test_sizes_that_no_model_has(copy, section, name, value):
    """Each would exhaust the memory, or end in a traceback."""
    directory, _ = copy
    config = json.loads((directory / "config.json").read_text())
    (config[section] if section else config)[name] = value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"is refused .*{name} is {value}: it must be"):
        read("clip", directory)


def test_sizes_of_every_kind_are_checked():
    """None is forgotten: each as a text, and as a number that is far too large."""
    kinds = (("clip", "vit_b_32"), ("siglip", "vit_b_16"), ("blip2", "vit_g_14"))
    for backbone, held in kinds:
        content = sizes.to_json(VARIANTS[backbone][held])
        for name in content["vision"]:
            for bad in ("x", 10**12):
                changed = content | {"vision": content["vision"] | {name: bad}}
                with pytest.raises(ValueError, match=rf"sizes\.vision\.{name} is "):
                    sizes.from_json(backbone, changed)
        for name in content.keys() - {"vision"}:
            for bad in ("x", 10**12):
                with pytest.raises(ValueError, match=rf"sizes\.{name} is "):
                    sizes.from_json(backbone, content | {name: bad})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "is not JSON .*convert the weights again"),
        (b"[]", "must hold an object; convert the weights again"),
        (b'{"backbone": ["clip"], "sizes": {}}', "backbone is"),
        (b'{"backbone": "clip", "sizes": []}', "sizes are not those of clip"),
        (b'{"backbone": "clip", "sizes": {"vision": 3}}', "sizes are not those of clip"),
        (b'{"backbone": "clip", "sizes": {}, "tokenizer": 3}', "tokenizer is no text"),
    ],
)
def test_damaged_facts_of_converted_weights(tmp_path, content, words):
    (tmp_path / initial.FACTS).write_bytes(content)
    with pytest.raises(UserError, match=rf"weights\.json .*{words}"):
        read("clip", tmp_path)


def test_converted_weights_of_a_million_layers(tmp_path):
    convert(str(GOLDEN / "clip"), str(tmp_path / "out"))
    facts = tmp_path / "out" / initial.FACTS
    content = json.loads(facts.read_text())
    content["sizes"]["vision"]["depth"] = 10**6
    facts.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"weights\.json .*vision\.depth is 1000000: it must"):
        read("clip", tmp_path / "out")


# --------------------------------------------------------------------------------------- binaries


def binary(name, *arguments):
    done = run_module(f"dqe_jax.{name}", *arguments, cwd=GOLDEN.parents[1])
    return done.returncode, done.stderr


@pytest.mark.slow
def test_the_convert_binary(tmp_path):
    arguments = (f"--source={GOLDEN / 'clip'}", f"--output={tmp_path / 'out'}")
    status, said = binary("convert", *arguments)
    assert status == 0, said
    count = sum(x.size for x in load_file(GOLDEN / "clip" / source.SINGLE).values())
    assert f"{count:,} parameters of clip, without tokenizer" in said
    status, said = binary("convert", *arguments)
    assert status == 2
    # Nothing else is said, no advice to install PyTorch either.
    assert re.fullmatch(r"error: --output: .* already holds weights; .*\n", said), said


def test_the_describe_binary():
    """CLIP ViT-B/32 has 151,277,313 parameters (as published); no weights are needed."""
    status, said = binary("describe", "--config=configs/fiq_clip.py:vit_b_32")
    assert status == 0, said
    rows = dict(line.split()[:2] for line in said.splitlines() if line.startswith("  "))
    parts = ("vision", "text", "projections", "logit_scale")
    assert sum(int(rows[part].replace(",", "")) for part in parts) == 151_277_313
    assert re.search(r"Forward: 8\.\d+ GFLOP a gallery image", said)
