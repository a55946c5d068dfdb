"""Small runs that several test files train: a config of seconds, and compilation once."""

import contextlib
import importlib
import sys

import jax
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from configs import shapes
from dqe_jax.config import RunConfig


def small_config(prepared_dir, **changes):
    """The smoke config made smaller, as a user's file gives it; `changes` by dotted name."""
    config = shapes.get_config("smoke")
    config.data.prepared_dir = str(prepared_dir)
    config.num_devices = 2
    config.batch.queries_per_reference = 2
    config.model.tiny.image_depth = config.model.tiny.text_depth = 0
    config.update_from_flattened_dict(changes)
    return config


def run_config(prepared_dir, **changes):
    """`small_config` as what is inside a job."""
    return RunConfig.of(small_config(prepared_dir, **changes))


@contextlib.contextmanager
def compiled_once(directory):
    """Compiles quickly, and lets runs of one shape share their programs through `directory`."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def import_binary(name):
    """A command's module with its flags, in place of those of other commands, which share names."""
    for module, own in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("dqe_jax."):
            for flag in list(own):  # delattr takes from `own`
                if flag.name in flags.FLAGS:
                    delattr(flags.FLAGS, flag.name)
    sys.modules.pop(f"dqe_jax.cli.{name}", None)
    return importlib.import_module(f"dqe_jax.cli.{name}")
