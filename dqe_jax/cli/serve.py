"""Serves a page and a REST interface for search with a trained model.

dqe-jax serve [--model=runs/shapes --images=DIR] [--index=DIR] [--port=8000]

With `--model` and `--images` the folder is indexed first, into `--index` if that is given.
`--index` alone takes an index that `dqe-jax index` made. Without any of them a small model is
trained for 45 seconds on drawn shapes and served as a demonstration.

The server listens on this machine alone. Other machines reach it with `--host=0.0.0.0` and a
`--token`, which may also be in the variable DQE_TOKEN. SIGTERM and Ctrl-C end it after the requests
in flight. Picks and rejections are kept in `--log`; `dqe-jax train --feedback` learns from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags, logging

from dqe_jax.cli.command_line import pairs_of
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import on_disk

if TYPE_CHECKING:
    from dqe_jax.search.index import Index

_MODEL = flags.DEFINE_string(
    "model", None, "Directory of a run, or of a model that dqe-jax export wrote."
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_IMAGES = flags.DEFINE_string("images", None, "Folder of the images.")
_INDEX = flags.DEFINE_string(
    "index", None, "Directory of the index; with --images it is brought up to date first."
)
_TABLE = flags.DEFINE_string("table", None, "CSV file with a line for each image, for filters.")
_ENCODERS = flags.DEFINE_multi_string(
    "encoder",
    [],
    "NAME=package.module:function, the encoder of imported features that do not name their own.",
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 for any that is free.", 0, 65_535)
_TOKEN = flags.DEFINE_string(
    "token", None, "Token that requests must bring; default: the variable DQE_TOKEN."
)
_HOST_NAMES = flags.DEFINE_multi_string(
    "host_name", [], "Name by which the server is called, such as that of a proxy; may repeat."
)
_LOG = flags.DEFINE_string(
    "log",
    None,
    'File for picks and rejections; default: feedback.jsonl in the index, or here; "" keeps none.',
)
_UPLOAD = flags.DEFINE_integer("max_upload", 20_000_000, "Bytes of a photo that is given.", 1)
_SECONDS = flags.DEFINE_float("max_seconds", 30.0, "Seconds that a request may take.", 0.1)
_REQUESTS = flags.DEFINE_integer("max_requests", 64, "Requests at a time.", 1)
_BATCH = flags.DEFINE_integer("max_batch", 8, "Searches answered together on the devices.", 1, 64)
_DEMO_DIR = flags.DEFINE_string(
    "demo_dir", "~/.cache/dqe_jax/demo", "Directory of the demonstration, which is taken again."
)
REQUIRED = ()


def main(argv: Sequence[str]) -> None:
    """Serves until the process is asked to end."""
    del argv
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serving needs {error.name}: install it by pip install 'dqe_jax[serve]'."
        ) from error
    from dqe_jax.distributed import compiled  # importing JAX takes seconds
    from dqe_jax.serving.app import Service
    from dqe_jax.serving.guard import is_loopback
    from dqe_jax.serving.server import serve
    from dqe_jax.serving.settings import Access, Limits

    token = _TOKEN.value if _TOKEN.value is not None else os.environ.get("DQE_TOKEN", "")
    if token and not (token.isascii() and token.isalnum() and len(token) >= 16):
        raise UserError(
            "--token: give at least 16 letters and digits, such as openssl rand -hex 16."
        )
    if not is_loopback(_HOST.value) and not token:
        raise UserError(
            f"--host={_HOST.value} can be reached from other machines: give --token as well, or "
            "leave out --host."
        )
    asked_log = on_disk(_LOG.value, "--log") if _LOG.value else None
    limits = Limits(
        upload_bytes=_UPLOAD.value,
        seconds=_SECONDS.value,
        requests=_REQUESTS.value,
        batch=_BATCH.value,
    )
    compiled.keep_programs()
    index, demo = _open()
    log = asked_log or _log_of(index)
    service = Service(index, limits=limits, log=log, demo=demo)
    logging.info("Compiling searches for %s images.", f"{len(index):,}")
    service.warm_up()
    if log is not None:
        logging.info("Picks and rejections are kept in %s.", log)
    hosts = (*_HOST_NAMES.value, *([] if is_loopback(_HOST.value) or _HOST_NAMES.value else ["*"]))
    serve(service, host=_HOST.value, port=_PORT.value, access=Access(token, hosts))


def _open() -> tuple[Index, str]:
    """The index, and what the page says of a demonstration; "" for none."""
    from dqe_jax.cli import config_files
    from dqe_jax.config import RunConfig
    from dqe_jax.search.index import open_index
    from dqe_jax.search.loading import load
    from dqe_jax.serving.demo import make_demo

    model = None
    if _MODEL.value is not None:
        model = load(_MODEL.value, step=_STEP.value, encoders=pairs_of("encoder", _ENCODERS.value))
    if _IMAGES.value is not None:
        if model is None:
            raise UserError("--images needs a model: give --model too, such as runs/shapes.")
        if _INDEX.value is None:
            logging.info("The index is not kept; --index=DIR keeps it for the next start.")
        index = model.index(_IMAGES.value, output=_INDEX.value, table=_TABLE.value)
        logging.info("%s.", index.report)
        return index, ""
    if _TABLE.value is not None:
        raise UserError("--table needs the folder of the images: give --images too.")
    if _INDEX.value is not None:
        return open_index(_INDEX.value, model=model), ""
    if model is not None:
        raise UserError("--model needs images to search: give --images=DIR, or --index=DIR.")
    config = RunConfig.of(config_files.load_config("shapes"))
    return make_demo(config, on_disk(_DEMO_DIR.value, "--demo_dir"))


def _log_of(index: Index) -> Path | None:
    if _LOG.value == "":
        return None
    if _INDEX.value is not None or _IMAGES.value is None:
        return index.directory / "feedback.jsonl"
    return Path("feedback.jsonl").absolute()
