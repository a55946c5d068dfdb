"""The page in a notebook, on this machine or on Colab."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import threading
import time

from dqe_jax.search.index import Index
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import on_disk

HEIGHT = 900  # pixels
_NEEDED = ("fastapi", "prometheus_client", "uvicorn")


@dataclasses.dataclass(frozen=True)
class Page:
    """A page that is served for as long as the notebook runs, or until `close`.

    Attributes:
      port: on this machine.
    """

    port: int
    _ended: threading.Event
    _thread: threading.Thread

    def close(self) -> None:
        """Ends the server."""
        self._ended.set()
        self._thread.join()


def show(index: Index, *, height: int = HEIGHT, log: str | None = None) -> Page:
    """Serves an index and shows its page below the cell.

    Args:
      index: to search.
      height: of the frame, in pixels.
      log: file for picks and rejections; None keeps none.

    Raises:
      UserError: FastAPI, uvicorn or prometheus_client is not installed.
    """
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"the page needs {', '.join(lacking)}: %pip install {' '.join(lacking)}.")
    from dqe_jax.serving.app import Service
    from dqe_jax.serving.server import listen, make_server
    from dqe_jax.serving.settings import Access

    service = Service(index, log=None if log is None else on_disk(log, "log"))
    # A notebook shows it in a frame, and Colab's proxy calls it by a name of its own.
    access = Access(hosts=("*",) if "google.colab" in sys.modules else (), framed=True)
    listening = listen("127.0.0.1", 0)
    port = int(listening.getsockname()[1])
    server, ended = make_server(service, access), threading.Event()

    def run() -> None:
        server.run(sockets=[listening])
        listening.close()
        service.batcher.close()

    def end() -> None:
        ended.wait()
        server.should_exit = True

    thread = threading.Thread(target=run, name="page", daemon=True)
    thread.start()
    threading.Thread(target=end, daemon=True).start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    _frame(port, height)
    return Page(port, ended, thread)


def _frame(port: int, height: int) -> None:
    if "google.colab" in sys.modules:
        from google.colab import output  # type: ignore[import-not-found, unused-ignore]

        output.serve_kernel_port_as_iframe(port, height=str(height))
        return
    from IPython.display import IFrame, display

    display(IFrame(f"http://127.0.0.1:{port}/", width="100%", height=height))  # type: ignore[no-untyped-call, unused-ignore]
