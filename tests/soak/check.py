"""What must hold of a run's files after each fault, and at its end."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

SAME_META = ("tokenizer", "data_state", "bank_step", "data", "sizes")


def files_of(root: Path) -> dict[str, str]:
    """Digests of the files below a directory, by their paths in it."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def checkpoints_of(workdir: Path) -> dict[int, dict[str, str]]:
    """The files of each complete checkpoint, by its step."""
    root = workdir / "checkpoints"
    found = root.iterdir() if root.is_dir() else ()
    return {int(path.name): files_of(path) for path in found if path.name.isdigit()}


def shards_of(root: Path) -> list[Path]:
    """The whole shards of all stores of features in a directory."""
    return [path for path in root.glob("*/shard-*") if not path.name.endswith(".partial")]


def may_be_removed(step: int, now: set[int], keep: int, every: int) -> bool:
    """Whether a run may have removed a checkpoint, by what is there now and its rules."""
    if not any(other > step for other in now):
        return False
    planned = [other for other in now if other % every == 0 and other > step]
    return step % every != 0 or len(planned) >= keep


class Lines:
    """The log of a run, which must be a beginning of the whole run's."""

    def __init__(self, expected: bytes):
        self.expected = expected

    def problem(self, found: bytes, saved: int) -> str:
        """What is wrong with a log, "" if nothing; `saved` is the step of the newest checkpoint."""
        if not self.expected.startswith(found):
            at = next(
                (i for i, (a, b) in enumerate(zip(found, self.expected)) if a != b),
                len(self.expected),
            )
            line = found.count(b"\n", 0, at) + 1
            return f"line {line} of metrics.jsonl is not that of the whole run"
        held = found.count(b"\n")
        steps = [json.loads(line)["step"] for line in self.expected.split(b"\n")[:-1]]
        # A step is saved after its own line, and validation's, are written.
        if sum(step <= saved for step in steps) > held:
            return f"metrics.jsonl has {held} lines, although step {saved} is saved"
        return ""


class Reader:
    """A process that reads checkpoints: this one may not ask JAX for a device."""

    def __init__(self, whole: Path):
        context = multiprocessing.get_context("fork")
        self._end, other = context.Pipe()
        self._process = context.Process(target=_read, args=(other, whole), daemon=True)
        self._process.start()

    def problem(self, workdir: Path, step: int, *, as_whole: bool) -> str:
        """What is wrong with a checkpoint, "" if nothing.

        Args:
          workdir: of the run.
          step: of the checkpoint.
          as_whole: whether it must equal that of the whole run.
        """
        self._end.send((workdir, step, as_whole))
        return str(self._end.recv())

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.join()


def _read(end: Connection, whole: Path) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
    while True:
        workdir, step, as_whole = end.recv()
        try:
            end.send(_problem(workdir, step, whole if as_whole else None))
        except Exception:
            end.send(f"step {step}: {traceback.format_exc()}")


def _problem(workdir: Path, step: int, whole: Path | None) -> str:
    import numpy as np
    from flax.traverse_util import flatten_dict

    found = _contents(workdir, step)
    flat = flatten_dict(found)
    if len(flat) < 50:
        return f"the checkpoint of step {step} has {len(flat)} parts"
    if whole is None:
        return ""
    expected = flatten_dict(_contents(whole, step))
    if flat.keys() != expected.keys():
        return f"the checkpoint of step {step} has {sorted(flat.keys() ^ expected.keys())}"
    for path, x in expected.items():
        if np.asarray(x).dtype != np.asarray(flat[path]).dtype or not np.array_equal(x, flat[path]):
            return f"the checkpoint of step {step} differs in {'/'.join(map(str, path))}"
    return ""


def _contents(workdir: Path, step: int) -> dict[str, object]:
    """All that a checkpoint holds, but for the time that was needed and its config."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    from dqe_jax.checkpoints import store

    manager = store.open_for_reading(epath.Path(workdir))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    items: dict[str, object] = {}
    for path in (workdir / "checkpoints" / str(step)).iterdir():
        if path.is_dir() and path.name not in ("meta", "metrics"):
            args = {path.name: ocp.args.StandardRestore(fallback_sharding=here)}
            got = manager.restore(step, args=ocp.args.Composite(**args))[path.name]
            leaves = jax.tree.leaves_with_path(jax.tree.map(np.asarray, got))
            items[path.name] = {jax.tree_util.keystr(at): x for at, x in leaves}
    meta = store.read_meta(manager, step)
    items["meta"] = {name: json.dumps(meta.get(name)) for name in SAME_META}
    manager.close()
    return items
