"""Services that get a run's metrics beside its own files: Weights & Biases, and Trackio.

Each keeps its own account, server and offline mode, which its environment variables choose, such as
`WANDB_MODE=offline` and `TRACKIO_DIR`. A run never waits long for one, and never ends because of
one: what a service cannot take is told once, and the files of the run hold everything all the same.
"""

from __future__ import annotations

import importlib.util
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from absl import logging
from etils import epath

from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import read_json, write_json
from dqe_jax.utils.paths import is_remote

SINKS = ("wandb", "trackio")
# Holds the id by which a run that goes on finds its metrics in the services again.
FILE = "sinks.json"
# Seconds that a run waits for a service at its start, and at its end.
OPEN_S = 60
CLOSE_S = 60


class Sink(Protocol):
    """What the runs of all services have."""

    def log(self, values: dict[str, float], /, *, step: int) -> None:
        """Takes numbers of a step."""

    def finish(self) -> None:
        """Sends what is left."""


def require_sinks(names: Sequence[str]) -> None:
    """Checks that the services of `config.log.sinks` can be imported.

    Raises:
      UserError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"config.log.sinks names {name!r}, which is not installed: run `pip install "
                f"'dqe_jax[{name}]'`, or leave it out."
            )


class Sinks:
    """The open services of a run; none fails for its caller."""

    def __init__(
        self,
        names: Sequence[str],
        directory: epath.Path,
        project: str,
        config: Mapping[str, object],
        *,
        fresh: bool,
    ):
        """Opens them; one that cannot be opened is told and left out.

        Args:
          names: of `SINKS`.
          directory: of the run, whose name they show.
          project: that the run belongs to.
          config: what they show as its settings, by dotted name.
          fresh: whether the run starts; else it goes on, and so do its metrics there.
        """
        self._open: dict[str, Sink] = {}
        if not names:
            return
        own = _id_of(directory, fresh=fresh)
        for name in names:
            opener = _open_wandb if name == "wandb" else _open_trackio
            try:
                self._open[name] = opener(directory, project, own, dict(config))
            except Exception as error:
                _say(name, "could not be opened", error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Gives them numbers of a step; one that fails is told, and gets no more."""
        for name, sink in list(self._open.items()):
            try:
                sink.log(dict(values), step=step)
            except Exception as error:
                del self._open[name]
                _say(name, f"failed at step {step}", error)

    def close(self) -> None:
        """Waits for what they still have to send, but not for ever."""
        while self._open:
            name, sink = self._open.popitem()
            error = _within(CLOSE_S, sink.finish)
            if error is not None:
                _say(name, "could not send everything", error)


def _open_wandb(directory: epath.Path, project: str, own: str, config: dict[str, object]) -> Sink:
    import wandb

    # The terminal is the run's: no copy of it is sent, and nobody is asked for a key for ever.
    settings = wandb.Settings(
        console="off", init_timeout=OPEN_S, login_timeout=OPEN_S, save_code=False
    )
    run: Sink = wandb.init(
        project=project,
        name=directory.name,
        id=own,
        resume="allow",
        dir=None if is_remote(directory) else str(directory),
        config=config,
        settings=settings,
    )
    return run


def _open_trackio(directory: epath.Path, project: str, own: str, config: dict[str, object]) -> Sink:
    import trackio

    run: Sink = trackio.init(
        project=project,
        name=f"{directory.name}-{own}",
        resume="allow",
        config=config,
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return run


def _id_of(directory: epath.Path, *, fresh: bool) -> str:
    """The id of a run; another one for a run that starts anew in the directory of an earlier one.

    Raises:
      UserError: the directory cannot be written.
    """
    file = directory / FILE
    if not fresh and file.exists():
        held = read_json(file, dict, "remove it: the run goes on under another id").get("id")
        if isinstance(held, str) and held:
            return held
    made = uuid.uuid4().hex[:12]
    write_json(file, {"id": made})
    return made


def _within(seconds: float, fn: Callable[[], None]) -> Exception | None:
    """Runs `fn` for so long; what it raised, or that it has not ended."""
    found: list[Exception] = []

    def run() -> None:
        try:
            fn()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return TimeoutError(f"it has not ended after {seconds:.0f} s")
    return found[0] if found else None


def _say(name: str, what: str, error: Exception) -> None:
    logging.warning(
        "config.log.sinks: %s %s (%s); the run goes on, and its own files hold all metrics.",
        *(name, what, reason_of(error)),
    )
