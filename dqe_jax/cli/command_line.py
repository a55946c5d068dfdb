"""What the commands share: quiet logs, and errors that end in one sentence and status 2."""

from __future__ import annotations

import functools
import itertools
import logging as python_logging
import math
import os
import pathlib
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from dqe_jax import __version__
from dqe_jax.cli import config_files
from dqe_jax.config import fields
from dqe_jax.data.made.settings import made_fields
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import is_of_disk, is_regular
from dqe_jax.utils.paths import look_anew
from dqe_jax.utils.quiet import OLD_NEWS, skip_absent_tpu

_Value = TypeVar("_Value")
_HINT = re.compile(r'Did you mean "(?P<near>\w+)" instead of "(?P<name>\w+)"')
_NAME_ALONE = re.compile(r"""[\\'"]*(?P<name>\w+)[\\'"]*""")
_MISSING = re.compile(r"Flag --(?P<name>\w+) must have a value other than None")
# Examples for the flags that commands require.
_EXAMPLES = {
    "config": "configs/shapes.py",
    "workdir": "runs/shapes",
    "output": "DIR",
    "dataset": "triplets",
    "raw_dir": "DIR",
    "source": "DIR",
    "topology": "v5e:2x4",
    "model": "runs/shapes",
    "images": "DIR",
    "table": "products.csv",
    "index": "DIR",
    "image": "FILE",
    "repo": "OWNER/NAME",
}
LONGEST_WORD, LONGEST_SENTENCE = 400, 1500  # characters of an error
_PARSING = "Error whilst parsing config file"


def run(module: ModuleType, argv: Sequence[str]) -> None:
    """Runs a command as `absl.app.run` does, with plain log lines and short errors.

    Args:
      module: of the command, see `commands.py`.
      argv: its name and its arguments.
    """

    def guarded(rest: Sequence[str]) -> None:
        log_plainly()
        look_anew()
        skip_absent_tpu()
        try:
            most = getattr(module, "ARGUMENTS", 0)  # that are no flags
            if len(rest) > 1 + most:
                raise UserError(f"unexpected argument {rest[1 + most]!r}: flags start with --.")
            module.main(rest)
        except UserError as error:
            end(str(error))

    _answer(module, argv)
    if getattr(module, "CONFIGS", False):
        argv = _named_configs(argv)
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
    """The arguments with the path of the config file that `--config` means; ends for a pipe."""
    found = list(argv)
    for i, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config") and equals:
            found[i] = f"{name}={config_files.find(value)}"
        elif name in ("--config", "-config") and i + 1 < len(found):
            found[i + 1] = config_files.find(found[i + 1])
    file = _config_file(found).partition(":")[0]
    if os.path.exists(file) and not is_regular(file):  # a pipe would be read for ever
        end(f"--config: {file} is no regular file; name a config file.")
    return found


def _named_configs(argv: Sequence[str]) -> list[str]:
    """The arguments with configs that are named before the flags as `--config` and `--and_config`.

    What is named behind them stays, and is refused as an argument that is not expected.
    """
    program, *words = argv
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    flags_of = ("config", *["and_config"] * (len(names) - 1))
    named = [f"--{flag}={name}" for flag, name in zip(flags_of, names)]
    return [program, *named, *words[len(names) :]]


def all_configs(first: ConfigDict, more: Sequence[str]) -> dict[str, ConfigDict]:
    """The configs of a command that takes several, by name; `--config.field=value` is for all.

    Args:
      first: the value of `--config`.
      more: names of the others.
    """
    found = {_label(config_flags.get_config_filename(flags.FLAGS["config"])): first}
    for name in more:
        value, own = config_files.find(name), flags.FlagValues()
        words = ["dqe-jax", f"--config={value}", *_overrides(sys.argv)]
        holder = config_flags.DEFINE_config_file(
            "config", None, "", lock_config=True, flag_values=own, sys_argv=words
        )
        try:
            own(words)
            holder.value.to_dict()  # a missing file is reported only when it is asked
        except (Exception, SystemExit) as error:  # a config file can raise anything
            end(_flag_sentence(error, value))
        found[_label(value)] = holder.value
    return found


def _overrides(argv: Sequence[str]) -> list[str]:
    """The words of `--config.field=value`, and of `--config.field value`."""
    found = []
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if re.match(r"--?(no)?config\.", word):
            found.append(word)
            if "=" not in word and following and not following.startswith("-"):
                found.append(following)
    return found


def _label(value: str) -> str:
    """`shapes:hard` for `configs/shapes.py:hard`."""
    path, colon, variants = value.partition(":")
    return f"{pathlib.Path(path).stem}{colon}{variants}"


def log_plainly() -> None:
    """Logs what dqe_jax says as plain lines, and of libraries the warnings: in notebooks too."""
    logging.use_absl_handler()
    logging.get_absl_handler().setFormatter(python_logging.Formatter("%(message)s"))
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_news)  # of the handler: for all libraries
    sys.unraisablehook = functools.partial(_tell_unraisable, sys.unraisablehook)
    warnings.filterwarnings("ignore", "coroutine '(async_serialize|Store)", RuntimeWarning)


