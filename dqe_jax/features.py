"""The door to `dqe-jax features`; its code is in `cli/features.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("features")
