"""The learning rate and the steps of each variant, chosen on validation from one grid for all."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from absl import logging
from etils import epath

from dqe_jax.config import RunConfig
from dqe_jax.experiments.ablation import sharing
from dqe_jax.experiments.ablation.record import METRICS, Run, read_log, training_times
from dqe_jax.experiments.ablation.record import validation_metrics as validation_of
from dqe_jax.experiments.ablation.runs import train_or_read
from dqe_jax.experiments.ablation.variants import variant_config
from dqe_jax.utils.errors import UserError

TUNED = "tuned"  # what the runs are equal in: the care with which they were tuned
PREFERRED = ("mAP@10", "R@10", "R@1")


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried, for each variant alike.

    Attributes:
      rates: learning rates.
      lengths: steps of a run.
    """

    rates: tuple[float, ...]
    lengths: tuple[int, ...]

    def cells(self) -> list[tuple[float, int]]:
        """Every rate with every length, short runs first."""
        return [(rate, steps) for steps, rate in itertools.product(self.lengths, self.rates)]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a variant.

    Attributes:
      variant: its name.
      rate: the learning rate.
      steps: of a run.
      metric: of validation, by which it was chosen.
      tried: its value at the end of the run of each cell, `[rate, steps, value]`.
    """

    variant: str
    rate: float
    steps: int
    metric: str
    tried: Sequence[tuple[float, int, float]]

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the least or the largest that was tried, of several."""
        rates = {rate for rate, _, _ in self.tried}
        return len(rates) > 1 and self.rate in (min(rates), max(rates))


def read_grid(config: RunConfig, rates: Sequence[str], lengths: Sequence[str]) -> Grid:
    """The grid of two flags; what one leaves out is that of the config.

    Raises:
      UserError: a value is no number, or not allowed.
    """
    found: dict[str, list[float]] = {"rates": [], "lengths": []}
    for flag, words in (("rates", rates), ("lengths", lengths)):
        for word in words:
            try:
                value = float(word)
                if not 0 < value < float("inf") or (flag == "lengths" and value != int(value)):
                    raise ValueError(word)
            except ValueError:
                kind = "learning rates" if flag == "rates" else "whole numbers of steps"
                raise UserError(f"--{flag}={word}: give {kind} above 0.") from None
            found[flag].append(value)
    own = found["rates"] or [config.optimizer.learning_rate]
    steps = found["lengths"] or [config.total_steps]
    return Grid(tuple(dict.fromkeys(own)), tuple(int(x) for x in dict.fromkeys(steps)))


def tuned_config(config: RunConfig, variant: str, seed: int, rate: float, steps: int) -> RunConfig:
    """The config of a run with a point of the curves at each evaluation."""
    changes = {"optimizer.learning_rate": rate, "eval.curve": True}
    return variant_config(config, variant, seed, steps).with_changes(changes)


def run_of(
    config: RunConfig, workdir: epath.Path, variant: str, seed: int, rate: float, steps: int
) -> tuple[Run, bool]:
    """One run, and whether it had still to be trained or evaluated.

    Raises:
      UserError: as `runs.complete`.
    """
    own = tuned_config(config, variant, seed, rate, steps)
    directory = workdir / f"{variant}-{steps}-{rate:g}-{seed}"
    metrics, is_new = train_or_read(own, directory)
    log = read_log(directory)
    seconds = training_times(log)[-1][1]
    found = validation_of(log)
    return Run(variant, TUNED, seed, steps, seconds, metrics, found, directory.name), is_new


def choose(
    config: RunConfig, workdir: epath.Path, variants: Sequence[str], grid: Grid
) -> dict[str, Choice]:
    """Trains each cell of the grid with the first seed; of each variant the best on validation.

    Args:
      config: of the runs; its seed is the first.
      workdir: of the ablation.
      variants: names of `VARIANTS`.
      grid: of all of them.

    Raises:
      UserError: as `run_of`.
    """
    cells = [(name, rate, steps) for name in variants for rate, steps in grid.cells()]

    def train(cell: tuple[str, float, int]) -> tuple[Run, bool]:
        name, rate, steps = cell
        return run_of(config, workdir, name, config.seed, rate, steps)

    values, metric = dict[tuple[str, float, int], float](), ""
    for cell, (run, is_new) in sharing.in_turn(cells, train):
        last = run.validation[max(run.validation)]
        metric = metric_of(last)
        values[cell] = last[metric]
        if is_new and len(grid.cells()) > 1:
            text = "%s, learning rate %g, %d steps: validation %s %.4f."
            logging.info(text, *cell, metric, last[metric])
    return {name: _best(name, grid, values, metric) for name in variants}


def _best(
    variant: str, grid: Grid, values: Mapping[tuple[str, float, int], float], metric: str
) -> Choice:
    tried = [(rate, steps, values[variant, rate, steps]) for rate, steps in grid.cells()]
    rate, steps, value = max(tried, key=lambda cell: cell[2])  # of equals the first: the shortest
    choice = Choice(variant, rate, steps, metric, tried)
    if len(tried) > 1:
        text = "%s: learning rate %g and %d steps are chosen, validation %s %.4f%s."
        edge = "; this rate is at the edge of the grid" if choice.at_edge else ""
        logging.info(text, variant, rate, steps, metric, value, edge)
    return choice


def metric_of(found: Mapping[str, float]) -> str:
    """The metric that decides, of those that validation measures: mAP@10 where there is one."""
    return next(key for key in (*PREFERRED, *METRICS) if key in found)
