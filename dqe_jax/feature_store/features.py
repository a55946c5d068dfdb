"""What the frozen towers of a model make of images and texts: computed once, then looked up.

A tower that does not train makes the same states of an image each time. `Features` computes them
once for each image (mirrored too, where training mirrors) and each text, keeps them in a store on
disk (`shards.py`), and gives sources that look them up (`tables.py`). A store is named by all that
its rows depend on, and a row by the content that it is made of (`keys.py`): what has changed is
computed, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax
import numpy as np

from dqe_jax.config import RunConfig
from dqe_jax.data.digest import digests_of_rows
from dqe_jax.data.splits import Gallery
from dqe_jax.data.text import Wordings
from dqe_jax.embedding.sources import Images, PlainImages, PlainTexts, Texts
from dqe_jax.feature_store.fallback import ImagesOrPlain, TextsOrPlain
from dqe_jax.feature_store.given import GivenStore, given_sizes
from dqe_jax.feature_store.needs import Need, text_digests
from dqe_jax.feature_store.sources import StoredImages, StoredTexts, Use
from dqe_jax.feature_store.store import Store, dtype_of, states_of
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.method.batch import Batch
from dqe_jax.models.dqe import DQE
from dqe_jax.models.features import StoredText
from dqe_jax.models.given import Given, with_moments
from dqe_jax.models.resuming import ENTERING
from dqe_jax.models.setup import adapted_parts, param_shapes
from dqe_jax.models.weights.initial import Pretrained
from dqe_jax.models.weights.sizes import Sizes
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import is_remote, whole_path

KINDS = ("image", "text")


def given_kinds(model: DQE) -> tuple[str, ...]:
    """The kinds, of `KINDS`, whose features come from outside the model."""
    return tuple(kind for kind in KINDS if model.backbone.given_states(kind))


def stored_kinds(config: RunConfig, model: DQE) -> tuple[str, ...]:
    """The kinds that are stored, of `KINDS`.

    Their features come from outside, or their towers are frozen and have no dropout.

    Raises:
      UserError: a store is asked for and there is nothing to store, or images are augmented in a
        way that no store can hold.
    """
    place, backbone, given = config.features.place, model.backbone, given_kinds(model)
    if place == "off":
        if given:
            raise UserError(
                f"config.features.place is 'off', and the backbone {config.model.backbone!r} has "
                "no tower that could be computed in each step: take 'auto'."
            )
        return ()
    frozen = set(config.model.frozen)
    # A tower with adapters changes; but not below the first layer that has one.
    lora = config.model.lora.rank > 0
    changing = adapted_parts(model, config.model, config.data) if lora else frozenset[str]()
    own = frozenset(backbone.TOWERS["image"])
    if own & changing and own <= frozen and _is_cut(config, model):
        changing -= own
    frozen -= changing
    fixed = tuple(k for k in KINDS if k in given or set(backbone.TOWERS[k]) <= frozen)
    kinds = tuple(k for k in fixed if k in given or k not in backbone.random_towers())
    if not kinds and place != "auto":
        tower = ", ".join(backbone.TOWERS["image"])
        why = "its towers have dropout" if fixed else f"config.model.frozen does not name {tower}"
        if config.model.lora.rank and set(backbone.TOWERS["image"]) <= set(config.model.frozen):
            why = f"adapters change {tower} (config.model.lora)"
        raise UserError(
            f"config.features.place is {place!r}, but nothing can be stored: {why}; take 'auto' "
            "or 'off'."
        )
    if "image" in given and config.data.augment not in ("none", "flip"):
        raise UserError(
            f"config.data.augment is {config.data.augment!r}: features that come from outside "
            "take 'none', or 'flip' if an encoder is named that computes them."
        )
    if "image" in kinds and config.data.augment not in ("none", "flip"):
        raise UserError(
            f"config.data.augment is {config.data.augment!r}: a frozen tower whose output is "
            "stored takes 'none' or 'flip'; choose one, or config.features.place='off' to compute "
            "the tower in each step."
        )
    return kinds


def _is_cut(config: RunConfig, model: DQE) -> bool:
    """Whether the states of an image are what enters the layers that have adapters."""
    if not model.upper_layers:
        return False
    size = config.data.image_size
    one = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    params = param_shapes(model, config.model, config.data)
    return ENTERING in jax.eval_shape(states_of(model, "image", dtype_of(config)), params, one)


def directory_of(config: RunConfig) -> Path:
    """The directory of all stores.

    Raises:
      UserError: it is not on a disk of this machine.
    """
    named = config.features.directory
    if not named and is_remote(config.data.prepared_dir):
        named = "~/.cache/dqe_jax/features"
    place = whole_path(named or f"{config.data.prepared_dir}/features")
    if is_remote(place):
        raise UserError(
            f"config.features.directory is {named!r}: name a directory on a disk of this machine."
        )
    return Path(place)


def sizes_of(config: RunConfig, pretrained: Pretrained | None) -> Sizes | None:
    """The sizes of a config's model where the config does not say them itself.

    Args:
      config: of the run.
      pretrained: weights of its pretrained backbone, or None.

    Raises:
      UserError: features that the config names are not found.
    """
    if config.model.backbone == "features":
        return given_sizes(config, directory_of(config))
    return None if pretrained is None else pretrained.sizes


def states_spec(
    config: RunConfig, model: DQE, params: Params, kind: str, inputs: jax.ShapeDtypeStruct
) -> Tree:
    """Shapes of what stands for images or texts `[*axes, ...]` in a batch of a run.

    Args:
      config: of the run.
      model: of the config.
      params: shapes of its parameters.
      kind: of `KINDS`.
      inputs: shape of the images, or of the token ids.
    """
    if kind not in stored_kinds(config, model):
        return inputs
    inner = 3 if kind == "image" else 1
    axes, one = inputs.shape[:-inner], inputs.shape[-inner:]
    shapes = model.backbone.given_states(kind)
    if not shapes:
        single = jax.ShapeDtypeStruct((1, *one), inputs.dtype)
        made = jax.eval_shape(states_of(model, kind, dtype_of(config)), params, single)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), made)
    states = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape), x.dtype), dict(shapes))
    return StoredText(cast(Array, inputs), states) if kind == "text" else states


class Features:
    """The stores of a model, and sources that read them; plain sources of what is not stored.

    Ask for the sources first: `fill` computes what they all need.
    """

    def __init__(self, config: RunConfig, model: DQE, devices: Sequence[jax.Device]):
        """Decides what is stored; raises as `stored_kinds` and `directory_of`."""
        kinds = stored_kinds(config, model)
        root = directory_of(config) if kinds else Path()
        given, self._stores = given_kinds(model), dict[str, Store | GivenStore]()
        for kind in kinds:
            if kind in given:
                assert isinstance(model.backbone, Given), "no other takes what it does not make"
                self._sizes = sizes = model.backbone.sizes
                self._stores[kind] = GivenStore(kind, config, sizes, devices, root)
            else:
                self._stores[kind] = Store(kind, config, model, devices, root)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that are stored, of `KINDS`."""
        return tuple(self._stores)

    def images(self, gallery: Gallery, augment: str = "none") -> Images:
        """The images of a gallery; `augment` is what training does to them."""
        if "image" not in self._stores:
            return PlainImages(gallery, augment)
        views = (0, 1) if augment == "flip" else (0,)
        needs = [Need(gallery.contents, gallery.__getitem__, gallery.ids, view) for view in views]
        store = self._stores["image"]
        store.add(needs)
        stored = StoredImages(Use(store, needs), len(views) > 1)
        if isinstance(store, GivenStore):
            return stored
        return ImagesOrPlain(store, stored, PlainImages(gallery, augment))

    def texts(self, wordings: Wordings) -> Texts:
        """Texts, each in some wordings."""
        store, ids = self._stores.get("text"), wordings.ids
        if store is None:
            return PlainTexts(ids)

        def need(own: np.ndarray, texts: Sequence[str]) -> Need:
            if isinstance(store, GivenStore):  # it reads texts, not ids
                return Need(functools.partial(text_digests, texts), own.__getitem__, texts)
            return Need(functools.partial(digests_of_rows, own), own.__getitem__, texts)

        needs = [need(own, texts) for own, texts in zip(ids.swapaxes(0, 1), wordings.texts)]
        store.add(needs)
        stored = StoredTexts(Use(store, needs), ids)
        if isinstance(store, GivenStore):
            return stored
        return TextsOrPlain(store, stored, PlainTexts(ids))

    def fill(self, params: Params) -> None:
        """Computes what the sources need and no store has, and puts it in its place.

        Args:
          params: all parameters, replicated over the devices.

        Raises:
          UserError: a number is not finite; or the disk cannot be written or is too small, and
            `config.features.place` is not "auto", which then computes the tower in each step.
        """
        for store in self._stores.values():
            store.fill(params)

    def standardize(self, params: Params) -> Params:
        """Fresh parameters that start by standardizing what comes from outside the model.

        Args:
          params: of the whole model. The stores of such features are filled.
        """
        given = {k: s for k, s in self._stores.items() if isinstance(s, GivenStore)}
        if not given:
            return params
        for store in given.values():
            store.fill(params)
        moments = {name: own for store in given.values() for name, own in store.moments().items()}
        return with_moments(params, self._sizes, moments)

    def compute(self, params: Params) -> None:
        """As `fill`, but the rows stay on disk."""
        for store in self._stores.values():
            store.compute(params)

    def resolve(self, batch: Batch) -> Batch:
        """A training batch `[devices, ...]` with what the model takes in place of row numbers."""
        if self._holds("image"):
            wanted = batch.reference_image, batch.target_image
            reference, target = self._stores["image"].table.resolve(wanted)
            batch = dataclasses.replace(batch, reference_image=reference, target_image=target)
        if self._holds("text"):
            text = batch.text
            assert isinstance(text, StoredText)
            states = self._stores["text"].table.resolve(text.states)
            batch = dataclasses.replace(batch, text=StoredText(text.ids, states))
        return batch

    def _holds(self, kind: str) -> bool:
        """Whether the features of a kind are looked up."""
        store = self._stores.get(kind)
        return store is not None and not (isinstance(store, Store) and store.given_up)