def _tell_unraisable(
    tell: Callable[[sys.UnraisableHookArgs], object], told: sys.UnraisableHookArgs
) -> None:
    """Tells an error that nobody can catch, but not those of TensorStore after a failed save.

    It goes on writing when Orbax has closed the event loop that waited: with a traceback for each
    array, before the one sentence for all of them.
    """
    if not (told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"):
        tell(told)


def given(flag: flags.FlagHolder[_Value | None]) -> _Value:
    """The value of a flag that its command requires."""
    assert flag.value is not None, "`run` has marked it as required"
    return flag.value


def pairs_of(flag: str, values: Sequence[str]) -> dict[str, str]:
    """What a flag says that is given as NAME=VALUE, any number of times.

    Raises:
      UserError: a value is not of this form, or a name is given twice.
    """
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            raise UserError(f"--{flag}={value}: give it as NAME=VALUE.")
        if name in pairs:
            raise UserError(f"--{flag}={name}=... is given twice: give it once.")
        pairs[name] = rest
    return pairs


def use_data_dir(config: ConfigDict, data_dir: str | None) -> None:
    """Sets `config.data.data_dir`, and of triplets that were made their attributes and lexicon.

    Fields that the command line sets stay as they are.

    Args:
      config: of the command.
      data_dir: of its flag; None where it is not given.

    Raises:
      UserError: the directory says something that cannot be read.
    """
    if data_dir is not None:
        config.data.data_dir = data_dir
    if config.data.dataset != "triplets" or not config.data.data_dir:
        return
    for name, value in made_fields(config.data.data_dir).items():
        flag = f"config.{name}"
        if not (flag in flags.FLAGS and flags.FLAGS[flag].present):
            config.update_from_flattened_dict({name: value})


def default_workdir(*suffixes: str) -> str:
    """`runs/shapes-hard` for `--config=configs/shapes.py:hard`, and suffixes after it."""
    name, _, variants = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    parts = [pathlib.Path(name).stem, *variants.split(","), *suffixes]
    return "runs/" + "-".join(part for part in parts if part)


def _is_news(record: python_logging.LogRecord) -> bool:
    """Keeps dqe_jax's own lines, and the warnings of libraries but those of `OLD_NEWS`.

    What cannot be written is told once, by `training.faults`, not by each thread that writes.
    """
    error = record.exc_info[1] if record.exc_info else None
    if any(text in record.getMessage() for text in OLD_NEWS) or (error and is_of_disk(error)):
        return False
    own = (record.pathname or "").startswith(os.path.dirname(os.path.dirname(__file__)))
    return own or record.levelno >= python_logging.WARNING


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags; a config file that fails to load, however, ends in one sentence too."""
    try:
        rest = flags.FLAGS(list(argv))
        _check_numbers()
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            config: Any = flags.FLAGS["config"].value
            if hasattr(config, "to_dict"):  # a missing file is reported only when it is asked
                config.to_dict()
            else:
                raise TypeError(f"get_config() gives {type(config).__name__}, not a ConfigDict")
        return rest
    except (Exception, SystemExit) as error:  # a config file can raise anything
        end(_flag_sentence(error, _config_file(argv)))


def _check_numbers() -> None:
    """Raises an error for a flag that is not a number: no limit of absl refuses nan."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and math.isnan(value):
            raise flags.Error(f"--{name}=nan: give a number.")


def _flag_sentence(error: BaseException, value: str) -> str:
    """What went wrong while flags were parsed, `value` of `--config` among them."""
    file, origin = value.partition(":")[0], _raised_in(error, value.partition(":")[0])
    if isinstance(error, flags.Error) and (missing := _MISSING.search(str(error))):
        name = missing["name"]
        if name == "config" and value:
            return f"--config: get_config() of {file} gives None, not a ConfigDict."
        return f"--{name} must be given, such as --{name}={_EXAMPLES.get(name, 'VALUE')}."
    if isinstance(error, flags.Error) and (origin is None or _PARSING in str(error)):
        return _sentence(str(error))
    if isinstance(error, OSError) and not os.path.exists(file):
        return (
            f"--config: no config at {value!r}; name a file, or one of "
            f"{', '.join(config_files.known())}."
        )
    if origin is None and "'get_config'" in str(error):
        return f"--config: {file} has no get_config(), which must give a ConfigDict."
    fields = (AttributeError, KeyError, TypeError, ValueError)  # of a field that is not there
    if isinstance(error, fields) and origin is None:
        return f"--config: {_sentence(str(error.args[0] if error.args else error))}"
    origin = origin or error
    # If the config itself does not find a file, the library says so below its heading.
    said = str(origin).splitlines()[-1].strip() if isinstance(error, OSError) else reason_of(origin)
    kind = type(origin).__name__
    return f"--config: {file} fails ({kind if said in ('', kind) else f'{kind}: {said}'})."


def _raised_in(error: BaseException | None, file: str) -> BaseException | None:
    """The error that the code of a file raised, or what that called; None if it raised none."""
    while error is not None:
        codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        if any(os.path.abspath(code.co_filename) == os.path.abspath(file) for code in codes):
            return error
        error = error.__cause__ or error.__context__
    return None


def _config_file(argv: Sequence[str]) -> str:
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if argument in ("--config", "-config"):
            return following
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
    head, failed, _ = lines[0].partition(_PARSING)
    # The message then ends in the last line of a traceback: "ValueError: what is wrong".
    return head + (lines[-1].partition(": ")[2] or lines[-1]) if failed else lines[0]


def end(sentence: str) -> NoReturn:
    """Ends the process with a sentence and status 2."""
    sys.stderr.write(f"error: {_readable(sentence)}\n")
    sys.exit(2)


def _readable(sentence: str) -> str:
    """A sentence of a length that a person reads: files may hold words of a million letters."""
    words = [
        f"{word[:80]}...{word[-20:]}" if len(word) > LONGEST_WORD else word
        for word in sentence.split(" ")
    ]
    short = " ".join(words)
    if len(short) <= LONGEST_SENTENCE:
        return short
    return f"{short[: LONGEST_SENTENCE - 200]} ... {short[-150:]}"
