"""What a complete run leaves: its metrics, and how long it trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from dqe_jax.config import RunConfig, differences
from dqe_jax.evaluation import protocols
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, read_bytes, read_json
from dqe_jax.utils.metric_log import read_line

EQUAL = ("steps", "time")
# Columns of the tables, and metrics of the plot, of those that the data set has.
METRICS = ("R@1", "R@10", "mAP@10")


@dataclasses.dataclass(frozen=True)
class Run:
    """A complete run.

    Attributes:
      variant: of `VARIANTS`.
      equal: "steps" or "time".
      seed: of the run.
      steps: taken.
      seconds: of training.
      metrics: of `config.eval.split`.
      validation: metrics by step.
      directory: of the run.
    """

    variant: str
    equal: str
    seed: int
    steps: int
    seconds: float
    metrics: Mapping[str, float]
    validation: Mapping[int, Mapping[str, float]]
    directory: str


def describe(run: Run) -> str:
    """A run as one line of a log."""
    found = ", ".join(f"{key} {run.metrics[key]:.4f}" for key in METRICS if key in run.metrics)
    return (
        f"{run.variant}, equal {run.equal}, seed {run.seed}: {found}; {run.steps} steps in "
        f"{run.seconds:.0f} s."
    )


def held_metrics(config: RunConfig, directory: epath.Path) -> dict[str, float] | None:
    """The final metrics of a run of this config, if it is complete."""
    report = directory / "eval" / f"{config.eval.split}-{config.total_steps}.json"
    try:
        trained = read_json(directory / "config.json", dict)
        found = read_json(report, dict)
    except UserError:  # not there, or the run was killed as it wrote
        return None
    protocol = protocols.protocol_of(config.data.dataset, config.eval.protocol).name
    same = not differences(config, trained) and found.get("protocol") == protocol
    metrics = found.get("metrics")
    return metrics if same and isinstance(metrics, dict) and _are_numbers(metrics) else None


def _are_numbers(metrics: Mapping[str, object]) -> bool:
    return all(type(value) in (int, float) for value in metrics.values())


def read_log(directory: epath.Path) -> list[JsonObject]:
    """The lines of a complete run's `metrics.jsonl` and `timing.jsonl`.

    Raises:
      UserError: it is not there, or does not hold them.
    """
    log: list[JsonObject] = []
    for name in ("metrics.jsonl", "timing.jsonl"):
        path = directory / name
        lines = _sound_lines(path)
        if lines is None or (name == "timing.jsonl" and not training_times(lines)):
            raise UserError(
                f"{path} is not the log of a run: remove {directory} to train it again."
            )
        log += lines
    return log


def _sound_lines(path: epath.Path) -> list[JsonObject] | None:
    """The lines of a log; None if it cannot be read, or one is damaged."""
    try:
        lines = [read_line(line) for line in read_bytes(path).split(b"\n") if line.strip()]
    except UserError:
        return None
    sound = [line for line in lines if line is not None]
    return sound if len(sound) == len(lines) else None


def training_times(log: Sequence[JsonObject]) -> list[tuple[int, float]]:
    """Steps, and the seconds of training that they had taken, of each line that says so."""
    name = "train_seconds"
    return [(line["step"], line[name]) for line in log if type(line.get(name)) in (int, float)]


def validation_metrics(log: Sequence[JsonObject]) -> dict[int, dict[str, float]]:
    """Those of `METRICS` that were measured on the validation split, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in log:
        for key in METRICS:
            if type(line.get(f"validation/{key}")) in (int, float):
                found.setdefault(line["step"], {})[key] = line[f"validation/{key}"]
    return found
