"""Runs from Hugging Face weights: start, freeze, resume, evaluate, export; and their errors."""

import json
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from dqe_jax.checkpoints import store
from dqe_jax.checkpoints.export import export_run
from dqe_jax.config import RunConfig
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.models import freeze, setup
from dqe_jax.models.build import parts_of
from dqe_jax.models.weights import initial, stacking
from dqe_jax.models.weights.conversion import convert
from dqe_jax.testing.pretrained import copy_weights, write_xlm_roberta_tokenizer
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
FIELDS = {
    "clip": {"model.clip.composer_width": 16, "model.clip.composer_heads": 2},
    "siglip": {"model.siglip.composer_width": 16, "model.siglip.composer_heads": 2},
    "dino": {
        "model.dino.composer_width": 16,
        "model.dino.composer_heads": 2,
        "model.dino.text": "auto",
    },
    "blip2": {"model.blip2.dropout": 0.0},
}
FROZEN = {
    "clip": ("vision", "text", "logit_scale"),
    "siglip": ("vision", "text", "logit_scale"),
    "dino": ("vision", "text"),
    "blip2": ("vision", "itm_head"),
}
# That of CLIP is in the core tests, which CI runs with the oldest and the newest releases.
BACKBONES = (
    pytest.param("clip", marks=(pytest.mark.core, pytest.mark.slow)),
    pytest.param("siglip", marks=pytest.mark.slow),
    pytest.param("dino", marks=pytest.mark.slow),
    "blip2",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, prepared):
    """Prepared data, and a Hugging Face directory of each backbone with a tokenizer."""
    directory = tmp_path_factory.mktemp("pretrained")
    prepared(directory)
    for name in ("clip", "siglip", "blip2"):
        copy_weights(GOLDEN / name, name, directory / name)
    return directory


def config_of(base, name, **changes):
    if name == "dino" and not (base / name).exists():
        shutil.copytree(GOLDEN / "dinov2_with_registers", base / name)
    changes = {
        "total_steps": 6,
        "checkpoint_every": 3,
        "eval_every": 6,
        "data.max_length": 12,
        "model.backbone": name,
        "model.weights": str(base / name),
        f"model.{name}.variant": "auto",
        "model.frozen": FROZEN[name],
        "model.frozen_dtype": "bfloat16",
        "model.attributes.width": 8,
        **FIELDS[name],
        **({"model.dino.text_weights": str(base / "clip")} if name == "dino" else {}),
        **changes,
    }
    return small_config(base / "prepared", **changes)


@pytest.fixture(scope="module", params=BACKBONES)
def run(base, request):
    """A finished run, BLIP-2's interrupted once: (name, config, workdir, metrics)."""
    name = request.param
    config, workdir = config_of(base, name), base / f"run-{name}"
    if name == "blip2":
        loop.train_and_evaluate(config, workdir, stop_at=3)
    metrics = loop.train_and_evaluate(config, workdir)
    return name, config, workdir, metrics


def params_of(workdir, step=None):
    manager = store.open_for_reading(workdir)
    step, params = store.read_chosen(manager, step, lambda n: store.restore_params(manager, n))
    return flatten_dict(params, sep="/"), manager, step


def test_a_run_starts_from_the_weights_and_keeps_what_is_frozen(run):
    name, config, workdir, _ = run
    params, manager, step = params_of(workdir)
    model = RunConfig.of(config).model
    held = flatten_dict(initial.open_pretrained(model).read(), sep="/")
    parts = parts_of(name)
    kept, moved = 0, 0
    for path, x in held.items():
        ours = params[f"backbone/{path}"]
        if path == "vision/positions":
            assert ours.shape != x.shape  # 72 pixels in place of 32
        elif freeze.part_of(f"backbone/{path}", parts) in config.model.frozen:
            assert ours.dtype == jax.numpy.bfloat16
            np.testing.assert_array_equal(ours, x.astype(jax.numpy.bfloat16))
            kept += 1
        else:
            assert ours.dtype == np.float32
            moved += np.abs(ours - x).max() > 0
            assert np.abs(ours - x).max() < 0.05  # it did start from there
    assert kept > 10
    assert moved > 0
    # The optimiser has nothing of what is frozen.
    restored = manager.restore(step, args=ocp.args.Composite(opt_state=ocp.args.StandardRestore()))
    state = jax.tree.leaves(restored["opt_state"])
    trained = [x for path, x in params.items() if freeze.part_of(path, parts) not in FROZEN[name]]
    # Two moments of each, and two counts of steps.
    assert sum(x.size for x in state) == 2 * sum(x.size for x in trained) + 5  # counts


