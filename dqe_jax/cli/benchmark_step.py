"""Times the training step of configs on random data, beside simpler baselines or beside PyTorch.

dqe-jax benchmark step shapes [fiq_clip:vit_b_32 ...] [--rounds=10] [--steps=3] [--json=FILE]
dqe-jax benchmark step shapes --vs=torch

Configs are named before the flags, or one as --config=configs/shapes.py. --config.field=value
changes all of them. Neither data nor weights are needed.
`dqe_jax/performance/step_benchmark.py` says what is timed, `torch_comparison.py` beside it what the
same work is in PyTorch, and docs/how-to/benchmark.md what the columns mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from dqe_jax.cli import command_line
from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_MORE = flags.DEFINE_multi_string("and_config", [], "One more config; may be given several times.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds in which the steps take turns.", 1)
_STEPS = flags.DEFINE_integer("steps", 3, "Steps of each in a round.", 1)
_VARIANTS = flags.DEFINE_list(
    "variants",
    [],
    "Of: config, no mined negatives, no attribute weights, InfoNCE, towers in each "
    "step; all by default. Those with other parameters take the memory of a run.",
)
_VS = flags.DEFINE_enum(
    "vs", "", ["", "torch"], "Time the same work in PyTorch, instead of the variants."
)
_COMPILE = flags.DEFINE_bool(
    "torch_compile", True, "With --vs=torch: time torch.compile too, which compiles for minutes."
)
_LAYERS = flags.DEFINE_integer(
    "tower_layers",
    0,
    "Layers of a pretrained vision tower, to measure a part of one that is too large; 0 for all.",
    0,
)
_BANK = flags.DEFINE_integer(
    "bank_images",
    0,
    "Images of the bank, if config.negatives.pool is bank; 0 for those of the published gallery.",
    0,
)
_JSON = flags.DEFINE_string("json", None, "File that gets the figures as JSON.")
_TRACE = flags.DEFINE_string(
    "trace", None, "Directory that gets a profile of the first step, for TensorBoard and Perfetto."
)
REQUIRED = ("config",)
CONFIGS = True


def main(argv: Sequence[str]) -> None:
    """Times and prints tables."""
    del argv
    if _VS.value:
        if _VARIANTS.value:
            raise UserError("--variants goes without --vs: leave one of them out.")
        # JAX would take most of a GPU for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    configs = command_line.all_configs(_CONFIG.value, _MORE.value)
    from dqe_jax.distributed import compiled, mesh  # importing JAX takes seconds
    from dqe_jax.performance import records
    from dqe_jax.performance.step_benchmark import benchmark_step
    from dqe_jax.performance.torch_comparison import compare_with_torch

    compiled.keep_programs()
    records.claim(_JSON.value)
    results = {}
    for number, (name, config) in enumerate(configs.items()):
        shared: dict[str, Any] = {
            "rounds": _ROUNDS.value,
            "steps": _STEPS.value,
            "tower_layers": _LAYERS.value,
            "trace": _TRACE.value and os.path.join(_TRACE.value, *[name] * (len(configs) > 1)),
            "label": name,
            "started": None if number else records.seconds_since_start(),
        }
        if _VS.value:
            comparison = compare_with_torch(config, **shared, torch_compile=_COMPILE.value)
            results[name] = comparison.as_json()
        else:
            results[name] = benchmark_step(
                config, names=_VARIANTS.value, bank_images=_BANK.value, **shared
            ).as_json()
    records.write(
        _JSON.value,
        "step",
        results,
        devices=mesh.all_devices(),
        settings={"rounds": _ROUNDS.value, "steps": _STEPS.value, "vs": _VS.value},
        packages=records.IN_TORCH if _VS.value else (),
    )
