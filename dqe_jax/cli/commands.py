"""`dqe-jax COMMAND`: the list of commands, and how one is started.

A command is a module of this package with `main(argv)` and `REQUIRED`, the flags that must be
given. It is imported only when it is called: several of them define flags of the same name.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from dqe_jax import __version__
from dqe_jax.cli import command_line

# Command -> the module that it runs, and what it does.
COMMANDS = {
    "train": ("train", "Trains a model by a config, and evaluates it."),
    "evaluate": ("evaluate", "Evaluates a checkpoint, a run that still trains, or another model."),
    "compare": ("compare", "Compares models on one benchmark, query by query, with intervals."),
    "prepare": ("prepare", "Prepares a benchmark or your own triplets from raw files."),
    "triplets": (
        "triplets",
        "Makes triplets without labels, from attributes or captions in a table.",
    ),
    "features": ("features", "Computes what frozen towers make of a data set; lists, deletes it."),
    "index": ("index", "Indexes a folder of images for search with a trained model."),
    "search": ("search", "Searches an index for what fits an image and a text."),
    "serve": ("serve", "Serves a page and a REST interface for search; alone, a demonstration."),
    "audit": ("audit", "Measures which share of the mined negatives is truly relevant."),
    "simulate": ("simulate", "Measures what a simulated user finds in three turns of a search."),
    "sliders": ("sliders", "Measures attribute weights, and what moving one by hand does."),
    "ablate": ("ablate", "Trains the variants of a config over seeds and compares them."),
    "plan": ("plan", "Says what a config needs on TPUs or GPUs, without having them."),
    "benchmark step": ("benchmark_step", "Times the training step of configs, beside PyTorch too."),
    "benchmark data": ("benchmark_data", "Times the way of images to the devices."),
    "benchmark features": ("benchmark_features", "Times how fast frozen towers are computed."),
    "benchmark mine": ("benchmark_mine", "Times the mining of negatives from a bank."),
    "benchmark evaluate": ("benchmark_evaluate", "Times the ranking of an evaluation."),
    "benchmark serve": ("benchmark_serve", "Times searches of a server under load."),
    "convert": ("convert", "Converts pretrained weights to a directory that a config can name."),
    "export": ("export", "Exports a model to files that need no run, for search or PyTorch."),
    "push": ("push", "Puts a model on the Hugging Face hub, with a card."),
    "describe": ("describe", "Prints the parameters and the cost of a config's model."),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that the first words of the arguments name.

    Args:
      argv: the arguments without the program's name; default: those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("--help", "-h", "-help", "help"):
        sys.stdout.write(_overview())
        return
    if words[0] in ("--version", "version"):
        sys.stdout.write(command_line.version_line())
        return
    found = [name for name in COMMANDS if name.split() == words[: len(name.split())]]
    if found:
        run(found[0], words[len(found[0].split()) :])
        return
    group = [name for name in COMMANDS if name.split()[0] == words[0]]
    if group and (len(words) == 1 or words[1] in ("--help", "-h", "-help")):
        sys.stdout.write(_overview(words[0]))
        return
    wanted = " ".join(words[:2]) if group else words[0]
    near = difflib.get_close_matches(wanted, COMMANDS, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}."
    command_line.end(f"there is no command {wanted!r}; {hint}")


def run(name: str, arguments: Sequence[str] | None = None, *, renamed: bool = False) -> None:
    """Runs a command and ends the process.

    Args:
      name: of `COMMANDS`.
      arguments: its flags; default: those of the process.
      renamed: whether it is called by a module that has an older name, which is told then.
    """
    module = importlib.import_module(f"dqe_jax.cli.{COMMANDS[name][0]}")
    if renamed:
        sys.stderr.write(f"This is `dqe-jax {name}` now; this name stays.\n")
    words = list(sys.argv[1:] if arguments is None else arguments)
    command_line.run(module, [f"dqe-jax {name}", *words])


def _overview(group: str = "") -> str:
    """The list of commands, all of them or those of a group."""
    known = {name: does for name, (_, does) in COMMANDS.items() if name.startswith(group)}
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {does}" for name, does in known.items()]
    return "\n".join(
        [
            f"dqe_jax {__version__}: composed image retrieval in JAX.",
            "",
            f"Usage: dqe-jax {group + ' ' if group else ''}COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            "`dqe-jax COMMAND --help` lists the flags of a command.",
            "",
        ]
    )
