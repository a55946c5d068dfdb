"""Facts of programs as tables, as JSON, and as advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dqe_jax.config import RunConfig
from dqe_jax.data.datasets import expected_shape
from dqe_jax.performance.planning.chips import Topology
from dqe_jax.performance.planning.compiler import Facts
from dqe_jax.performance.planning.store_lines import store_json, stored_lines
from dqe_jax.performance.planning.stores import Stored
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.text_table import text_table

INPUTS = ("parameters", "optimiser", "bank", "batch")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The programs of a config on a slice.

    Attributes:
      topology: the slice.
      references: of the global batch.
      facts: of each program.
      stored: what frozen towers make of the data set.
    """

    topology: Topology
    references: int
    facts: tuple[Facts, ...]
    stored: tuple[Stored, ...] = ()


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**27 else f"{size / 2**30:.4f}".rstrip("0").rstrip(".")


def examples_per_second(facts: Facts) -> float | None:
    """Examples per second of all devices, by the estimate; None without one."""
    return facts.queries / facts.seconds if facts.seconds else None


def utilisation(facts: Facts, topology: Topology) -> float | None:
    """Share of the peak that the matrix products reach by the estimate (MFU); None without one."""
    if not facts.seconds or topology.chip is None:
        return None
    return facts.flops / facts.seconds / topology.chip.peak


def tables(plans: Sequence[Plan]) -> str:
    """Tables of memory, cost and traffic for each slice, at most 100 characters wide.

    `scaling` is examples per second of one device, relative to the first slice with the same chip.
    """
    first: dict[tuple[str, str], float] = {}
    parts = []
    for plan in plans:
        chips, references = plan.topology.chips, plan.references
        parts.append(f"{plan.topology.name}: {chips} chips, {references} references")
        parts += map(stored_lines, plan.stored)
        if not plan.facts:
            parts += [] if plan.stored else ["no features are stored"]
            continue
        parts += filter(None, [memory_table(plan), cost_table(plan, first), traffic_table(plan)])
    return "\n\n".join(parts)


def memory_table(plan: Plan) -> str:
    """GiB per device of each program, by kind."""
    kinds = ("params", "optimiser", "bank", "batch")
    head = ("GiB per device", *kinds, "temporary", "other", "kept too", "total", "used")
    lines: list[tuple[str, ...]] = [head]
    for facts in plan.facts:
        cells = [_gib(facts.inputs.get(kind, 0)) for kind in INPUTS]
        rest = facts.arguments - sum(facts.inputs.values()) + facts.code + facts.outputs
        compiled = facts.fits is True or facts.code > 0
        cells.append(_gib(facts.temporaries) if compiled or facts.temporaries else "")
        cells.append(_gib(max(rest, 0)) if compiled else "")
        cells += [_gib(facts.resident), _gib(facts.needed)]
        used = f"{facts.needed / facts.memory:.0%}" if facts.memory else ""
        used = f"over {used}" if used and facts.fits is None else used
        cells.append("too much" if facts.fits is False else used)
        lines.append((facts.name, *cells))
    return text_table(lines)


def _compiled(plan: Plan) -> list[Facts]:
    """The programs that the compiler did not give up."""
    return [facts for facts in plan.facts if facts.fits is not False or facts.code]


def cost_table(plan: Plan, first: dict[tuple[str, str], float]) -> str:
    """FLOP and the estimate of a call of each program.

    Args:
      plan: of a slice.
      first: gets the examples per second of a device, by chip and program, of the first slice.
    """
    head = ("cost of a call", "examples", "TFLOP", "compute ms", "links ms", "examples/s", "MFU")
    lines: list[Sequence[str]] = [(*head, "scaling")]
    for facts in _compiled(plan):
        compute, links = facts.compute_seconds, facts.link_seconds
        rate = examples_per_second(facts)
        cells = [f"{facts.queries:,}", f"{facts.flops / 1e12:.3g}"]
        cells.append("" if rate is None or compute is None else f"{1e3 * compute:.3g}")
        cells.append("" if links is None else f"{1e3 * links:.3g}")
        if rate is None:
            cells += [""] * 3
        else:
            each = rate / plan.topology.devices
            base = first.setdefault((plan.topology.name.split(":")[0], facts.name), each)
            used = utilisation(facts, plan.topology)
            cells += [f"{rate:,.0f}", f"{used:.1%}", f"{each / base:.0%}"]
        lines.append((facts.name, *cells))
    return text_table(lines) if len(lines) > 1 else ""


def traffic_table(plan: Plan) -> str:
    """Megabytes of each kind of collective, and how often a call does it, by program."""
    found = _compiled(plan)
    kinds = sorted({kind for facts in found for kind in facts.collectives})
    if not kinds:
        return ""
    lines: list[Sequence[str]] = [("MB (times)", *(facts.name for facts in found))]
    for kind in kinds:
        cells = []
        for facts in found:
            traffic = facts.collectives.get(kind)
            cells.append(f"{traffic.bytes / 1e6:.3g} ({traffic.count})" if traffic else "0")
        lines.append((kind, *cells))
    lines.append(("sent per device", *(f"{facts.sent / 1e6:.3g}" for facts in found)))
    return text_table(lines)


