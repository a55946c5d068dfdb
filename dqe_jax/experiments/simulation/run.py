"""Measures how many wishes a simulated user finds in a few turns, and writes the user's log.

Writes `simulation-<split>-<step>.json` and logs a table: the share of wishes of which a valid image
is shown among the first images, by turn, for each way in which the search treats what was said
before (`user.MODES`).
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.data import datasets, feedback, splits
from dqe_jax.data.made.wording import make_grammar
from dqe_jax.data.splits import Split
from dqe_jax.experiments.described import described, write_images
from dqe_jax.experiments.simulation import user
from dqe_jax.experiments.simulation.user import Wish, World
from dqe_jax.search.index import Index
from dqe_jax.search.loading import load
from dqe_jax.search.relevance import MOVES, Moves
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, write_json
from dqe_jax.utils.paths import on_disk, whole_path
from dqe_jax.utils.text_table import text_table


def simulate(
    config: AnyConfig,
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    split: str = "test",
    users: int = 500,
    seeds: Sequence[int] = (0, 1, 2),
    turns: int = 3,
    shown: int = 10,
    moves: Moves = MOVES,
    photos: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
) -> JsonObject:
    """Lets simulated users search with a trained model.

    Args:
      config: of the data; the model is of its own config.
      directory: of the run, or of an export.
      step: of its checkpoint; None for the newest.
      split: whose images are searched, by any name of it.
      users: wishes for each seed, drawn from the split's queries.
      seeds: each draws wishes and words of its own.
      turns: the most of a conversation.
      shown: images that a user looks at in a turn.
      moves: how far a conversation moves a query.
      photos: folder for the images, which is kept; None for one that is removed at the end.
      log: file for what the users of the mode `feedback` click; needs `photos`.
      output: directory of the result; None for `<directory>/eval`.

    Returns:
      What the JSON holds.

    Raises:
      UserError: the data do not describe images by attributes, or something cannot be used.
    """
    config = RunConfig.of(config)
    if log is not None and photos is None:
        raise UserError("--log names images of a folder that is kept: give --photos=DIR too.")
    kept = None if photos is None else on_disk(photos, "--photos")
    log = None if log is None else on_disk(log, "--log")
    split = datasets.split_of(config.data.dataset, split)
    builder = datasets.open_dataset(config.data)
    opened = splits.open_split(config.data, builder, split)
    names, values = described(splits.gallery_attributes(builder, split), config.data.dataset)
    if not any(map(len, opened.queries.relevant)):
        raise UserError(f"{config.data.dataset} does not say which images are valid for a query.")
    with tempfile.TemporaryDirectory(prefix="dqe-simulation-") as place:
        folder = kept or Path(place)
        ids = write_images(opened, folder)
        model = load(directory, step=step)
        index = model.index(folder)
        world = World(
            ids=ids,
            values=values,
            grammar=make_grammar(
                {name: sorted({own[i] for own in values}) for i, name in enumerate(names)}
            ),
            counted=_counted(opened, values),
        )
        found = _run(index, world, opened, users, seeds, turns, shown, moves, log)
    facts: JsonObject = {
        "dataset": config.data.dataset,
        "variant": config.data.variant,
        "split": split,
        "step": model.step,
        "model": str(directory),
        "images": len(ids),
        "attributes": [names[i] for i in world.counted],
        "users": users,
        "seeds": list(seeds),
        "shown": shown,
        "moves": {"earlier": moves.earlier, "decay": moves.decay, "rejected": moves.rejected},
        "found": found,
    }
    target = whole_path(output) if output is not None else whole_path(directory) / "eval"
    path = target / f"simulation-{split}-{model.step}.json"
    write_json(path, facts)
    logging.info("%s", told(found, seeds))
    logging.info("Written to %s.", path)
    return facts


def _run(
    index: Index,
    world: World,
    split: Split,
    users: int,
    seeds: Sequence[int],
    turns: int,
    shown: int,
    moves: Moves,
    log: str | os.PathLike[str] | None,
) -> dict[str, list[list[float]]]:
    """Of each mode, for each seed: the share found by each turn."""
    found: dict[str, list[list[float]]] = {mode: [] for mode in user.MODES}
    for seed in seeds:
        wishes = _wishes(split, users, seed)
        for mode in user.MODES:
            at, clicks = user.search_all(
                index,
                world,
                wishes,
                mode=mode,
                seed=seed,
                turns=turns,
                shown=shown,
                moves=moves,
            )
            found[mode].append([float(((at > 0) & (at <= t + 1)).mean()) for t in range(turns)])
            if log is not None and mode == "feedback":
                for click in clicks:
                    feedback.append(log, click, {})
        logging.info("Seed %d: %s.", seed, ", ".join(f"{m} {found[m][-1][-1]:.3f}" for m in found))
    return found


def _counted(split: Split, values: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Positions of the attributes in which all valid images of a query agree."""
    queries, count = split.queries, len(split.gallery)
    counted = set(range(len(values[0])))
    for target, relevant in zip(queries.target, queries.relevant):
        rows = [row for row in relevant if row < count]
        counted -= {i for i in counted if any(values[r][i] != values[target][i] for r in rows)}
    return tuple(sorted(counted))


def _wishes(split: Split, users: int, seed: int) -> list[Wish]:
    queries = split.queries
    usable = np.flatnonzero([len(rows) > 0 for rows in queries.relevant])
    rng = np.random.default_rng([seed, 11])
    chosen = rng.permutation(usable)[:users]
    return [
        Wish(
            reference=int(queries.reference[i]),
            text=queries.texts[i],
            target=int(queries.target[i]),
            valid=frozenset(int(row) for row in queries.relevant[i]) - {int(queries.reference[i])},
        )
        for i in chosen
    ]


def told(found: Mapping[str, Sequence[Sequence[float]]], seeds: Sequence[int]) -> str:
    """A table of the shares: mean over the seeds, and their spread."""
    turns = len(next(iter(found.values()))[0])
    lines = [["what was said before", *(f"in {t + 1}" for t in range(turns)), "spread"]]
    for mode, every in found.items():
        means = [statistics.mean(own[t] for own in every) for t in range(turns)]
        last = [own[-1] for own in every]
        spread = f"{statistics.stdev(last):.3f}" if len(last) > 1 else ""
        lines.append([mode, *(f"{mean:.3f}" for mean in means), spread])
    named = ", ".join(map(str, seeds))
    return f"Share of wishes found by turn, mean over seeds {named}:\n{text_table(lines)}"
