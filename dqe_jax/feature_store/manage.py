"""Computes stores ahead of a run, lists them, and deletes them."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import logging
from etils import epath

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.text import encode_wordings
from dqe_jax.data.transforms import join_captions
from dqe_jax.distributed import mesh, processes
from dqe_jax.feature_store import writing
from dqe_jax.feature_store.features import Features, directory_of, sizes_of
from dqe_jax.feature_store.imports import remove_leftovers
from dqe_jax.feature_store.shards import RowSpec, open_shards
from dqe_jax.models import setup
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import make_directory, read_json
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.text_table import text_table


@dataclasses.dataclass(frozen=True)
class Stored:
    """A store that is on disk.

    Attributes:
      name: of its directory.
      kind: "image" or "text".
      backbone: whose tower it is of, "imported", or the encoder.
      shape: of its arrays, for a person.
      dtype: of its rows.
      rows: how many.
      nbytes: on disk.
    """

    name: str
    kind: str
    backbone: str
    shape: str
    dtype: str
    rows: int
    nbytes: int


def compute(config: AnyConfig, names: Sequence[str] = ()) -> None:
    """Computes what a run of a config would store, before it: the run then starts at once.

    Args:
      config: of the run; its frozen towers are stored.
      names: of splits; those that the run trains and is evaluated on by default.

    Raises:
      UserError: the config, its data or its weights cannot be used, or nothing can be stored.
    """
    config = RunConfig.of(config)
    wanted = [datasets.split_of(config.data.dataset, name) for name in names]
    devices = mesh.devices_of(config.num_devices)
    pretrained = setup.open_weights(config.model, config.data)
    builder = processes.leader_first("data", lambda: datasets.open_dataset(config.data))
    if pretrained is None:
        train = splits.open_split(config.data, builder, "train")
        tokenizer = text_tokens.train_word_tokenizer(train.queries.texts, config.data.max_length)
    else:
        tokenizer = setup.tokenizer_of(config.model, config.data, pretrained)
    sizes = sizes_of(config, pretrained)
    model = setup.model_of(config.model, config.data, tokenizer, sizes)
    features = Features(config, model, devices)
    if not features.kinds:
        raise UserError(
            "nothing can be stored for this config: config.model.frozen names no whole tower "
            "without dropout, or config.features.place is 'off'."
        )
    for name in dict.fromkeys(wanted or ["train", "validation", config.eval.split]):
        split = splits.open_split(config.data, builder, name)
        captions = config.data.captions if name == "train" else "forward"
        features.images(split.gallery, config.data.augment if name == "train" else "none")
        features.texts(encode_wordings(tokenizer, split, captions))
    params = setup.init_params(model, config.model, config.data, config.seed, pretrained)
    features.compute(mesh.replicate(params, devices))


def write_inputs(config: AnyConfig, names: Sequence[str], output: str | os.PathLike[str]) -> None:
    """Writes what has to be encoded: `images.csv`, ids, and `texts.csv`, the texts themselves.

    Args:
      config: of the run.
      names: of splits; those that the run trains and is evaluated on by default.
      output: directory, which is made.

    Raises:
      UserError: the config or its data cannot be used, or the directory cannot be written.
    """
    config = RunConfig.of(config)
    wanted = [datasets.split_of(config.data.dataset, name) for name in names]
    builder = datasets.open_dataset(config.data)
    images: dict[str, None] = {}
    texts: dict[str, None] = {}
    for name in dict.fromkeys(wanted or ["train", "validation", config.eval.split]):
        split = splits.open_split(config.data, builder, name)
        images |= dict.fromkeys(split.gallery.ids)
        texts |= dict.fromkeys(split.queries.texts)
        if name == "train" and config.data.captions == "random":
            texts |= dict.fromkeys(join_captions(c, "reverse") for c in split.queries.captions)
    directory = whole_path(output)
    make_directory(directory)
    for name, column, rows in (("images", "id", images), ("texts", "text", texts)):
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([row] for row in (column, *rows))
        (directory / f"{name}.csv").write_text(content.getvalue())
    logging.info("%s: %s images, %s texts.", directory, f"{len(images):,}", f"{len(texts):,}")


def list_stores(root: Path) -> list[Stored]:
    """The stores in a directory, by name."""
    found = []
    for directory in sorted(root.iterdir()) if root.is_dir() else ():
        try:
            facts = read_json(epath.Path(directory / writing.FACTS), dict)
            shapes = {n: (tuple(a["shape"]), a["dtype"]) for n, a in facts["arrays"].items()}
            kind, backbone = str(facts["kind"]), str(facts["backbone"])
            dtype = ", ".join(sorted({d for _, d in shapes.values()}))
            specs = {n: RowSpec.of(tuple(map(int, s)), str(d)) for n, (s, d) in shapes.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            continue  # nothing of ours
        held, _ = open_shards(directory, specs)
        rows = sum(len(shard.keys) for shard in held)
        nbytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        shape = ", ".join(f"{n} {'x'.join(map(str, s.shape))}" for n, s in specs.items())
        found.append(Stored(directory.name, kind, backbone, shape, dtype, rows, nbytes))
    return found


def show_stores(config: AnyConfig) -> None:
    """Logs a table of the stores that runs of a config would find."""
    root = directory_of(RunConfig.of(config))
    stores = list_stores(root)
    if not stores:
        logging.info("There are no features in %s.", root)
        return
    head = ("store", "of", "made by", "a row", "dtype", "rows", "GB")
    lines = [
        (s.name, s.kind, s.backbone, s.shape, s.dtype, f"{s.rows:,}", f"{s.nbytes / 1e9:.3f}")
        for s in stores
    ]
    logging.info("%s:\n%s", root, text_table([head, *lines]))


def delete_stores(config: AnyConfig, names: Sequence[str]) -> None:
    """Deletes stores: they can always be computed, or imported, again.

    Args:
      config: whose directory it is.
      names: of the stores, as `show_stores` gives them, or "all", which is also what killed imports
        have left.

    Raises:
      UserError: there is no such store, or it cannot be deleted.
    """
    root = directory_of(RunConfig.of(config))
    known = [store.name for store in list_stores(root)]
    for name in names:
        if name not in (*known, "all"):
            raise UserError(
                f"--delete={name}: there are no such features in {root}; there are "
                f"{', '.join(known) or 'none'}."
            )
    chosen = known if "all" in names else list(dict.fromkeys(names))
    if "all" in names and root.is_dir():
        with writing.locked(root, writing.LOCK_OF_IMPORTS) as has_locks:
            if has_locks:
                remove_leftovers(root)
    for name in chosen:
        try:
            shutil.rmtree(root / name)
        except OSError as error:
            raise UserError(
                f"{root / name} cannot be deleted ({error.strerror or error}): see who may write "
                "there."
            ) from error
    logging.info("%d deleted: %s.", len(chosen), ", ".join(chosen) or "there were none")