def advise(config: RunConfig, facts: Facts, devices: int, stored: int = 0) -> list[str]:
    """What to change so that a program takes less memory, the most useful first.

    Args:
      config: of the run.
      facts: of a program that does not fit.
      devices: of the slice.
      stored: bytes of stored features on a device.
    """
    model, kinds = config.model, dict(facts.inputs)
    kinds |= {"temporaries": facts.temporaries, "stored": stored}
    advice = {
        "stored": ["config.features.place=host"],
        "temporaries": [
            f"a smaller config.batch.references (now {config.batch.references}) or more chips",
        ],
        "batch": ["a smaller config.batch.references or more chips"],
        "parameters": [],
        "optimiser": ["more parts in config.model.frozen: they keep no moments"],
        "bank": ["more chips: the bank is sharded over them"],
    }
    pretrained = model.backbone != "tiny"
    if pretrained and not model.remat:
        advice["temporaries"].append("config.model.remat=True")
    chunks = 2 * config.batch.chunks
    units = expected_shape(config.data.dataset, config.batch).units
    if units % (devices * chunks) == 0:
        advice["temporaries"].append(f"config.batch.chunks={chunks}")
    if pretrained and not model.scan_layers:
        advice["temporaries"].append("config.model.scan_layers=True")
    if model.dtype == "float32":
        advice["temporaries"].append("config.model.dtype=bfloat16")
    frozen = set(model.frozen) - {"logit_scale", "itm_head", "temperature"}  # a few numbers
    if frozen and model.frozen_dtype == "float32":
        advice["parameters"].append("config.model.frozen_dtype=bfloat16")
    advice["parameters"].append("a smaller backbone")
    if not config.optimizer.shard_state and devices > 1:
        advice["optimiser"].insert(0, "config.optimizer.shard_state=True (ZeRO-1)")
    if config.negatives.bank_dtype == "float32":
        advice["bank"].insert(0, "config.negatives.bank_dtype=bfloat16")
    if facts.name in ("bank refresh", "gallery embedding"):
        advice["temporaries"] = advice["batch"] = ["a smaller config.eval.batch_size"]
    largest = sorted(kinds, key=kinds.__getitem__, reverse=True)
    worth = [kind for kind in largest if 10 * kinds[kind] > kinds[largest[0]]]
    return list(dict.fromkeys(one for kind in worth for one in advice[kind]))


def sentences_of_misfits(config: RunConfig, plan: Plan) -> list[str]:
    """One sentence for each program that does not fit, with its largest arrays and what helps.

    If there are no programs, one for all stored features that do not.
    """
    found = []
    stored = sum(one.of_device for one in plan.stored if one.place == "device")
    for facts in plan.facts:
        if facts.fits is not False:
            continue
        kinds = dict(facts.inputs) | {"temporaries": facts.temporaries}
        kinds |= {"stored features": stored, "what lies beside it": facts.resident - stored}
        most = sorted(((k, n) for k, n in kinds.items() if n), key=lambda x: -x[1])[:3]
        advice = advise(config, facts, plan.topology.devices, stored)[:4]
        arrays = [f"{x.shape} ({x.count} of {_gib(x.bytes)}, {x.module})" for x in facts.largest]
        computed = f"the largest arrays it computes are {', '.join(arrays)}; " if arrays else ""
        found.append(
            f"{plan.topology.name}: the {facts.name} does not fit: it needs {_gib(facts.needed)} "
            f"of {_gib(facts.memory)} GiB a device, of these "
            f"{', '.join(f'{_gib(n)} {kind}' for kind, n in most)}; {computed}try "
            f"{', or '.join(advice)}."
        )
    if not plan.facts:
        found += [
            f"{plan.topology.name}: the features of {one.kind.name} do not fit on the devices; "
            "take config.features.place=host."
            for one in plan.stored
            if one.too_large
        ]
    return found


def to_json(plans: Sequence[Plan]) -> list[JsonObject]:
    """All facts, for `json.dumps`: bytes, FLOP and seconds of one device and one call."""
    return [
        {
            "topology": plan.topology.name,
            "chips": plan.topology.chips,
            "devices": plan.topology.devices,
            "chip": plan.topology.chip and dataclasses.asdict(plan.topology.chip),
            "references": plan.references,
            "programs": [
                dataclasses.asdict(facts)
                | {
                    "estimated_seconds": facts.seconds,
                    "estimated_examples_per_second": examples_per_second(facts),
                    "estimated_mfu": utilisation(facts, plan.topology),
                    "sent": facts.sent,
                }
                for facts in plan.facts
            ],
            "features": next((store_json(s) for s in plan.stored if s.kind.name == "images"), None),
            "stores": [store_json(one) for one in plan.stored],
        }
        for plan in plans
    ]
