"""A trained model opened by its path alone: a run's directory, or what `dqe-jax export` wrote."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from tokenizers import Tokenizer

from dqe_jax.checkpoints import exported, hub, store
from dqe_jax.checkpoints.fingerprint import fingerprint_of
from dqe_jax.checkpoints.merging import merged
from dqe_jax.checkpoints.trained import open_trained
from dqe_jax.config import RunConfig
from dqe_jax.distributed import mesh
from dqe_jax.method.arrays import Params
from dqe_jax.models.dqe import DQE
from dqe_jax.models.setup import model_of, param_shapes
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.utils import quiet
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.paths import is_remote, whole_path

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # slow to import


@dataclasses.dataclass(frozen=True)
class Opened:
    """A trained model and all that is needed to use it.

    Attributes:
      origin: the path that it was opened by, absolute.
      config: of the run.
      step: of the checkpoint.
      model: as the config says.
      tokenizer: of the texts.
      devices: to run on.
      params: of the model, as NumPy arrays.
      fingerprint: see `fingerprint.py`.
      probability: of a score, as `evaluation/probability.py` writes it; None without one.
    """

    origin: str
    config: RunConfig
    step: int
    model: DQE
    tokenizer: Tokenizer
    devices: list[jax.Device]
    params: Params
    fingerprint: str
    probability: JsonObject | None


def open_model(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    num_devices: int = 0,
    keep_adapters: bool = False,
) -> Opened:
    """Opens a trained model.

    Args:
      path: a workdir or its `checkpoints` directory, or a directory that `dqe-jax export` wrote;
        also in a bucket (`gs://`); or a model on the Hugging Face hub, `hf://OWNER/NAME`, with `@`
        and a revision if need be.
      step: of the checkpoint of a workdir; None for the newest that is whole.
      num_devices: how many devices to use; 0 for all.
      keep_adapters: whether adapters of a workdir stay, as training needs them; else they are
        merged into their kernels, as on export.

    Raises:
      UserError: there is no model, it is damaged, or there is no such step.
    """
    directory = hub.fetch(path) if hub.is_on_hub(path) else whole_path(path)
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {directory}: name the workdir of a run, or a directory that "
            "dqe-jax export wrote."
        )
    if exported.is_exported(directory):
        if step is not None:
            raise UserError(f"{directory} is an exported model, which has no steps: give none.")
        return _of_export(directory, num_devices)
    if not (directory / "checkpoints").is_dir() and not store.steps_of(directory.parent):
        raise UserError(
            f"{directory} holds no model: name the workdir of a run, or a directory that dqe-jax "
            "export wrote."
        )
    with quiet.without_old_news():
        return _of_run(directory, step, num_devices, keep_adapters)


def _of_run(
    directory: epath.Path, step: int | None, num_devices: int, keep_adapters: bool
) -> Opened:
    manager = store.open_for_reading(directory)
    _, meta = store.read_chosen(manager, step, lambda number: _read_meta(manager, number))
    config = exported.config_of(meta["config"]).with_changes({"num_devices": num_devices})
    trained = open_trained(config, directory, step)
    sizes = meta["sizes"] and size_files.from_json(config.model.backbone, meta["sizes"])
    model, params = trained.model, trained.params
    if config.model.lora.rank and not keep_adapters:
        config, params = merged(config, params)
        model = model_of(config.model, config.data, trained.tokenizer, sizes)
    return Opened(
        origin=str(directory),
        config=config,
        step=trained.step,
        model=model,
        tokenizer=trained.tokenizer,
        devices=trained.devices,
        params=params,
        fingerprint=fingerprint_of(config, sizes, params),
        probability=trained.probability,
    )


def _read_meta(manager: ocp.CheckpointManager, step: int) -> JsonObject:
    """The meta of a checkpoint, whose config can be used; raises as `store.read_meta`."""
    meta = store.read_meta(manager, step)
    with store.told_damaged(manager, step):
        exported.config_of(meta["config"])
    return meta


def _of_export(directory: epath.Path, num_devices: int) -> Opened:
    if not is_remote(directory):
        held = exported.read(directory)
    else:  # safetensors reads files of this machine
        with tempfile.TemporaryDirectory() as copy:
            for file in directory.iterdir():
                if file.suffix in (".json", ".safetensors"):
                    file.copy(Path(copy) / file.name)
            held = exported.read(epath.Path(copy))
    config = held.config.with_changes({"num_devices": num_devices})
    words = exported.words_of(directory, held)
    model = model_of(config.model, config.data, words, held.sizes)
    params = _fitted(directory, held.params, param_shapes(model, config.model, config.data))
    fingerprint = fingerprint_of(config, held.sizes, params)
    if fingerprint != held.fingerprint:
        raise UserError(
            f"the weights in {directory} are not those that were exported (fingerprint "
            f"{fingerprint[:8]}, not {held.fingerprint[:8]}): {exported.AGAIN}."
        )
    return Opened(
        origin=str(directory),
        config=config,
        step=held.step,
        model=model,
        tokenizer=words,
        devices=mesh.devices_of(num_devices),
        params=params,
        fingerprint=fingerprint,
        probability=held.probability,
    )


def _fitted(directory: epath.Path, held: dict[str, np.ndarray], shapes: Params) -> Params:
    """The parameters in the dtypes of the model.

    Raises:
      UserError: they are not those of the model.
    """
    wanted = flatten_dict(shapes, sep="/")
    wrong = sorted(held.keys() ^ wanted.keys())
    wrong += [path for path in held if path in wanted and held[path].shape != wanted[path].shape]
    if wrong:
        raise UserError(
            f"the weights in {directory} are not those of its config, first {wrong[0]}: "
            f"{exported.AGAIN}."
        )
    return unflatten_dict({p: np.asarray(x, wanted[p].dtype) for p, x in held.items()}, sep="/")
