"""What a model takes in place of images and texts where encoders from outside make its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dqe_jax.feature_store.encoders import Encoder, open_encoder
from dqe_jax.method.arrays import Tree
from dqe_jax.models.dqe import DQE
from dqe_jax.models.features import StoredText
from dqe_jax.models.given import Given, GivenSource, state_name
from dqe_jax.utils.errors import UserError

BATCH = 64  # images or texts that an encoder gets at a time, as when features are stored


class Inputs:
    """Images and texts as they are, or what encoders make of them."""

    def __init__(self, model: DQE, encoders: Mapping[str, str]):
        """Opens the encoders that the model needs.

        Args:
          model: of any backbone.
          encoders: names of encoders (`package.module:function`) by the names of the sources of
            features that do not name their own.

        Raises:
          UserError: a source has no encoder, or it is not the one that the model was trained on.
        """
        backbone = model.backbone
        sizes = backbone.sizes if isinstance(backbone, Given) else None
        self._images = sizes.images if sizes else ()
        self._texts = sizes.texts if sizes else ()
        own = (*self._images, *self._texts)
        known = {source.name for source in own}
        for name in encoders:
            if name not in known:
                has = ", ".join(sorted(known)) or "none: it reads images and texts themselves"
                raise UserError(f"encoders: the model has no features {name!r}; it has {has}.")
        self._encoders = {source.name: _encoder_of(source, encoders) for source in own}

    def images(self, pixels: np.ndarray) -> Tree:
        """Of images uint8 `[n, H, W, 3]`, what the model takes: arrays `[n, ...]`."""
        if not self._images:
            return pixels
        return self._states(self._images, pixels, len(pixels))

    def texts(self, texts: Sequence[str], ids: np.ndarray) -> Tree:
        """Of n texts with ids int32 `[n, L]`, what the model takes: arrays `[n, ...]`."""
        if not self._texts:
            return ids
        return StoredText(ids, self._states(self._texts, list(texts), len(texts)))

    def _states(
        self, sources: Sequence[GivenSource], inputs: np.ndarray | list[str], count: int
    ) -> dict[str, np.ndarray]:
        """Arrays of all sources, by their names among the states."""
        states = {}
        for source in sources:
            encoder = self._encoders[source.name]
            parts = [
                encoder(inputs[start : start + BATCH], f"inputs from number {start + 1} on")
                for start in range(0, count, BATCH)
            ]
            for array in source.arrays:
                held = [part.get(array.name) for part in parts]
                if any(x is None or x.shape[1:] != array.shape for x in held):
                    got = {name: list(x.shape[1:]) for name, x in parts[0].items()}
                    raise UserError(
                        f"the encoder {encoder.name} gives {got}, and the model takes "
                        f"{array.name} {list(array.shape)} of {source.name!r}: it is another "
                        "encoder than that of the run."
                    )
                whole = np.concatenate([x for x in held if x is not None])
                states[state_name(source.name, array.name)] = whole.astype(array.dtype)
        return states


def _encoder_of(source: GivenSource, encoders: Mapping[str, str]) -> Encoder:
    name, _, version = source.origin.partition(" ")
    if source.name in encoders:
        return open_encoder(encoders[source.name])
    if not name:
        raise UserError(
            f"the model was trained on the imported features {source.name!r}, which do not name "
            "their encoder: name it as dqe_jax.load(..., encoders={"
            f"{source.name!r}: 'package.module:function'}})."
        )
    encoder = open_encoder(name)
    if version and encoder.version != version:
        raise UserError(
            f"the encoder {name} has version {encoder.version!r}, and the model was trained on "
            f"{version!r}: install that version."
        )
    return encoder
