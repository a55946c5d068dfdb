"""A first hour with the project, as three people have it: no command ends in a dead end.

Each runs the commands of the documentation in an empty directory, with less data and fewer steps,
and makes the mistakes that are easily made: each must end in one sentence that says what to do.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dqe_jax.testing import standins
from dqe_jax.testing.small_runs import compiles_quickly, quick_xla_flags

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


class Person:
    """Types commands in a directory of their own."""

    def __init__(self, place):
        self.place = place
        shutil.copytree(ROOT / "configs", place / "configs")

    def types(self, command, status=0):
        """What a command says; `status` is how it must end."""
        words = shlex.split(command)
        assert words[0] == "python"
        env = os.environ | compiles_quickly() | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        env |= {"HOME": str(self.place / "home"), "HF_HUB_OFFLINE": "1"}
        env["XLA_FLAGS"] = quick_xla_flags()
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=self.place,
            env=env,
            capture_output=True,
            text=True,
            timeout=800,
        )
        said = done.stdout + done.stderr
        assert done.returncode == status, said
        assert "Traceback" not in said
        if status:  # the last line says what to do
            assert re.match(r"error: .*[.?]$", done.stderr.strip().splitlines()[-1]), said
        return said


def test_a_student_with_a_laptop(tmp_path):
    person = Person(tmp_path)
    said = person.types("python -m dqe_jax.main --config=configs/shapes.py:smoke")
    assert "proves only that everything works" in said or "smoke" in said
    assert "R@10" in said
    assert list((tmp_path / "runs" / "shapes-smoke" / "eval").glob("test-*.png"))
    said = person.types(
        "python -m dqe_jax.evaluate --config=configs/shapes.py:smoke --workdir=runs/shapes-smoke "
        "--split=test"
    )
    assert "R@10" in said
    # Slips: a field, a config, a run that is not there, and a change of the model afterwards.
    typo = "python -m dqe_jax.main --config=configs/shapes.py:smoke --config.model.bakbone=tiny"
    person.types(typo, status=2)
    said = person.types("python -m dqe_jax.main --config=configs/shape.py", status=2)
    assert "shapes" in said
    person.types(
        "python -m dqe_jax.evaluate --config=configs/shapes.py:smoke --workdir=runs/none", status=2
    )
    person.types(
        "python -m dqe_jax.evaluate --config=configs/shapes.py --workdir=runs/shapes-smoke",
        status=2,
    )
    said = person.types(
        "python -m dqe_jax.ablate --config=configs/shapes.py:smoke --variants=full --seeds=1 "
        "--equal=steps --config.total_steps=8"
    )
    assert "infonce" in said
    said = person.types(
        "python -m dqe_jax.audit --config=configs/shapes.py:smoke --workdir=runs/shapes-smoke"
    )
    assert "trns" in said


def test_a_researcher_with_fashioniq(tmp_path):
    person = Person(tmp_path)
    command = "python -m dqe_jax.prepare --dataset=fashioniq --raw_dir=raw --data_dir=data"
    (tmp_path / "raw").mkdir()
    said = person.types(command, status=2)  # the files are not there yet
    assert "cap.dress.train.json" in said
    standins.small_fashioniq(tmp_path / "raw")
    said = person.types(f"{command} --image_size=32 --max_missing=1")
    assert "train" in said
    # The weights cannot be downloaded: the sentence says what to name.
    said = person.types(
        "python -m dqe_jax.main --config=configs/fiq.py:smoke --data_dir=data "
        "--config.data.image_size=32",
        status=2,
    )
    assert "config.model.weights" in said or "Salesforce/blip2" in said
    tiny = (
        "--config=configs/fiq.py:smoke --data_dir=data --config.data.image_size=32 "
        "--config.model.backbone=tiny --config.model.frozen= --config.model.weights= "
        "--config.model.dtype=float32 --config.model.scan_layers=False "
        "--config.model.attributes.width=32 --config.batch.references=2"
    )
    said = person.types(f"python -m dqe_jax.main {tiny} --workdir=runs/fiq")
    assert "R@50" in said
    said = person.types(f"python -m dqe_jax.evaluate {tiny} --workdir=runs/fiq --split=val")
    assert "dress" in said
    said = person.types(
        "python -m dqe_jax.plan --config=configs/fiq_clip.py --topology=gpu:8 --programs=step"
    )
    assert "features of images" in said


def test_a_shop_with_photos(tmp_path):
    person = Person(tmp_path)
    shop = tmp_path / "shop"
    shop.mkdir()
    command = "python -m dqe_jax.prepare --dataset=triplets --raw_dir=shop --data_dir=data"
    said = person.types(f"{command} --image_size=64", status=2)
    assert "triplets.csv" in said
    standins.small_triplets(shop)
    person.types(f"{command} --image_size=64")
    train = "python -m dqe_jax.main --config=configs/triplets.py:tiny,smoke --data_dir=data"
    said = person.types(f"{train} --workdir=runs/shop")
    assert "R@10" in said
    person.types(f"{train.replace('=data', '=shop')} --workdir=runs/other", status=2)
    said = person.types(
        "python -m dqe_jax.evaluate --config=configs/triplets.py:tiny,smoke --data_dir=data "
        "--workdir=runs/shop --split=test"
    )
    assert "R@10" in said
    sheets = list((tmp_path / "runs" / "shop" / "eval").glob("*.png"))
    assert sheets
