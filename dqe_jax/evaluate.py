"""The door to `dqe-jax evaluate`; its code is in `cli/evaluate.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("evaluate")
