"""Will it fit? Compiles the programs of a config for TPU slices, on a machine without a TPU.

python -m dqe_jax.plan --config=configs/fiq.py --topology=v5e:2x4,v5e:16x16 --per_chip_references=8

Needs libtpu (pip install '.[tpu]', Linux x86-64), neither data nor weights. Prints bytes a device
by kind, FLOP, collectives, and an estimate of the time: the compiler's own count of cycles, and
what the collectives send over the published bandwidth of the links, without overlap. Nothing is
measured. With --topology=gpu programs are only lowered: bytes of arguments and FLOP, no estimate.
Exits with status 1 if a program does not fit, and says what to change. Large models compile for
many minutes; --quick takes a fraction of that, for memory (temporaries may be a quarter off) and
collectives, without an estimate of time.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_TOPOLOGY = flags.DEFINE_list("topology", None, "Slices such as v5e:2x4 or v4:2x2x2; or gpu:8.")
_REFERENCES = flags.DEFINE_integer(
    "per_chip_references",
    0,
    "Sets config.batch.references to this times the chips; 0 takes the config's.",
    0,
)
_GALLERY = flags.DEFINE_integer(
    "gallery", 0, "Images of the training split (rows of the bank); 0 for the published number.", 0
)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 100, "Words of the tiny backbone.", 1)
_PROGRAMS = flags.DEFINE_list(
    "programs", [], "Of: step, bank step, bank refresh, mining, gallery embedding; all by default."
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Let the compiler try less hard: several times faster, but no estimate of time."
)
_OPTIONS = flags.DEFINE_multi_string(
    "compiler_option", [], "NAME=VALUE for the compiler; the program is then another one."
)
_OUTPUT = flags.DEFINE_string("output", "", "JSON file for all facts.")
REQUIRED = ("config", "topology")


def _number(text: str) -> bool | int | float | str:
    """The value of a compiler option."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main(argv: Sequence[str]) -> None:
    """Plans every slice and prints the tables."""
    del argv
    from dqe_jax.performance.planning import chips

    topologies = [chips.parse_topology(name) for name in _TOPOLOGY.value]
    chips.prepare_environment(max((t.devices for t in topologies if t.chip is None), default=0))
    import jax

    from dqe_jax.config import check_batch, check_config
    from dqe_jax.data.datasets import DATASETS
    from dqe_jax.performance.planning import compiler, programs, table

    config = _CONFIG.value
    check_config(config)
    unknown = [name for name in _PROGRAMS.value if name not in programs.NAMES]
    if unknown:
        raise UserError(f"--programs={unknown[0]}: give some of {', '.join(programs.NAMES)}.")
    if any("=" not in option for option in _OPTIONS.value):
        raise UserError("--compiler_option: give NAME=VALUE.")
    options = dict(compiler.QUICK) if _QUICK.value else {}
    options |= {k: _number(v) for k, _, v in (option.partition("=") for option in _OPTIONS.value)}
    known = DATASETS[config.data.dataset].train_gallery
    gallery = _GALLERY.value or known or programs.OTHER_GALLERY
    output = pathlib.Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output={_OUTPUT.value}: there is no directory {output.parent}.")
    slices = []
    for topology in topologies:  # before anything is compiled
        devices, one = chips.open_devices(topology), config.copy_and_resolve_references()
        if _REFERENCES.value:
            one.batch.references = _REFERENCES.value * topology.chips
        check_batch(one, topology.devices)
        slices.append((topology, one, devices))
    plans, misfits, quick = [], [], _QUICK.value
    for topology, one, devices in slices:
        found = []
        for program in programs.make_programs(
            one,
            devices,
            gallery=gallery,
            vocabulary=_VOCABULARY.value,
            names=_PROGRAMS.value or programs.NAMES,
        ):
            if topology.chip is None:
                facts = compiler.lower_for_gpu(program)
            else:
                facts = compiler.compile_for(program, topology, options, timed=not quick)
            logging.info("%s, %s: %.0f s", topology.name, program.name, facts.compile_seconds)
            found.append(facts)
        plans.append(table.Plan(topology, one.batch.references, tuple(found)))
        misfits += table.sentences_of_misfits(one, plans[-1])
    if output is not None:
        facts = {"jax": jax.__version__, "gallery": gallery, "plans": table.to_json(plans)}
        facts |= {"config": config.to_dict(), "compiler_options": options, "quick": quick}
        output.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    lines = [
        f"jax {jax.__version__}, {config.model.backbone}, {config.model.dtype}, a gallery of "
        f"{gallery:,} images. Not measured: memory, collectives and cycles are the compiler's, "
        "links ms is bytes over the published bandwidth.",
        *(
            f"{p.topology.name}: {p.topology.chips} chips, {p.references} references."
            for p in plans
        ),
        table.memory_table(plans),
        table.cost_table(plans),
    ]
    if quick:
        lines.append("--quick: the compiler did not try hard; a run may need less or more memory.")
    if any(topology.chip is None for topology in topologies):
        lines.append("GPU: lowered only; memory beside the arguments and time are not known.")
    logging.info("%s", "\n\n".join(lines))
    if misfits:
        sys.stderr.write("\n".join(misfits) + "\n")
        sys.exit(1)
