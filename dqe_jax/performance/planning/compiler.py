"""Compiles a program ahead of time and collects what the compiler says of it."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax
from jax.extend.core import Jaxpr

from dqe_jax.performance.planning import hlo
from dqe_jax.performance.planning.chips import Chip
from dqe_jax.performance.planning.programs import Program
from dqe_jax.performance.planning.traced import Arrays, largest_arrays, matrix_flops

Option = bool | int | float | str
# Compiles several times faster, but to a program several times slower than the one that would run.
QUICK: dict[str, Option] = {"exec_time_optimization_effort": -1.0}
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = r"([\d.]+)([KMGT]?)"
_TOO_MUCH = re.compile(rf"HLO temporaries \({_NUMBER}\) exceeds available HBM \({_NUMBER}\)")
_USED = re.compile(rf"Used {_NUMBER} of {_NUMBER} hbm")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a program on a slice; all of one device and of one call.

    Attributes:
      name: of the program.
      queries: training queries, or images, that a call takes on all devices.
      fits: whether it fits the memory of a device; None where that is not known.
      inputs: bytes of each kind of argument, without padding.
      arguments: bytes of all arguments as laid out.
      temporaries: bytes; of a step mostly activations.
      code: bytes of the program itself.
      outputs: bytes of results that take no argument's place.
      resident: bytes of what lies there meanwhile and is no argument.
      needed: bytes in all; without temporaries where nothing was compiled.
      memory: of a device, as the compiler says or else by the table of chips.
      flops: FLOP of the matrix products, loops included.
      compute_seconds: the compiler's cycles over the clock.
      link_seconds: bytes sent over the bandwidth of the links; None where it is not known.
      collectives: by kind.
      optimal_seconds: of the compiler's cost analysis as it is: a loop counts as one round, each
        operation that it cannot judge as -1 s, and links not at all.
      loops_unknown: loops counted as one round in `compute_seconds` and `collectives`.
      largest: arrays that it computes, if it does not fit.
      compile_seconds: time that tracing and compiling took here.
    """

    name: str
    queries: int
    fits: bool | None
    inputs: dict[str, int]
    arguments: int = 0
    temporaries: int = 0
    code: int = 0
    outputs: int = 0
    resident: int = 0
    needed: int = 0
    memory: int = 0
    flops: float = 0.0
    compute_seconds: float | None = None
    link_seconds: float | None = None
    collectives: dict[str, hlo.Traffic] = dataclasses.field(default_factory=dict)
    optimal_seconds: float | None = None
    loops_unknown: int = 0
    largest: tuple[Arrays, ...] = ()
    compile_seconds: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Estimate of a call, without overlap of computing and sending."""
        if self.compute_seconds is None:
            return None
        return self.compute_seconds + (self.link_seconds or 0.0)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in all collectives."""
        return sum(traffic.sent for traffic in self.collectives.values())


def read_out_of_memory(message: str) -> tuple[int, int, int]:
    """Bytes of temporaries, of all, and of a device's memory, of the compiler's error.

    Zeros where the message does not say.
    """

    def size(number: str, unit: str) -> int:
        return round(float(number) * _SIZES[unit])

    temporaries, used = _TOO_MUCH.search(message), _USED.search(message)
    if temporaries:
        return size(*temporaries.groups()[:2]), 0, size(*temporaries.groups()[2:])
    if used:
        return 0, size(*used.groups()[:2]), size(*used.groups()[2:])
    return 0, 0, 0


def _trace(program: Program) -> Jaxpr:
    """The traced program of all devices."""
    return jax.make_jaxpr(program.mapped)(*program.arguments).jaxpr


def lower_for_gpu(program: Program, memory: int | None) -> Facts:
    """Facts that need no compiler for GPUs: arguments and FLOP of the lowered program.

    What it needs beside the arguments is not known: it may fail to fit, but is never said to fit.

    Args:
      program: over as many devices as there are GPUs.
      memory: bytes of a GPU; None if not known.
    """
    start = time.monotonic()
    needed = sum(program.inputs.values()) + program.resident
    jax.jit(program.mapped).trace(*program.arguments).lower(lowering_platforms=("cuda",))
    return Facts(
        name=program.name,
        queries=program.queries,
        fits=False if memory is not None and needed > memory else None,
        inputs=program.inputs,
        arguments=sum(program.inputs.values()),
        resident=program.resident,
        needed=needed,
        memory=memory or 0,
        flops=matrix_flops(_trace(program)),
        compile_seconds=time.monotonic() - start,
    )


def compile_for(
    program: Program, chip: Chip, options: dict[str, Option], *, timed: bool = True
) -> Facts:
    """Compiles for a slice of TPUs.

    Args:
      program: over the devices of the slice.
      chip: of the slice.
      options: of the compiler.
      timed: whether to estimate the time.
    """
    start = time.monotonic()
    jaxpr = _trace(program)
    known = Facts(
        name=program.name,
        queries=program.queries,
        fits=None,
        inputs=program.inputs,
        resident=program.resident,
        flops=matrix_flops(jaxpr),
    )
    try:
        # Numbers too, which the hints of older JAX leave out.
        chosen: dict[str, Any] = dict(options)
        compiled = program.mapped.lower(*program.arguments).compile(chosen or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        temporaries, needed, memory = read_out_of_memory(str(error))
        held = sum(program.inputs.values()) + program.resident
        return dataclasses.replace(
            known,
            fits=False,
            temporaries=temporaries,
            needed=max(needed, held + temporaries),
            memory=memory or chip.memory,
            largest=largest_arrays(jaxpr),
            compile_seconds=time.monotonic() - start,
        )
    seconds = time.monotonic() - start
    known = _with_memory(_with_cost(known, compiled, chip, timed=timed), compiled)
    return dataclasses.replace(
        known,
        fits=known.needed <= chip.memory,
        largest=largest_arrays(jaxpr) if known.needed > chip.memory else (),
        memory=chip.memory,
        compile_seconds=seconds,
    )


def _with_memory(facts: Facts, compiled: jax.stages.Compiled) -> Facts:
    """What a program needs of a device's memory by the compiler's analysis."""
    memory = compiled.memory_analysis()
    assert memory is not None, "the compilers of TPUs give one"
    found = dataclasses.replace(
        facts,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )
    parts = found.arguments + found.temporaries + found.code + found.outputs
    return dataclasses.replace(found, needed=parts + facts.resident)


def _with_cost(facts: Facts, compiled: jax.stages.Compiled, chip: Chip, *, timed: bool) -> Facts:
    """Collectives, and what a call takes by the compiler's estimates."""
    cost, module = compiled.cost_analysis(), hlo.Module(compiled.as_text() or "")
    cost = cost[0] if isinstance(cost, list) else cost
    traffic = module.traffic()
    sent = sum(t.sent for t in traffic.values())
    return dataclasses.replace(
        facts,
        compute_seconds=module.cycles() / chip.clock if timed else None,
        link_seconds=sent / chip.link if chip.link else None,
        collectives=traffic,
        optimal_seconds=(cost or {}).get("optimal_seconds") if timed else None,
        loops_unknown=module.endless,
    )
