"""The door to `dqe-jax describe`; its code is in `cli/describe.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("describe")
