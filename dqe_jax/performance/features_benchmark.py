"""Times how fast the features of frozen towers are computed, copied to the host and written.

On random images and texts, in batches of `config.eval.batch_size` as a store computes them. FLOP
are those of XLA's cost analysis before the program is optimised.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from dqe_jax.config import AnyConfig, RunConfig
from dqe_jax.distributed import mesh
from dqe_jax.feature_store import writing
from dqe_jax.feature_store.features import directory_of, given_kinds, stored_kinds
from dqe_jax.feature_store.shards import KEY_BYTES
from dqe_jax.feature_store.store import dtype_of, states_of
from dqe_jax.method.arrays import Params
from dqe_jax.models import setup
from dqe_jax.models.dqe import DQE
from dqe_jax.performance import records
from dqe_jax.performance import step_benchmark as steps_of
from dqe_jax.performance.records import Seconds, Spread
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.text_table import text_table

COMPUTED, COPIED, WRITTEN = "computed", "and copied to the host", "and written to disk"


@dataclasses.dataclass(frozen=True)
class TowerTime:
    """How fast a tower makes features.

    Attributes:
      rows: of a batch, images or texts.
      row_bytes: of what is stored for each.
      flop: of a batch, on all devices.
      memory: bytes of a device that the program needs, by XLA's memory analysis.
      first: seconds of the first batch, compiling included.
      seconds: of a batch, by how far it is followed: `COMPUTED`, `COPIED`, `WRITTEN`.
    """

    rows: int
    row_bytes: int
    flop: float
    memory: int
    first: float
    seconds: Mapping[str, Spread]


@dataclasses.dataclass(frozen=True)
class FeaturesReport:
    """What `benchmark_features` measured.

    Attributes:
      config: its name; "" if it has none.
      settings: what decides the figures, of the config.
      devices: that were used, in words.
      num_devices: how many.
      dtype: of stored features.
      ceiling: FLOP a second of one device in a large matrix product.
      towers: by kind, "image" or "text".
    """

    config: str
    settings: JsonObject
    devices: str
    num_devices: int
    dtype: str
    ceiling: float
    towers: Mapping[str, TowerTime]

    def mfu(self, kind: str) -> float:
        """The share of the ceiling that a tower reaches."""
        one = self.towers[kind]
        rate = one.flop / one.seconds[COMPUTED].median
        return rate / (self.ceiling * self.num_devices)

    def as_json(self) -> JsonObject:
        """All figures, those that follow from others too."""
        content = dataclasses.asdict(self)
        for kind, one in self.towers.items():
            content["towers"][kind] |= {
                "rows_per_second": {k: one.rows / s.median for k, s in one.seconds.items()},
                "mfu": self.mfu(kind),
            }
        return content


def benchmark_features(
    config: AnyConfig, *, rounds: int = 5, tower_layers: int = 0, label: str = ""
) -> FeaturesReport:
    """Times the frozen towers of a config on its devices, and logs a table.

    Args:
      config: of a run; it needs no data and no weights.
      rounds: of batches, at least 1.
      tower_layers: as for `step_benchmark.benchmark_step`.
      label: the config's name.

    Raises:
      UserError: the config is not sound or stores nothing, or the disk cannot be written.
    """
    config = RunConfig.of(config)
    devices = mesh.devices_of(config.num_devices)
    model = steps_of.model_of(config, tower_layers)
    kinds = [k for k in stored_kinds(config, model) if k not in given_kinds(model)]
    if not kinds:
        named = f"{label}: " if label else ""
        raise UserError(
            f"{named}no tower of this config is stored; freeze one without dropout, such as by "
            "--config.model.frozen=\"('vision',)\"."
        )
    params = setup.init_params(model, config.model, config.data, config.seed)
    report = FeaturesReport(
        config=label,
        settings=steps_of.settings_of(config, tower_layers),
        devices=f"{len(devices)} x {devices[0].device_kind}",
        num_devices=len(devices),
        dtype=str(dtype_of(config)),
        ceiling=steps_of.ceiling_of(config, devices),
        towers={
            kind: _time(kind, config, model, params, devices, rounds, tower_layers)
            for kind in kinds
        },
    )
    logging.info("%s", table(report))
    return report


def _time(
    kind: str,
    config: RunConfig,
    model: DQE,
    params: Params,
    devices: Sequence[jax.Device],
    rounds: int,
    tower_layers: int,
) -> TowerTime:
    """Times a tower."""
    rng, data = np.random.default_rng(0), config.data
    rows = -(-config.eval.batch_size // len(devices)) * len(devices)
    if kind == "image":
        size = (rows, data.image_size, data.image_size, 3)
        inputs = rng.integers(0, 256, size).astype(np.uint8)
    else:
        inputs = steps_of.random_texts(rng, rows, data.max_length, model)
    states = states_of(model, kind, dtype_of(config))
    held = mesh.replicate(params, devices)
    program = mesh.gather_rows(states, columns=1, devices=devices)
    placed = mesh.place(inputs, devices)
    to_host = mesh.map_rows(states, columns=1, devices=devices)
    start = time.perf_counter()
    lowered = program.lower(held, placed)
    compiled = lowered.compile()
    arrays = to_host(held, inputs)
    first = time.perf_counter() - start
    counted = config.with_changes({k: v for k, v in steps_of.COUNTED.items() if "model" in k})
    if counted.model != config.model:
        once = states_of(steps_of.model_of(counted, tower_layers), kind, dtype_of(config))
        shapes = setup.param_shapes(
            steps_of.model_of(counted, tower_layers), counted.model, counted.data
        )
        lowered = mesh.gather_rows(once, columns=1, devices=devices).lower(shapes, placed)
    # As wide as keys of a store.
    keys = rng.integers(0, 256, (rows, KEY_BYTES)).astype(np.uint8)
    with tempfile.TemporaryDirectory(dir=_beside(config)) as place:

        def write(number: int) -> None:
            made = {name: np.asarray(x) for name, x in to_host(held, inputs).items()}
            writing.write(Path(place), number, keys, made)

        runs: dict[str, Callable[[int], object]] = {
            COMPUTED: lambda _: jax.block_until_ready(compiled(held, placed)),
            COPIED: lambda _: to_host(held, inputs),
            WRITTEN: write,
        }
        seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
        for number in range(rounds):
            for name, run in runs.items():
                seconds[name].append(records.time_of(functools.partial(run, number)))
    return TowerTime(
        rows=rows,
        row_bytes=sum(x[0].nbytes for x in arrays.values()),
        flop=steps_of.flop_of(lowered) * len(devices),
        memory=steps_of.memory_of(compiled),
        first=first,
        seconds={name: Spread.of(each) for name, each in seconds.items()},
    )


def _beside(config: RunConfig) -> Path | None:
    """Where the stores of a config would lie, if that is there; else wherever files may lie."""
    place = directory_of(config)
    return place if place.is_dir() else None


def table(report: FeaturesReport) -> str:
    """A report as text."""
    rows: list[tuple[str, ...]] = [
        ("tower", "ms a batch", "p95", "rows/s", "MB/s", "TFLOP/s", "MFU", "GiB")
    ]
    for kind, one in report.towers.items():
        for name, spread in one.seconds.items():
            only = ("", "", "")
            if name == COMPUTED:
                rate = f"{one.flop / spread.median / 1e12:.3g}"
                only = (rate, f"{report.mfu(kind):.0%}", f"{one.memory / 2**30:.2f}")
            rows.append(
                (
                    f"{kind}s, {name}",
                    f"{1e3 * spread.median:.1f}",
                    f"{1e3 * spread.p95:.1f}",
                    f"{one.rows / spread.median:,.1f}",
                    f"{one.rows * one.row_bytes / spread.median / 1e6:,.1f}",
                    *only,
                )
            )
    lines = [
        f"{report.config + ': ' if report.config else ''}{report.devices}, jax {jax.__version__}, "
        f"computed in {report.settings['dtype']}, stored in {report.dtype}; a matrix product "
        f"reaches\n{report.ceiling / 1e12:.3g} TFLOP/s on one device.",
        text_table(rows),
        *(
            f"A batch has {one.rows} {kind}s of {one.row_bytes:,} bytes each; the first took "
            f"{one.first:.1f} s."
            for kind, one in report.towers.items()
        ),
    ]
    if peak := records.device_peak(jax.local_devices()):
        lines.append(f"A device has held at most {peak / 2**30:.2f} GiB.")
    return "\n".join(lines)
