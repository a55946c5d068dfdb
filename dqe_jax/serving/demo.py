"""A small model for show: `shapes`, trained for less than a minute where no model is given."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

from absl import logging
from PIL import Image

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.search.index import Index
from dqe_jax.search.loading import load
from dqe_jax.training.loop import train_and_evaluate
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.progress import progress

SECONDS = 45.0
IMAGES = 1_500  # of the test split
PROBE = 24  # steps that are timed to choose the number of steps
LEAST, MOST = 40, 1_500  # steps
_DONE = "demo.json"  # is written last


def make_demo(config: RunConfig, directory: Path, *, seconds: float = SECONDS) -> tuple[Index, str]:
    """Trains a model of `shapes` for some seconds, and indexes test images of it.

    What an earlier call has made in the directory is taken again.

    Args:
      config: of `shapes`.
      directory: for all that is made: data, run, photos and index.
      seconds: of training.

    Returns:
      The index, and a sentence that says what it is.

    Raises:
      UserError: the directory cannot be written.
    """
    done = directory / _DONE
    if done.is_file():
        logging.info("The model of an earlier start is in %s; delete it to train again.", directory)
    else:
        _train(config, directory, seconds)
    try:
        held = json.loads(done.read_text(encoding="utf-8"))
        steps, took, recall = int(held["steps"]), float(held["seconds"]), float(held["recall"])
        run = directory / str(held["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{done} is damaged: delete {directory} and start again.") from error
    model = load(run)
    index = model.index(
        directory / "photos", output=directory / "index", table=directory / "photos.csv"
    )
    about = (
        f"This is a demonstration: drawn shapes, and a small model that was trained here "
        f"for {took:.0f} seconds ({steps} steps). On validation scenes, the right one comes "
        f"first for {recall:.0%} of the queries. Texts are such as “paint the small circle red”, "
        "“add a large blue square” or “remove the green triangle”."
    )
    return index, about


def _train(config: RunConfig, directory: Path, seconds: float) -> None:
    """Trains, draws the photos, and says what was done."""
    logging.info(
        "No model is given: a small one is trained for %.0f seconds on drawn shapes, as a "
        "demonstration. It lies in %s and is taken again at the next start.",
        seconds,
        directory,
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {directory} ({error.strerror}): name another place by --demo_dir."
        ) from error
    own = {"data.prepared_dir": str(directory / "data"), "log_every": 8}
    config = config.with_changes(own)
    run = f"run-{int(time.time())}"
    began = time.monotonic()
    steps = _steps_in(config, directory / f"{run}-probe", seconds)
    logging.info(
        "Training %d steps, about %.0f seconds (ready to train after %.0f).",
        steps,
        seconds,
        time.monotonic() - began,
    )
    warm = min(config.optimizer.warmup_steps, steps // 4)
    planned = config.with_changes(
        {
            "total_steps": steps,
            "optimizer.warmup_steps": warm,
            "eval_every": steps,
            "checkpoint_every": steps,
            "eval.split": "validation",
            "log_every": max(1, steps // 10),
        }
    )
    measured = train_and_evaluate(planned, directory / run)
    took = _train_seconds(directory / run)[-1]
    _draw(planned, directory)
    facts = {"run": run, "steps": steps, "seconds": took, "recall": measured["R@1"]}
    (directory / _DONE).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _steps_in(config: RunConfig, workdir: Path, seconds: float) -> int:
    """How many steps fit, by a few that are timed after the first ones have compiled."""
    probe = config.with_changes(
        {
            "total_steps": PROBE,
            "optimizer.warmup_steps": PROBE // 2,
            "eval_every": 0,
            "checkpoint_every": PROBE,
        }
    )
    train_and_evaluate(probe, workdir)
    times = _train_seconds(workdir)
    each = (times[-1] - times[0]) / (PROBE - config.log_every)
    return int(min(MOST, max(LEAST, seconds / max(each, 1e-6))))


def _train_seconds(workdir: Path) -> list[float]:
    lines = (workdir / "timing.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["train_seconds"]) for line in lines]


def _draw(config: RunConfig, directory: Path) -> None:
    """Writes test images and a table of what they show."""
    builder = datasets.open_dataset(config.data)
    split = splits.open_split(config.data, builder, "test")
    count = min(IMAGES, len(split.gallery))
    photos = directory / "photos"
    photos.mkdir(exist_ok=True)
    for row in progress(range(count), count, "Drawing scenes"):
        Image.fromarray(split.gallery[row]).save(photos / f"scene-{row:04d}.png")
    things = splits.gallery_attributes(builder, "test")[:count]  # "top left=small red circle"
    with (directory / "photos.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "objects", "shapes"])
        for row, own in enumerate(things):
            shapes = sorted({thing.split()[-1] for thing in own})
            table.writerow([f"scene-{row:04d}.png", len(own), " and ".join(shapes)])