@pytest.mark.parametrize("run", ["blip2"], indirect=True)
def test_resuming_is_exact(run, base):
    name, config, workdir, _ = run
    straight = base / f"straight-{name}"
    loop.train_and_evaluate(config, straight)
    one, other = params_of(workdir)[0], params_of(straight)[0]
    assert one.keys() == other.keys()
    for path, x in one.items():
        np.testing.assert_array_equal(x, other[path])


def test_evaluation_needs_the_checkpoint_alone(run, tmp_path):
    _, config, workdir, metrics = run
    # The weights are not where the config says, and nothing else is needed.
    changed = RunConfig.of(config).with_changes(
        {"model.weights": "/elsewhere", "model.remat": True}
    )
    evaluate_checkpoint(changed, workdir, output=tmp_path)
    report = json.loads((tmp_path / "test-6.json").read_text())
    assert report["metrics"] == pytest.approx(metrics, abs=1e-6)


@pytest.mark.slow  # `exported_test.py` has the same models
def test_export(run, tmp_path):
    name, _, workdir, _ = run
    if name == "dino":
        pytest.skip("its export has two directories, which `parity_test.py` looks at")
    export_run(workdir, tmp_path)
    params, *_ = params_of(workdir)
    ours = load_file(tmp_path / "dqe.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    theirs_by, ours_by = {
        "clip": ("visual_projection", "visual_projection"),
        "siglip": ("text_model.head", "text_projection"),
        "blip2": ("vision_projection", "vision_projection"),
    }[name]
    np.testing.assert_array_equal(
        theirs[f"{theirs_by}.weight"].T, params[f"backbone/{ours_by}/kernel"]
    )
    assert "log_scale" in ours
    assert any(path.startswith("attributes/") for path in ours)
    assert any("composer" in path for path in ours) == (name != "blip2")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 72
    # What was exported is a source of weights itself.
    again = initial.open_pretrained(
        RunConfig.of(config_of(tmp_path.parent, name, **{"model.weights": str(tmp_path)})).model
    )
    assert flatten_dict(again.read(), sep="/").keys() <= {
        path.removeprefix("backbone/") for path in params
    }
    pytest.importorskip("torch", reason="PyTorch is not installed: it would read the export")
    import transformers

    kind = {"clip": "CLIPModel", "siglip": "SiglipModel", "blip2": "Blip2ForImageTextRetrieval"}[
        name
    ]
    model, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == sum(x.size for x in theirs.values())


@pytest.mark.parametrize("name", BACKBONES)
def test_converted_weights_and_a_scanned_stack_start_alike(base, name, tmp_path):
    text = str(base / "clip") if name == "dino" else ""
    convert(str(base / name), str(tmp_path / "out"), text_source=text)

    def start(**changes):
        config = RunConfig.of(config_of(base, name, **changes))
        sections = (config.model, config.data)
        pretrained = setup.open_weights(*sections)
        tokenizer = setup.tokenizer_of(*sections, pretrained)
        model = setup.model_of(*sections, tokenizer, pretrained.sizes)
        return setup.init_params(model, *sections, 0, pretrained), tokenizer

    expected, tokenizer = start()
    found, again = start(**{"model.weights": str(tmp_path / "out")})
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    texts = ["make the red circle blue", "a", "zebra " * 20]
    one, other = tokenizer.encode_batch(texts), again.encode_batch(texts)
    assert [x.ids for x in one] == [x.ids for x in other]
    assert {len(x.ids) for x in one} == {12}
    scanned, _ = start(**{"model.scan_layers": True})
    jax.tree.map(np.testing.assert_array_equal, stacking.unstack_layers(scanned), expected)


def siglip_tokenizer(base, length):
    config = RunConfig.of(config_of(base, "siglip", **{"data.max_length": length}))
    return setup.tokenizer_of(
        config.model, config.data, setup.open_weights(config.model, config.data)
    )


