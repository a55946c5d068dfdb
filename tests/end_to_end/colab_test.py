"""The notebooks of launch/colab: stored without results, linked, and run from top to bottom."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import re
import shutil
import string
import sys
import types
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from configs import fiq_clip
from dqe_jax.data import preparation
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.testing import standins
from dqe_jax.testing.small_runs import compiles_quickly, quick_xla_flags
from dqe_jax.training.loop import train_and_evaluate
from dqe_jax.utils.files import write_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "colab"
NOTEBOOKS = ("shapes", "your_own_images", "fashioniq")
REAL = ROOT.parent / "shared" / "annotations" / "fashioniq"
CATEGORIES = ("dress", "shirt", "toptee")
LINK = r"https://colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/launch/colab/(\w+)\."


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters(notebook):
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    return cell


# ------------------------------------------------------------------------------------- as stored


def test_every_notebook_is_tested():
    assert {file.stem for file in FOLDER.iterdir()} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_in_one_form_and_without_results(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z-]+", cell.id)
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == nbformat.writes(notebook).rstrip("\n") + "\n"


def test_the_readme_links_every_notebook_in_colab():
    links = re.findall(LINK + "ipynb", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert [name for _, name in links] == list(NOTEBOOKS)
    for repository, name in links:  # the one that the notebook clones
        assert f'"https://github.com/{repository}"' in parameters(read(name)).source


# -------------------------------------------------------------------------------- the installation


def install(monkeypatch, tmp_path, *found, gpu=False):
    """Runs the cell that installs dqe_jax; what it asked of the shell, with variables filled in.

    `found` is what looks for dqe_jax give in turn: whether it is there.
    """
    sources = {
        cell.source for name in NOTEBOOKS for cell in read(name).cells if cell.id == "install"
    }
    (source,) = sources  # the same in all notebooks
    calls = []

    class Shell:
        def system(self, command):
            calls.append(command.format_map(names))

        def run_line_magic(self, name, line):
            calls.append(f"{name} {line}".format_map(names))

    looks = iter(found)
    spec = types.SimpleNamespace(origin=str(tmp_path / "root" / "dqe_jax" / "__init__.py"))
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi" if gpu else None)
    monkeypatch.setattr(glob, "glob", lambda _: [])  # no TPU
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec if next(looks) else None)
    code = TransformerManager().transform_cell(source)
    names = {"get_ipython": Shell, "REPOSITORY": "https://host/repository"}
    exec(code, names)
    assert Path.cwd() == tmp_path / "root"
    assert sys.path[0] == str(tmp_path / "root")
    return calls


def test_nothing_is_installed_where_dqe_jax_is(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    assert install(monkeypatch, tmp_path, True, True) == []


@pytest.mark.parametrize(("gpu", "extra"), [(True, "[gpu]"), (False, "")])
def test_colab_clones_and_installs(tmp_path, monkeypatch, gpu, extra):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    clone = tmp_path / "dqe_jax_clone"
    assert install(monkeypatch, tmp_path, False, True, gpu=gpu) == [
        f"git clone --quiet https://host/repository {clone}",
        f'pip install --quiet --editable "{clone}{extra}"',
    ]


@pytest.mark.parametrize("colab", [True, False])
def test_without_dqe_jax_one_sentence_says_what_to_do(tmp_path, monkeypatch, colab):
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    with pytest.raises(ImportError, match=r"on Colab set REPOSITORY above .* elsewhere install it"):
        install(monkeypatch, tmp_path, False, False)


# ------------------------------------------------------------------------------------ as executed


def execute(name, directory, **settings):
    """Runs a notebook with these values in place of those of its settings.

    Returns:
      What its code cells gave, by their ids: the printed text, and the number of pictures.
    """
    notebook = read(name)
    cell = parameters(notebook)
    for key, value in {"DIRECTORY": str(directory), **settings}.items():
        line = re.compile(rf"^{key} = .*$", re.MULTILINE)
        assert len(line.findall(cell.source)) == 1, key
        cell.source = line.sub(lambda _, new=f"{key} = {value!r}": new, cell.source)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(directory / "ipython"),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick_xla_flags(devices=1),
        **compiles_quickly(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    resources = {"metadata": {"path": str(directory)}}
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    )
    client.execute(env=environment)
    return {cell.id: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell):
    text = "".join(out.text for out in cell.outputs if out.output_type == "stream")
    return text, sum("image/png" in out.get("data", {}) for out in cell.outputs)


@pytest.mark.slow  # it is the README's main job, which CI runs
def test_shapes(tmp_path):
    results = execute("shapes", tmp_path, STEPS=8, VARIANT="smoke")
    assert {name for name, (_, pictures) in results.items() if pictures} == {
        *("curve", "look", "weights", "ask")
    }
    assert "R@10" in results["evaluate"][0]
    assert "reference_only" in results["evaluate"][0]
    assert (tmp_path / "shapes-smoke-8" / "eval" / "test-8.png").is_file()


def check_own_images(results, images):
    table, queries = results["evaluate"]
    assert "reference_only" in table
    assert queries == 1
    assert f"{images} images of" in results["embed"][0]
    text, drawn = results["ask"]
    assert drawn == 1
    assert len(re.findall(r"^-?[01]\.\d{3}  \S+\.(?:png|jpg)$", text, re.MULTILINE)) == 5


@pytest.mark.slow
def test_your_own_images(tmp_path):
    results = execute("your_own_images", tmp_path, STEPS=8, VARIANT="tiny,smoke")
    check_own_images(results, images=180)
    assert results["draw"][0].startswith("reference,text,target,kind\nshirt/red_plain.png,a bag")
    assert all(kind in results["evaluate"][0] for kind in ("article", "color", "pattern"))


@pytest.mark.slow
def test_a_folder_of_ones_own(tmp_path):
    standins.small_triplets(tmp_path / "my images")
    results = execute(
        "your_own_images", tmp_path, STEPS=2, VARIANT="tiny,smoke", RAW_DIR=f"{tmp_path}/my images"
    )
    check_own_images(results, images=24)


@pytest.mark.slow
def test_fashioniq_says_what_is_missing(tmp_path):
    raw = tmp_path / "raw"
    with pytest.raises(nbclient.exceptions.CellExecutionError) as error:
        execute("fashioniq", tmp_path, RAW_DIR=str(raw))
    said = re.sub(r"\x1b\[[\d;]*m", "", error.value.traceback)
    _, _, said = said.rpartition("------------------\n")  # what stands below the cell's source
    assert re.fullmatch(r"UserError: [^\n]*", said.strip())  # no frames
    assert f"RAW_DIR, '{raw}'" in said
    assert all(f"{kind}.{c}.val.json" in said for kind in ("cap", "split") for c in CATEGORIES)
    assert "the photos" in said
    assert "github.com/XiaoxiaoGuo/fashion-iq" in said


def some_of_fashioniq(raw, count):
    """`count` queries of each category with stand-in photos; their number of images."""
    for category in CATEGORIES:
        names = [f"{kind}.{category}.val.json" for kind in ("cap", "split")]
        captions, split = REAL / "captions" / names[0], REAL / "image_splits" / names[1]
        records = json.loads(captions.read_text())[:count]
        named = {record[role] for record in records for role in ("candidate", "target")}
        images = [image for image in json.loads(split.read_text()) if image in named]
        write_json(raw / "captions" / names[0], records)
        write_json(raw / "image_splits" / names[1], images)
        for image in images:
            standins.write_photo(raw / "images" / f"{image}.jpg", size=(20, 30))


def tiny_clip(directory):
    """A CLIP of random weights, as `save_pretrained` writes it, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    letters = string.ascii_lowercase + string.digits + string.punctuation
    ends = ("<|startoftext|>", "<|endoftext|>")
    words = [*letters, *(f"{letter}</w>" for letter in letters), *ends]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(directory)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    config = transformers.CLIPConfig(
        text_config={**sizes, **text},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(directory)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the published annotations are not here")
def test_fashioniq(tmp_path):
    tiny_clip(tmp_path / "clip")
    some_of_fashioniq(tmp_path / "raw", 60)
    results = execute(
        "fashioniq",
        tmp_path,
        RAW_DIR=str(tmp_path / "raw"),
        WEIGHTS=str(tmp_path / "clip"),
        IMAGE_SIZE=32,
    )
    assert "composer" in results["weights"][0]
    text, pictures = results["evaluate"]
    assert pictures == 1
    assert "all 180 queries" in text
    assert re.search(r"^fashioniq-original +R@10 +R@50 +mean", text, re.MULTILINE)
    for category in CATEGORIES:
        assert re.search(rf"^{category} .* 60$", text, re.MULTILINE), text
    file = tmp_path / "fashioniq-clip" / "validation-0.json"
    assert json.loads(file.read_text())["metrics"]["queries"] == 180


@pytest.mark.slow
def test_fashioniq_of_a_run(tmp_path):
    raw, run = tmp_path / "raw", tmp_path / "run"
    standins.small_fashioniq(raw)
    config = fiq_clip.get_config("smoke")
    changes = {
        "data.image_size": 32,
        "data.max_length": 12,
        "data.data_dir": str(tmp_path / "data"),
        "model.backbone": "tiny",
        "model.weights": "",
        "model.frozen": (),
        "model.dtype": "float32",
        "model.attributes.width": 32,
        "num_devices": 1,
        "total_steps": 2,
    }
    config.update_from_flattened_dict(changes)
    builder = make_builder(
        "fashioniq",
        config.data.data_dir,
        image_size=32,
        preprocess=config.data.preprocess,
        raw_dir=str(raw),
        splits=("train", "validation"),
        num_workers=1,
    )
    preparation.prepare(builder)
    assert preparation.write_report(builder, preparation.report(builder), None) == []
    metrics = train_and_evaluate(config, run)
    results = execute("fashioniq", tmp_path / "colab", RAW_DIR=str(raw), CHECKPOINT=str(run))
    assert "36 of 36 queries" in results["evaluate"][0]
    file = tmp_path / "colab" / "fashioniq-run" / "validation-2.json"
    assert json.loads(file.read_text())["metrics"] == pytest.approx(metrics, abs=1e-6)
