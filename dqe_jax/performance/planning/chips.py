"""Chips and machines: public facts, and the devices of a slice of TPUs that is not there."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dqe_jax.utils.errors import UserError

if TYPE_CHECKING:
    import jax

# Bytes of a GB, as stores and memory are named in.
GB = 10**9
# What libtpu reads when it is loaded, on a machine that has no TPU. The last one lets a plan run
# beside a program that holds libtpu: nothing runs on a TPU here.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Facts of a chip, per device of JAX: one of two cores of v2, v3 and TPU7x, else a chip.

    Attributes:
      devices: of a chip.
      memory: HBM, bytes.
      peak: bfloat16 FLOP a second.
      clock: Hz, which is `peak` over the FLOP a cycle of all matrix units.
      link: bytes a second that it sends over all links of the slice, one way; None if not known.
      options: of the topology.
      examples: of slices.
    """

    devices: int
    memory: int
    peak: float
    clock: float
    link: float | None
    options: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()


# https://docs.cloud.google.com/tpu/docs/v5e (and v2, v3, v4, v5p, v6e, tpu7x): memory, peak and
# matrix units. Links: half of the bidirectional bandwidth of a chip (v5e, v6e, TPU7x), its
# bandwidth (v5p), or the all-reduce bandwidth of a pod by its chips (v3, v4). The compiler's cycles
# of a large matrix product fit these clocks; that of TPU7x is reckoned from its peak and the matrix
# units of v6e.
CHIPS: dict[str, Chip] = {
    "v2": Chip(2, 8 << 30, 23e12, 0.70e9, None, (), ("2x2", "4x4")),
    "v3": Chip(2, 16 << 30, 61.5e12, 0.94e9, 166e9, (), ("2x2", "4x4")),
    "v4": Chip(
        1, 32 << 30, 275e12, 1.05e9, 268e9, (("chip_config_name", "megacore"),), ("2x2x2", "4x8x8")
    ),
    "v5e": Chip(1, 16 << 30, 197e12, 1.5e9, 200e9, (), ("2x4", "4x8", "16x16")),
    "v5p": Chip(1, 95 << 30, 459e12, 1.75e9, 600e9, (), ("2x2x2", "4x8x8")),
    "v6e": Chip(1, 32 << 30, 918e12, 1.75e9, 400e9, (), ("2x4", "4x8", "16x16")),
    "tpu7x": Chip(2, 96 << 30, 1153.5e12, 2.2e9, 300e9, (), ("2x2x1", "2x2x2", "4x4x8")),
}
# Chips and bytes of memory of the virtual machines that hold a slice, the smallest first:
# https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
HOSTS: dict[str, tuple[tuple[int, int], ...]] = {
    "v4": ((4, 407 * GB),),
    "v5e": ((1, 48 * GB), (4, 192 * GB), (8, 384 * GB)),
    "v5p": ((4, 448 * GB),),
    "v6e": ((1, 176 * GB), (4, 720 * GB), (8, 1440 * GB)),
    "tpu7x": ((4, 960 * GB),),
}
# Chips of each host of a slice that no single host holds.
HOST_CHIPS = 4
# MiB of memory as nvidia-smi reports it. Where a GPU is sold with two sizes, its name alone means
# the smaller one.
GPUS: dict[str, int] = {
    "a10": 23_028,
    "a100": 40_960,
    "a100-40gb": 40_960,
    "a100-80gb": 81_920,
    "h100": 81_559,
    "h200": 143_771,
    "l4": 23_034,
    "l40s": 46_068,
    "rtx3090": 24_576,
    "rtx4090": 24_564,
    "t4": 15_360,
}
# What JAX takes of a GPU's memory (https://docs.jax.dev/en/latest/gpu_memory_allocation.html), and
# how many GPUs a machine has at the most.
GPU_SHARE = 0.75
GPU_HOST = 8
_NAME = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")
_GPU_NAME = re.compile(rf"(gpu|cuda|{'|'.join(GPUS)})(?::([1-9]\d*))?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs, or some GPUs.

    Attributes:
      name: as given.
      chip: of a slice; None for GPUs.
      devices: how many JAX sees.
      chips: how many there are.
      memory: bytes that JAX has of each device; None if not known.
      hosts: machines.
      host_memory: bytes of each of them; None if not known.
    """

    name: str
    chip: Chip | None
    devices: int
    chips: int
    memory: int | None
    hosts: int
    host_memory: int | None


def parse_topology(
    name: str, *, gpu_memory: float | None = None, host_memory: float | None = None
) -> Topology:
    """A topology by its name: `v5e:2x4`, `gpu` or `h100:8`.

    Args:
      name: of the chip, with the shape of a slice or a number of GPUs.
      gpu_memory: GB of each GPU; None for what is known of it.
      host_memory: GB of each machine; None for what is known of it.

    Raises:
      UserError: there is no such chip, the shape is none of a slice, or a memory is not positive.
    """
    for flag, given in (("gpu_memory", gpu_memory), ("host_memory", host_memory)):
        if given is not None and not 0 < given < math.inf:
            raise UserError(f"--{flag}={given:g}: give GB of memory, more than 0.")
    own_host = None if host_memory is None else round(host_memory * GB)
    gpu = _GPU_NAME.fullmatch(name)
    if gpu:
        count, mib = int(gpu[2] or 1), GPUS.get(gpu[1].lower())
        known = mib << 20 if mib else None
        card = known if gpu_memory is None else round(gpu_memory * GB)
        usable = None if card is None else round(GPU_SHARE * card)
        return Topology(name, None, count, count, usable, -(-count // GPU_HOST), own_host)
    found = _NAME.fullmatch(name)
    if not found or found[1] not in CHIPS:
        slices = ", ".join(f"{chip}:{own.examples[0]}" for chip, own in CHIPS.items())
        raise UserError(
            f"--topology={name}: give a chip and the shape of a slice, such as {slices}; or GPUs "
            f"and how many, such as h100 or gpu:8 (known: {', '.join(GPUS)}; for another GPU take "
            "gpu and --gpu_memory)."
        )
    chip = CHIPS[found[1]]
    chips = math.prod(map(int, found[2].split("x")))
    hosts, memory = _hosts_of(found[1], chips)
    memory = own_host or memory
    return Topology(name, chip, chips * chip.devices, chips, chip.memory, hosts, memory)


def _hosts_of(chip: str, chips: int) -> tuple[int, int | None]:
    """How many hosts a slice has, and the bytes of memory of each; None if not known."""
    for size, memory in HOSTS.get(chip, ()):
        if chips <= size:
            return 1, memory
    return -(-chips // HOST_CHIPS), dict(HOSTS.get(chip, ())).get(HOST_CHIPS)


def prepare_environment(topologies: Sequence[Topology]) -> None:
    """Sets what must be set before jax is imported.

    Args:
      topologies: that are to be planned.
    """
    most_gpus = max((t.devices for t in topologies if t.chip is None), default=0)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if most_gpus > 1:
        # To lower for GPUs, the program is mapped over the same number of CPU devices.
        flag = f"--xla_force_host_platform_device_count={most_gpus}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def open_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice, for compiling only; devices of the CPU in place of GPUs.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    if topology.chip is None:
        return jax.devices("cpu")[: topology.devices]
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **dict(topology.chip.options)
        )
    except (RuntimeError, ImportError, ValueError) as error:
        message = str(error).splitlines()[0]
        if "libtpu" in message.lower():
            raise UserError(
                f"--topology={topology.name}: the TPU compiler cannot be loaded ({message}); "
                "install it with pip install '.[tpu]' (Linux, x86-64)."
            ) from error
        raise UserError(
            f"--topology={topology.name}: the TPU compiler knows no such slice ({message}); take "
            f"one such as {', '.join(topology.chip.examples)}."
        ) from error
    return list(found.devices)
