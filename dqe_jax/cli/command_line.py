"""What the commands share: quiet logs, and errors that end in one sentence and status 2."""

from __future__ import annotations

import logging as python_logging
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from dqe_jax import __version__
from dqe_jax.cli import config_files
from dqe_jax.config import fields
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


def run(module: ModuleType, argv: Sequence[str]) -> None:
    """Runs a command as `absl.app.run` does, with plain log lines and short errors.

    Args:
      module: of the command, see `commands.py`.
      argv: its name and its arguments.
    """

    def guarded(rest: Sequence[str]) -> None:
        log_plainly()
        look_anew()
        try:
            if len(rest) > 1:
                raise UserError(f"unexpected argument {rest[1]!r}: flags start with --.")
            module.main(rest)
        except UserError as error:
            end(str(error))

    _answer(module, argv)
    config_files.provide()
    flags.mark_flags_as_required(module.REQUIRED)
    app.run(guarded, argv=_with_config(argv), flags_parser=_parse_flags)


def version_line() -> str:
    """What `--version` prints."""
    return f"dqe_jax {__version__}\n"


def _answer(module: ModuleType, argv: Sequence[str]) -> None:
    """Answers `--help` and `--version`, and ends then."""
    if "--version" in argv:
        sys.stdout.write(version_line())
        sys.exit(0)
    if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & set(argv):
        own = flags.FLAGS.module_help(module.__name__)
        sys.stdout.write(f"{argv[0]}: {module.__doc__}\nFlags:\n{own}\n")
        if "--helpfull" in argv and "config" in flags.FLAGS:
            sys.stdout.write(f"\nFields of the config:\n\n{_fields()}\n")
        sys.exit(0)


def _fields() -> str:
    """The fields of a config with their defaults and what they mean, as absl lists flags."""
    lines = []
    for name, one in fields().items():
        lines.append(f"  --config.{name}={one.default!r}")
        lines += textwrap.wrap(one.doc, 80, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _with_config(argv: Sequence[str]) -> list[str]:
    """The arguments with the path of the config file that `--config` means."""
    found = list(argv)
    for i, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config") and equals:
            found[i] = f"{name}={config_files.find(value)}"
        elif name in ("--config", "-config") and i + 1 < len(found):
            found[i + 1] = config_files.find(found[i + 1])
    return found


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
        end(_sentence(str(error)))
    except OSError:
        end(
            f"--config: no config at {_config_file(argv)!r}; name a file, or one of "
            f"{', '.join(config_files.known())}."
        )
    except (ImportError, SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        end(f"--config: {_sentence(str(error.args[0] if error.args else error))}")
    raise AssertionError  # `end` does not return


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


def end(sentence: str) -> NoReturn:
    """Ends the process with a sentence and status 2."""
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(2)
