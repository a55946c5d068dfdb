"""Writes pretrained weights as the directory that `initial.py` reads."""

from __future__ import annotations

import dataclasses
import json
import math
import os

from etils import epath
from flax.traverse_util import flatten_dict

from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.method.arrays import Params
from dqe_jax.models import dino
from dqe_jax.models.build import VARIANTS, named_sizes
from dqe_jax.models.weights import sizes as size_files
from dqe_jax.models.weights.initial import FACTS, PARAMS, Pretrained, open_dino
from dqe_jax.models.weights.source import Source, open_source
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.paths import is_remote, whole_path


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was converted.

    Attributes:
      directory: that was written.
      backbone: "clip", "siglip" or "blip2".
      parameters: their number.
      has_tokenizer: whether a tokenizer came with the weights.
    """

    directory: epath.Path
    backbone: str
    parameters: int
    has_tokenizer: bool


def convert(
    source: str,
    output: str | os.PathLike[str],
    *,
    backbone: str | None = None,
    variant: str = "auto",
    text_source: str = "",
) -> Converted:
    """Converts Hugging Face weights.

    Args:
      source: as `source.open_source` takes it.
      output: directory to write.
      backbone: "clip", "siglip" or "blip2"; None for what config.json says.
      variant: a name of the backbone's variants, or "auto": the sizes of config.json.
      text_source: of "dino": the CLIP or SigLIP model whose text tower is taken.

    Raises:
      UserError: the weights cannot be read, or not be written.
    """
    opened = open_source(source)
    backbone = backbone or size_files.backbone_of(opened.config, source)
    known = ("auto", *(dino.TOWERS if backbone == "dino" else VARIANTS[backbone]))
    if variant not in known:
        raise UserError(f"--variant={variant}: it must be one of {', '.join(known)}.")
    if backbone == "dino":
        if not text_source:
            raise UserError(
                "--text_source is missing: a DINO model has no texts; name a CLIP or SigLIP model."
            )
        pretrained = open_dino(source, text_source, variant, "auto")
        assert pretrained.source is not None
        return _written(pretrained, pretrained.source, output)
    sizes = named_sizes(backbone, variant)
    sizes = sizes or size_files.from_hugging_face(backbone, opened.config, source, opened.processor)
    return _written(Pretrained(backbone, sizes, source, source=opened), opened, output)


def _written(pretrained: Pretrained, opened: Source, output: str | os.PathLike[str]) -> Converted:
    """Reads weights and writes them; raises as `convert`."""
    words = text_tokens.tokenizer_in(opened.directory, pretrained.sizes.max_length)
    params = pretrained.read()
    directory = whole_path(output)
    write_converted(directory, params, pretrained, words and words.to_str())
    count = sum(math.prod(x.shape) for x in flatten_dict(params).values())
    return Converted(directory, pretrained.backbone, count, words is not None)


def write_converted(
    directory: epath.Path, params: Params, pretrained: Pretrained, tokenizer: str | None
) -> None:
    """Writes what `open_pretrained` reads: Orbax parameters, then the facts, last.

    Args:
      directory: made if it does not exist.
      params: of the backbone, layers not scanned.
      pretrained: says backbone and sizes.
      tokenizer: its JSON, or None.

    Raises:
      UserError: the directory is not writable, or already holds weights.
    """
    import orbax.checkpoint as ocp  # slow

    try:
        if (directory / FACTS).exists():
            raise UserError(f"--output: {directory} already holds weights; name another directory.")
        if (directory / PARAMS).exists():  # in a bucket an interrupted conversion leaves a part
            raise UserError(
                f"--output: {directory} holds {PARAMS}/ of a conversion that did not end; remove "
                "it, or name another directory."
            )
        directory.mkdir(parents=True, exist_ok=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / PARAMS, params)
        facts = {
            "backbone": pretrained.backbone,
            "sizes": size_files.to_json(pretrained.sizes),
            "origin": epath.Path(pretrained.origin).name,
            "tokenizer": tokenizer,
        }
        (directory / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or reason_of(error)
        raise UserError(
            f"--output: cannot write to {directory} ({reason}); name a writable directory."
        ) from error
    except Exception as error:  # of a bucket, in many types
        if not is_remote(directory):
            raise
        raise UserError(
            f"--output: cannot write to {directory} ({reason_of(error)}); see that the bucket can "
            "be reached and written to."
        ) from error
