"""The commands `index` and `search`, as a user types them."""

import shutil

from dqe_jax.testing.commands import run_module


def test_the_commands(run, photos, tmp_path):
    shutil.copytree(run[1] / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "t.csv").write_text("image,price\n000,1\n001,2\n002,3\n003,4\n")

    def command(name, *arguments, status=0):
        done = run_module("dqe_jax", name, *arguments, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    make = ("--model=run", f"--images={photos}", "--output=index", "--table=t.csv")
    said = command("index", *make)
    assert "40 images: 40 added, 40 embedded." in said
    assert "36 images have no line" in said
    said = command(
        *("search", "--index=index", "--image=000.png", "make the red zork blue", "--k=3"),
        *("--weight=color=2", "--filter=price=2..4", "--exclude=more/001.png"),
        "--output=grid.html",
    )
    assert "the model ignores 'zork'" in said
    assert "more/003.png" in said
    assert "002.png" in said
    assert "001.png" not in said
    assert (tmp_path / "grid.html").read_text().count("data:image") == 3
    for arguments, words in (
        (("--image=no.png",), "no.png is not there"),
        (("--image=000.png", "red", "blue"), "unexpected argument 'blue'"),
        (("--image=000.png", "--weight=color"), "--weight=color: give it as NAME=VALUE"),
        (("--image=000.png", "--filter=price=a..b"), "'a..b' is no range"),
    ):
        assert words in command("search", "--index=index", *arguments, status=2)
    (tmp_path / "run").rename(tmp_path / "moved")
    search = ("search", "--index=index", "--image=000.png", "red")
    assert "Name it by --model" in command(*search, status=2)
    assert "more/001.png" in command(*search, "--model=moved", "--k=40")
