"""TPU chips and slices: public facts, and the devices of a slice that is not there."""

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

GPU = "gpu"
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
    """Facts of a chip, per device of JAX: a chip of v4 and later, one of the two cores of v2, v3.

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


# https://docs.cloud.google.com/tpu/docs/v5e (and v2, v3, v4, v5p, v6e): memory, peak, matrix units.
# Links: half of the bidirectional bandwidth of a chip (v5e, v6e), its bandwidth (v5p), or the
# all-reduce bandwidth of a pod by its chips (v3, v4). The compiler's cycles of a large matrix
# product fit these clocks.
CHIPS: dict[str, Chip] = {
    "v2": Chip(2, 8 << 30, 23e12, 0.70e9, None, (), ("2x2", "4x4")),
    "v3": Chip(2, 16 << 30, 61.5e12, 0.94e9, 166e9, (), ("2x2", "4x4")),
    "v4": Chip(
        1, 32 << 30, 275e12, 1.05e9, 268e9, (("chip_config_name", "megacore"),), ("2x2x2", "4x8x8")
    ),
    "v5e": Chip(1, 16 << 30, 197e12, 1.5e9, 200e9, (), ("2x4", "4x8", "16x16")),
    "v5p": Chip(1, 95 << 30, 459e12, 1.75e9, 600e9, (), ("2x2x2", "4x8x8")),
    "v6e": Chip(1, 32 << 30, 918e12, 1.75e9, 400e9, (), ("2x4", "4x8", "16x16")),
}
_NAME = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")
_GPU_NAME = re.compile(r"(gpu|cuda|[abhl]\d+\w*|rtx\w*)(?::([1-9]\d*))?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPUs, or some GPUs.

    Attributes:
      name: as given.
      chip: of a slice; None for GPUs.
      devices: how many JAX sees.
      chips: how many there are.
    """

    name: str
    chip: Chip | None
    devices: int
    chips: int


def parse_topology(name: str) -> Topology:
    """A topology by its name: `v5e:2x4`, `gpu` or `h100:8`.

    Raises:
      UserError: there is no such chip, or the shape is none of a slice.
    """
    gpu = _GPU_NAME.fullmatch(name)
    if gpu:
        count = int(gpu[2] or 1)
        return Topology(name, None, count, count)
    found = _NAME.fullmatch(name)
    if not found or found[1] not in CHIPS:
        known = ", ".join(f"{chip}:{size}" for chip, c in CHIPS.items() for size in c.examples)
        raise UserError(
            f"--topology={name}: give a chip and the shape of a slice, such as {known}; or gpu:8."
        )
    chip = CHIPS[found[1]]
    chips = math.prod(map(int, found[2].split("x")))
    return Topology(name, chip, chips * chip.devices, chips)


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
