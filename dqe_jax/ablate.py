"""The door to `dqe-jax ablate`; its code is in `cli/ablate.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("ablate")
