"""The door to `dqe-jax convert`; its code is in `cli/convert.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("convert")
