"""The door to `dqe-jax benchmark step`; its code is in `cli/benchmark_step.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("benchmark step", renamed=True)
