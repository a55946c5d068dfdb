"""The measurement of a server under load, at a small size; and the demonstration."""

import json
import threading

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed")

from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig
from dqe_jax.search.loading import load
from dqe_jax.serving import demo
from dqe_jax.serving.load import measure, told
from dqe_jax.serving.notebook import show
from dqe_jax.testing.commands import run_module


@pytest.mark.slow
def test_a_small_server_is_measured(place):
    model = load(place / "run", num_devices=1, batch_size=8)
    lines = measure(model, images=300, tokens=[1, 4], numbers=[2], seconds=2.0, files=50)
    assert [(line["tokens"], line["clients"]) for line in lines] == [(1, 2), (4, 2)]
    for line in lines:
        assert line["errors"] == {}
        assert line["searches"] > 5
        assert 0 < line["p50_ms"] <= line["p95_ms"]
    assert "p95 ms" in told(lines)


@pytest.mark.slow
def test_the_demonstration_is_made_once(tmp_path, caplog):
    config = RunConfig.of(load_config("shapes:smoke")).with_changes({"num_devices": 1})
    index, about = demo.make_demo(config, tmp_path / "demo", seconds=1.0)
    assert "trained here" in about
    assert len(index) > 10
    assert set(index.columns) == {"objects", "shapes"}
    held = json.loads((tmp_path / "demo" / "demo.json").read_text())
    again, same = demo.make_demo(config, tmp_path / "demo")
    assert same == about
    assert again.report.embedded == 0
    assert held == json.loads((tmp_path / "demo" / "demo.json").read_text())


@pytest.mark.slow
def test_a_notebook_shows_the_page(index):
    page = show(index)
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{page.port}/", timeout=30) as answer:
        policy = answer.headers["content-security-policy"]
    assert "frame-ancestors *" in policy
    page.close()
    assert not any(t.name == "page" for t in threading.enumerate())


@pytest.mark.slow
def test_mistakes_of_the_command_are_told(place):
    for flags, words in (
        (("--host=0.0.0.0",), "give --token as well"),
        (("--token=short",), "at least 16 letters and digits"),
        (("--images=photos",), "--images needs a model"),
        (("--table=t.csv",), "--table needs the folder"),
        (("--max_seconds=nan",), "give a number"),
    ):
        done = run_module("dqe_jax", "serve", *flags, cwd=place)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
