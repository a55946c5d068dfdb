"""Will it fit? Compiles the programs of a config for TPU slices, on a machine without a TPU.

python -m dqe_jax.plan --config=configs/fiq.py --topology=v5e:2x4,v5e:16x16 --per_chip_references=8

Needs libtpu (pip install '.[tpu]', Linux x86-64), but no data and no weights. Prints memory per
device, FLOP, collectives, and an estimate of the time: the compiler's own count of cycles, plus
what the collectives send over the published bandwidth of the links, without overlap. Nothing is
measured. For GPUs (--topology=h100, a100-80gb:8, or gpu:4 with --gpu_memory) programs are only
lowered: bytes of arguments and FLOP, no activations and no time.
What frozen towers make of the data set is counted too: where it lies and what a step reads of it.
Exits with status 1 if a program does not fit, and says what to change. Large models compile for
many minutes. --quick takes a fraction of that; it gives memory (temporaries may be off by a
quarter) and collectives, but no time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli.command_line import given
from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "Slices such as v5e:2x4 or v4:2x2x2; or GPUs: h100, gpu:8."
)
_REFERENCES = flags.DEFINE_integer(
    "per_chip_references",
    0,
    "References per chip: sets config.batch.references; 0 keeps the config's.",
    0,
)
_GALLERY = flags.DEFINE_integer(
    "gallery", 0, "Images of the training split (rows of the bank); 0 for the published number.", 0
)
_QUERIES = flags.DEFINE_integer(
    "queries", 0, "Queries of the training split; 0 for the published number.", 0
)
_EVAL_GALLERY = flags.DEFINE_integer(
    "eval_gallery",
    0,
    "Images of the splits that the run evaluates on; 0 for the published number.",
    0,
)
_GPU_MEMORY = flags.DEFINE_float("gpu_memory", None, "GB of each GPU, if it is not a known one.")
_HOST_MEMORY = flags.DEFINE_float(
    "host_memory", None, "GB of memory of each machine; default: published ones of TPU machines."
)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 100, "Words of the tiny backbone.", 1)
_PROGRAMS = flags.DEFINE_list(
    "programs",
    [],
    "Of: step, bank step, bank refresh, mining, gallery embedding; or none, which compiles nothing "
    "and counts stored features alone; all by default.",
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Compile with less effort: several times faster, but no estimate of time."
)
_OPTIONS = flags.DEFINE_multi_string(
    "compiler_option", [], "NAME=VALUE for the compiler, which changes the compiled program."
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for all facts.")
REQUIRED = ("config", "topology")


def main(argv: Sequence[str]) -> None:
    """Plans every slice and prints the tables; ends with status 1 if something does not fit."""
    del argv
    from dqe_jax.performance.planning import chips

    memory = {"gpu_memory": _GPU_MEMORY.value, "host_memory": _HOST_MEMORY.value}
    topologies = [chips.parse_topology(name, **memory) for name in given(_TOPOLOGY) or [""]]
    options = _read_options(_OPTIONS.value)
    chips.prepare_environment(topologies)
    from dqe_jax.performance.planning.run import plan_config  # now that JAX may be imported

    _, misfits = plan_config(
        _CONFIG.value,
        topologies,
        references_per_chip=_REFERENCES.value,
        gallery=_GALLERY.value,
        queries=_QUERIES.value,
        eval_gallery=_EVAL_GALLERY.value,
        vocabulary=_VOCABULARY.value,
        names=_PROGRAMS.value,
        compiler_options=options,
        quick=_QUICK.value,
        output=_OUTPUT.value,
    )
    if misfits:
        sys.stderr.write("\n".join(misfits) + "\n")
        sys.exit(1)


def _read_options(texts: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Options of the compiler by name.

    Raises:
      UserError: one has no value.
    """
    if any("=" not in text for text in texts):
        raise UserError("--compiler_option: give NAME=VALUE.")
    return {name: _value(text) for name, _, text in (text.partition("=") for text in texts)}


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
