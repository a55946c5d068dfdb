"""The door to `dqe-jax benchmark mine`; its code is in `cli/benchmark_mine.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("benchmark mine", renamed=True)
