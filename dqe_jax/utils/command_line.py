"""What the binaries share: quiet logs, and errors that end in one sentence and status 2."""

from __future__ import annotations

import logging as python_logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from dqe_jax.utils.errors import UserError
from dqe_jax.utils.paths import look_anew

_HINT = re.compile(r'Did you mean "(?P<near>\w+)" instead of "(?P<name>\w+)"')
_NAME_ALONE = re.compile(r"""[\\'"]*(?P<name>\w+)[\\'"]*""")
_OLD_NEWS = (
    "OpenCV is not installed",  # an optional speed-up
    "CheckpointManagerOptions.read_only=True",  # what evaluation asks for
    "Given directory is read only",
    "Using custom data configuration",
)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` as `absl.app.run` does, with plain log lines and short errors."""

    def guarded(argv: Sequence[str]) -> None:
        log_plainly()
        look_anew()
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}: flags start with --.")
            main(argv)
        except UserError as error:
            _end(str(error))

    app.run(guarded, flags_parser=_parse_flags)


def log_plainly() -> None:
    """Logs what dqe_jax says as plain lines, and of libraries the warnings: in notebooks too."""
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(python_logging.Formatter("%(message)s"))
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_news)  # of the handler: for all libraries


def default_workdir(*suffixes: str) -> str:
    """`runs/shapes-hard` for `--config=configs/shapes.py:hard`, and suffixes after it."""
    name, _, variants = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    parts = [pathlib.Path(name).stem, *variants.split(","), *suffixes]
    return "runs/" + "-".join(part for part in parts if part)


def _is_news(record: python_logging.LogRecord) -> bool:
    """Keeps dqe_jax's own lines, and the warnings of libraries but those of `_OLD_NEWS`."""
    if any(text in record.getMessage() for text in _OLD_NEWS):
        return False
    own = (record.pathname or "").startswith(os.path.dirname(os.path.dirname(__file__)))
    return own or record.levelno >= python_logging.WARNING


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; a config file that fails to load ends in one sentence too."""
    try:
        rest = flags.FLAGS(list(argv))
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            config = flags.FLAGS["config"].value
            config.to_dict()  # a missing file is reported only when the config is used
        return rest
    except flags.Error as error:
        _end(_sentence(str(error)))
    except OSError:
        _end(f"--config: no config at {_config_file(argv)!r}; see configs/ for those that exist.")
    except (ImportError, SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        _end(f"--config: {_sentence(str(error.args[0] if error.args else error))}")
    raise AssertionError  # _end does not return


def _config_file(argv: Sequence[str]) -> str:
    for i, argument in enumerate(argv):
        if argument in ("--config", "-config"):
            return argv[i + 1]
        if argument.startswith(("--config=", "-config=")):
            return argument.partition("=")[2]
    return ""


def _sentence(text: str) -> str:
    """What an error of a flag or a config file says, without its traceback and quotes of quotes."""
    hint, name = _HINT.search(text), _NAME_ALONE.fullmatch(text.strip())
    if hint:
        return f"the config has no field {hint['name']!r}; did you mean {hint['near']!r}?"
    if name:
        return f"the config has no field {name['name']!r}."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head, failed, _ = lines[0].partition("Error whilst parsing config file")
    # The message then ends in the last line of a traceback: "ValueError: what is wrong".
    return head + (lines[-1].partition(": ")[2] or lines[-1]) if failed else lines[0]


def _end(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(2)