@pytest.mark.core
def test_tokenizers_of_the_papers(base, tmp_path):
    """Start, end and padding as CLIP and BERT have them; a long text keeps its end."""
    from dqe_jax.data import tokenizer as text_tokens

    clip = text_tokens.pretrained_tokenizer(base / "clip", 6)
    ids, cut = text_tokens.encode(clip, ["red", "red red red red red red"])
    assert ids[0, 0] == ids[1, 0] == 48
    assert ids[0, 2:].tolist() == [49] * 4
    assert ids[1, -1] == 49
    assert cut.tolist() == [False, True]
    # MetaCLIP 2, as XLM-RoBERTa: 0 starts, 2 ends and 1 pads.
    write_xlm_roberta_tokenizer(tmp_path)
    roberta = text_tokens.pretrained_tokenizer(tmp_path, 6)
    ids, cut = text_tokens.encode(roberta, ["make red", "red red red red red red"])
    assert ids[0].tolist() == [0, 4, 6, 2, 1, 1]
    assert ids[1].tolist() == [0, 6, 6, 6, 6, 2]
    assert cut.tolist() == [False, True]
    assert text_tokens.lengths_of(roberta, ids).tolist() == [4, 6]
    gemma = siglip_tokenizer(base, 6)
    ids, cut = text_tokens.encode(gemma, ["red", "RED", "red red red red red red"])
    assert ids[0].tolist() == ids[1].tolist()  # in lower case, as it was trained
    assert ids[0, -1] == 0
    assert ids[0, ids[0] > 0][-1] == 1
    assert ids[2, -1] == 1
    assert cut.tolist() == [False, False, True]
    bert = text_tokens.pretrained_tokenizer(base / "blip2", 6)
    ids, cut = text_tokens.encode(bert, ["Make the RED", "make the red circle blue", "zebra"])
    assert ids[0].tolist() == [2, 5, 6, 7, 3, 0]
    assert ids[1].tolist() == [2, 5, 6, 7, 9, 3]
    assert ids[2].tolist() == [2, 1, 3, 0, 0, 0]
    assert cut.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("clip", {"data.max_length": 13}, ["data.max_length is 13", "at most 12"]),
        ("clip", {"data.max_length": 2}, ["data.max_length is 2", "at least 3"]),
        ("clip", {"model.attention": "cudnn"}, ["model.attention is 'cudnn'", "'cpu'", "'auto'"]),
        ("clip", {"data.image_size": 73}, ["data.image_size is 73", "patch size", "8"]),
        ("clip", {"model.frozen": ("visoin",)}, ["'visoin'", "vision, text, projections"]),
        ("blip2", {"model.frozen": ("composer",)}, ["'composer'", "qformer"]),
        (
            "clip",
            {"model.clip.variant": "vit_b_32", "data.image_size": 96},
            ["304 tensors are missing", "and 296 more"],
        ),
        (
            "clip",
            {"model.weights": "", "model.clip.variant": "vit_b_32", "data.image_size": 96},
            ["model.tokenizer", "needs a tokenizer"],
        ),
        ("clip", {"model.tokenizer": "{base}/prepared"}, ["no tokenizer", "model.tokenizer"]),
        ("blip2", {"model.tokenizer": "{base}/clip"}, ["pads with id 49", "model.tokenizer"]),
        ("siglip", {"model.tokenizer": "{base}/clip"}, ["none of the tokens <eos>", "tokenizer"]),
        ("siglip", {"data.max_length": 13}, ["data.max_length is 13", "at most 12"]),
        ("siglip", {"model.siglip.composer_heads": 3}, ["siglip.composer_width is 16", "multiple"]),
        ("dino", {"model.weights": ""}, ["config.model.weights is empty", "text_weights"]),
        ("dino", {"model.dino.text_weights": ""}, ["dino.text_weights is empty", "name both"]),
        ("dino", {"model.dino.text_weights": "{base}/blip2"}, ["no CLIP or SigLIP model"]),
        (
            "dino",
            {"model.frozen": ("logit_scale",)},
            ["'logit_scale'", "vision, text, projections"],
        ),
        ("clip", {"model.clip.composer_heads": 3}, ["composer_width is 16", "multiple"]),
        ("clip", {"model.attributes.heads": 3}, ["attributes.width is 8", "multiple"]),
    ],
)
def test_errors_before_training(base, tmp_path, monkeypatch, name, changes, words):
    monkeypatch.setattr(loop, "run_steps", lambda *_: pytest.fail("training starts"))
    filled = {
        key: value.format(base=base) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError) as error:
        loop.train_and_evaluate(config_of(base, name, **filled), tmp_path)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")


def test_weights_of_another_size_name_the_parameter(base, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "run_steps", lambda *_: pytest.fail("training starts"))
    shutil.copytree(base / "clip", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_projection.weight"] = np.zeros((9, 24), np.float32)
    save_file(tensors, file)
    config = config_of(base, "clip", **{"model.weights": str(tmp_path / "model")})
    with pytest.raises(UserError, match=r"text_projection/kernel is \[24, 9\], not \[24, 8\]"):
        loop.train_and_evaluate(config, tmp_path / "run")
