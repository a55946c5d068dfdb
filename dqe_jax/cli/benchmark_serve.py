"""Times searches of a server under load, with a drawn gallery of any size.

dqe-jax benchmark serve --model=runs/shapes [--images=50000] [--tokens=1,32] [--clients=1,8]

The gallery has random embeddings; all else is what users get. The model needs to be trained or not:
its answers do not matter here. Answers are first compared with exact ranking.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags, logging
from etils import epath

from dqe_jax.cli.command_line import given
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import write_json

_MODEL = flags.DEFINE_string(
    "model", None, "Directory of a run, or of a model that dqe-jax export wrote."
)
_IMAGES = flags.DEFINE_integer("images", 50_000, "Images of the gallery.", 100)
_TOKENS = flags.DEFINE_list("tokens", ["1", "32"], "Tokens of an image's embedding.")
_CLIENTS = flags.DEFINE_list("clients", ["1", "8"], "Clients at a time.")
_SECONDS = flags.DEFINE_float("seconds", 60.0, "Seconds of load.", 0.1)
_KEEP = flags.DEFINE_boolean(
    "keep_features", True, "Keep what the model made of references in the index."
)
_JSON = flags.DEFINE_string("json", None, "File for the figures.")
REQUIRED = ("model",)


def main(argv: Sequence[str]) -> None:
    """Measures and prints a table."""
    del argv
    tokens, clients = (_numbers(flag.name, flag.value) for flag in (_TOKENS, _CLIENTS))
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.search.loading import load
    from dqe_jax.serving.load import measure, told

    compiled.keep_programs()
    lines = measure(
        load(given(_MODEL)),
        images=_IMAGES.value,
        tokens=tokens,
        numbers=clients,
        seconds=_SECONDS.value,
        keep_features=_KEEP.value,
    )
    logging.info("%s", told(lines))
    if _JSON.value is not None:
        write_json(epath.Path(_JSON.value), lines)


def _numbers(name: str, words: Sequence[str]) -> list[int]:
    try:
        found = [int(word) for word in words]
    except ValueError as error:
        raise UserError(f"--{name}={','.join(words)}: give whole numbers, such as 1,8.") from error
    if not found or min(found) < 1:
        raise UserError(f"--{name}={','.join(words)}: give numbers of at least 1.")
    return found
