"""The door to `dqe-jax prepare`; its code is in `cli/prepare.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("prepare")
