"""Plans a config on slices: compiles its programs, and says what they need and what does not fit.

Compiling for TPUs needs `chips.prepare_environment` to have run before JAX was imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence

import jax
from absl import logging

from dqe_jax.config import AnyConfig, RunConfig, check_batch
from dqe_jax.data.datasets import DATASETS, SplitSize
from dqe_jax.performance.planning import chips, compiler, programs, table
from dqe_jax.performance.planning.chips import Topology
from dqe_jax.performance.planning.stores import Counts, Machines
from dqe_jax.performance.planning.table import Plan
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.paths import on_disk

# In place of the names of programs.
NOTHING = "none"


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice and the config that is planned on it.

    Attributes:
      topology: of the slice.
      config: with the batch for its chips.
      devices: of JAX, to compile for.
    """

    topology: Topology
    config: RunConfig
    devices: Sequence[jax.Device]


def plan_config(
    config: AnyConfig,
    topologies: Sequence[Topology],
    *,
    references_per_chip: int = 0,
    gallery: int = 0,
    queries: int = 0,
    eval_gallery: int = 0,
    vocabulary: int = 100,
    names: Sequence[str] = (),
    compiler_options: Mapping[str, compiler.Option] | None = None,
    quick: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> tuple[list[Plan], list[str]]:
    """Compiles the programs of a config for each slice, and logs tables.

    Args:
      config: of a run; it needs neither data nor weights.
      topologies: the slices.
      references_per_chip: what `config.batch.references` becomes, times the chips; 0 for as it is.
      gallery: images of the training split, the rows of the bank; 0 for the published number.
      queries: of the training split; 0 for the published number.
      eval_gallery: images of the splits that are evaluated on; 0 for the published number.
      vocabulary: words of the tiny backbone.
      names: of `programs.NAMES`, or "none" alone to compile nothing; empty for all.
      compiler_options: the program is then another one.
      quick: whether the compiler tries less hard; there is no estimate of time then.
      output: JSON file for all facts, in a directory that is there; None for none.

    Returns:
      A plan for each slice, and a sentence for each program that does not fit.

    Raises:
      UserError: the config or an argument is not sound, or there is no compiler for a slice.
    """
    config = RunConfig.of(config)
    wanted = _known_programs(names)
    counts = _counts(config, Counts(gallery, queries, eval_gallery))
    path = on_disk(output, "--output") if output else None
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--output={output}: there is no directory {path.parent}.")
    slices = [_open(one, config, references_per_chip, compiles=bool(wanted)) for one in topologies]
    options = (compiler.QUICK if quick else {}) | dict(compiler_options or {})
    plans: list[Plan] = []
    misfits: list[str] = []
    for one in slices:
        made, stored = programs.make_programs(
            one.config,
            one.devices,
            counts=counts,
            vocabulary=vocabulary,
            names=wanted,
            machines=Machines(one.topology.hosts, one.topology.memory, one.topology.host_memory),
        )
        found = [_compile(program, one.topology, options, timed=not quick) for program in made]
        plans.append(Plan(one.topology, one.config.batch.references, tuple(found), stored))
        misfits += table.sentences_of_misfits(one.config, plans[-1])
    if path is not None:
        facts: JsonObject = {"jax": jax.__version__, "gallery": counts.images}
        facts |= {"plans": table.to_json(plans), "config": config.to_dict()}
        facts |= {"compiler_options": options, "quick": quick}
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    logging.info("%s", _report(config, plans, counts.images, quick=quick))
    return plans, misfits


def _counts(config: RunConfig, given: Counts) -> Counts:
    """The numbers that are given, and the published ones of the data set in place of 0."""
    dataset = DATASETS[config.data.dataset]
    ours = {official: name for name, official in dataset.splits.items()}
    evaluated = {"validation", ours.get(config.eval.split, config.eval.split)}
    train = dataset.sizes.get("train", SplitSize(programs.OTHER_GALLERY))
    sizes = [dataset.sizes[name] for name in sorted(evaluated) if name in dataset.sizes]
    return Counts(
        images=given.images or train.images,
        texts=given.texts or train.queries or 0,
        eval_images=given.eval_images or sum(size.images for size in sizes),
        eval_texts=sum(size.queries or 0 for size in sizes),
    )


def _known_programs(names: Sequence[str]) -> Sequence[str]:
    """The programs of these names; all where there is no name.

    Raises:
      UserError: one is unknown.
    """
    if list(names) == [NOTHING]:
        return ()
    unknown = [name for name in names if name not in programs.NAMES]
    if unknown:
        raise UserError(
            f"--programs={unknown[0]}: give some of {', '.join(programs.NAMES)}; or none."
        )
    return names or programs.NAMES


def _open(
    topology: Topology, config: RunConfig, references_per_chip: int, *, compiles: bool
) -> Slice:
    """A slice with its devices, before anything is compiled; stand-ins if nothing will be.

    Raises:
      UserError: there is no such slice, or the batch does not divide by its devices.
    """
    stand_ins = jax.devices("cpu")[:1] * topology.devices
    devices, own = chips.open_devices(topology) if compiles else stand_ins, config
    if references_per_chip:
        own = config.with_changes({"batch.references": references_per_chip * topology.chips})
    check_batch(own, topology.devices)
    return Slice(topology, own, devices)


def _compile(
    program: programs.Program,
    topology: Topology,
    options: dict[str, compiler.Option],
    *,
    timed: bool,
) -> compiler.Facts:
    """The facts of a program on a slice; how long that took is logged."""
    if topology.chip is None:
        facts = compiler.lower_for_gpu(program, topology.memory)
    else:
        facts = compiler.compile_for(program, topology.chip, options, timed=timed)
    logging.info("%s, %s: %.0f s", topology.name, program.name, facts.compile_seconds)
    return facts


def _report(config: RunConfig, plans: Sequence[Plan], gallery: int, *, quick: bool) -> str:
    """All plans as text."""
    lines = [
        f"jax {jax.__version__}, {config.model.backbone}, {config.model.dtype}, a gallery of "
        f"{gallery:,} images. Not measured: memory, collectives and cycles are the compiler's, "
        "links ms is bytes over the published bandwidth; scaling is examples/s of a device, "
        "relative to the first slice with the same chip.",
        table.tables(plans),
    ]
    if any(one.asked == "auto" for plan in plans for one in plan.stored):
        lines.append(
            "Features lie in the first place where they take at most half of what is free: "
            "devices, hosts, disk. Free is what parameters, optimiser and bank leave on a device, "
            "and all memory of a host."
        )
    if quick:
        lines.append("--quick: the compiler did not try hard; a run may need less or more memory.")
    if any(plan.topology.chip is None and plan.facts for plan in plans):
        lines.append(
            "GPU: lowered only; memory beside the arguments (mostly activations) and time are not "
            f"known. Memory is {chips.GPU_SHARE:.0%} of the card's, which JAX takes by default."
        )
    return "\n\n".join(lines)
