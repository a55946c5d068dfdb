"""Measures how many wishes a simulated user finds in three turns, and writes what the user clicks.

dqe-jax simulate --config=fashion_products --data_dir=DIR --workdir=DIR2

Needs data whose images are described by attributes. The user goes on from the image that agrees
most with what is wanted, says what still differs, and rejects what agrees least. The table compares
a search that forgets what was said before with one that is moved by it. `--log` and `--photos` keep
the clicks, from which `dqe-jax train --feedback` learns.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli.command_line import given, use_data_dir

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the data.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or of an export.")
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_SPLIT = flags.DEFINE_string("split", "test", "Split whose images are searched.")
_USERS = flags.DEFINE_integer("users", 500, "Wishes for each seed.", 1)
_SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds, from --first_seed on.", 1)
_FIRST = flags.DEFINE_integer("first_seed", 0, "The first of them.", 0)
_TURNS = flags.DEFINE_integer("turns", 3, "Turns of a conversation, at the most.", 1, 20)
_SHOWN = flags.DEFINE_integer("shown", 10, "Images that the user looks at in a turn.", 1, 100)
_EARLIER = flags.DEFINE_float("earlier", None, "How far a query moves towards the turn before.")
_DECAY = flags.DEFINE_float("decay", None, "By which each turn before that counts less.")
_REJECTED = flags.DEFINE_float("rejected", None, "How far a query moves away from rejections.")
_PHOTOS = flags.DEFINE_string("photos", None, "Folder for the images, which --log needs.")
_LOG = flags.DEFINE_string("log", None, "File for what the users click.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the result; default: <run>/eval.")
REQUIRED = ("config", "workdir")


def main(argv: Sequence[str]) -> None:
    """Lets the users search."""
    del argv
    config = _CONFIG.value
    use_data_dir(config, _DATA_DIR.value)
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.experiments.simulation.run import simulate
    from dqe_jax.search.relevance import MOVES, Moves

    compiled.keep_programs()
    moves = Moves(
        earlier=MOVES.earlier if _EARLIER.value is None else _EARLIER.value,
        decay=MOVES.decay if _DECAY.value is None else _DECAY.value,
        rejected=MOVES.rejected if _REJECTED.value is None else _REJECTED.value,
    )
    simulate(
        config,
        given(_WORKDIR),
        step=_STEP.value,
        split=_SPLIT.value,
        users=_USERS.value,
        seeds=range(_FIRST.value, _FIRST.value + _SEEDS.value),
        turns=_TURNS.value,
        shown=_SHOWN.value,
        moves=moves,
        photos=_PHOTOS.value,
        log=_LOG.value,
        output=_OUTPUT.value,
    )
