"""What the binaries share: quiet logs, and errors that end in one sentence and status 2."""

from __future__ import annotations

import difflib
import logging as python_logging
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from dqe_jax.utils.errors import UserError

_MISSING_FIELD = re.compile(r"Key \"?'?(?P<name>[\w.]+)")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` as `absl.app.run` does, with plain log lines and short errors."""

    def guarded(argv: Sequence[str]) -> None:
        logging.use_absl_handler()
        logging.get_absl_handler().setFormatter(python_logging.Formatter("%(message)s"))
        logging.set_verbosity(logging.INFO)
        python_logging.getLogger("absl").addFilter(_is_news)
        try:
            main(argv)
        except UserError as error:
            _end(str(error))

    app.run(guarded, flags_parser=_parse_flags)


def _is_news(record: python_logging.LogRecord) -> bool:
    """Keeps dqe_jax's own lines, and the warnings of libraries but one about an optional speed-up."""
    if "OpenCV is not installed" in record.getMessage():
        return False
    own = "dqe_jax" in (record.pathname or "")
    return own or record.levelno >= python_logging.WARNING


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; a config file that fails to load ends in one sentence too."""
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        _end(str(error).splitlines()[0])
    except (ImportError, SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        _end(f"--config: {_sentence(error)}")
    except OSError as error:
        config = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), "")
        reason = error.strerror or "it cannot be loaded"
        _end(f"--config: no config at {config!r} ({reason}); see configs/ for those that exist.")
    raise AssertionError  # _end does not return


def _sentence(error: BaseException) -> str:
    text = error.args[0] if error.args else str(error)
    return " ".join(str(text).split())


def _end(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(2)


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is most like `name`, or ""."""
    return next(iter(difflib.get_close_matches(name, known, 1)), "")
