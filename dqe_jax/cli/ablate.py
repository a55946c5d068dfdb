"""The ablation binary: trains the variants of a config over seeds, and compares them.

python -m dqe_jax.ablate --config=configs/shapes.py [--seeds=3] [--equal=both] [--workdir=DIR]

The same command continues an interrupted ablation. `dqe_jax/experiments/ablation/` lists the
variants, and says what equal time means and what is written. With `--rates` or `--lengths` each
variant has the learning rate and the steps that are best on validation, and the results are curves
over steps and time. With `--sweep=negatives.upper=0.02,0.1,0.6` variants are trained with these
values of a field. With `--lowers=0,0.005,0.02,0.1` it
trains TRNS with these lower quantiles instead, at equal steps: see
`dqe_jax/experiments/bound_curve.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from dqe_jax.cli import command_line
from dqe_jax.utils.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config that the variants change; its seed is that of the first run.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the ablation; default: runs/<name of the config>-ablation."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Short for --config.data.data_dir.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each variant, with consecutive seeds.", 1)
_VARIANTS = flags.DEFINE_list("variants", [], "Variants to compare, beside infonce; default: all.")
_EQUAL = flags.DEFINE_enum(
    "equal",
    "both",
    ("steps", "time", "both"),
    "Whether runs have the same steps, the same training time, or both in turn.",
)
_LOWERS = flags.DEFINE_list(
    "lowers", [], "Lower quantiles of trns to train, in place of the variants: the curve of bounds."
)
_RATES = flags.DEFINE_list(
    "rates", [], "Learning rates of which each variant takes the best on validation: curves."
)
_LENGTHS = flags.DEFINE_list(
    "lengths", [], "Steps of a run of which each variant takes the best on validation: curves."
)
_SWEEP = flags.DEFINE_string(
    "sweep", None, "A field of the config and values to train variants with: FIELD=VALUE,VALUE."
)
_KIND = flags.DEFINE_string(
    "kind", "", "Of curves and sweeps: the kind of change whose queries alone count, on the split."
)
REQUIRED = ("config",)


def main(argv: Sequence[str]) -> None:
    """Trains what is missing and writes the tables."""
    del argv
    config = _CONFIG.value
    command_line.use_data_dir(config, _DATA_DIR.value)
    # After the flags: importing JAX takes seconds.
    from dqe_jax.distributed import compiled

    compiled.keep_programs()
    modes = {"--lowers": _LOWERS.value, "--sweep": _SWEEP.value}
    modes["--rates and --lengths"] = _RATES.value or _LENGTHS.value
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} do not go together: give one of them.")
    if _KIND.value and (not given or _LOWERS.value):
        raise UserError("--kind goes with --rates, --lengths or --sweep: give one of them.")
    if _LOWERS.value:
        _run_curve(config)
        return
    if _SWEEP.value:
        _run_sweep(config, _SWEEP.value)
        return
    if _RATES.value or _LENGTHS.value:
        _run_tuned(config)
        return
    from dqe_jax.experiments.ablation.record import EQUAL
    from dqe_jax.experiments.ablation.runs import run_ablation

    run_ablation(
        config,
        _WORKDIR.value or command_line.default_workdir("ablation"),
        variants=_VARIANTS.value,
        seeds=_SEEDS.value,
        equal=EQUAL if _EQUAL.value == "both" else (_EQUAL.value,),
    )


def _run_tuned(config: ConfigDict) -> None:
    from dqe_jax.experiments.ablation import tuned

    tuned.run_tuned(
        config,
        _WORKDIR.value or command_line.default_workdir("curves"),
        rates=_RATES.value,
        lengths=_LENGTHS.value,
        variants=_VARIANTS.value,
        seeds=_SEEDS.value,
        kind=_KIND.value,
    )


def _run_sweep(config: ConfigDict, text: str) -> None:
    from dqe_jax.experiments.ablation import sweep

    sweep.run_sweep(
        config,
        _WORKDIR.value or command_line.default_workdir("sweep"),
        sweep=text,
        variants=_VARIANTS.value,
        seeds=_SEEDS.value,
        kind=_KIND.value,
    )


def _run_curve(config: ConfigDict) -> None:
    if _VARIANTS.value:
        raise UserError("--lowers trains no variants: leave --variants out.")
    from dqe_jax.experiments import bound_curve

    bound_curve.run_curve(
        config,
        _WORKDIR.value or command_line.default_workdir("bounds"),
        lowers=bound_curve.read_lowers(_LOWERS.value),
        seeds=_SEEDS.value,
    )
