"""The door to `dqe-jax export`; its code is in `cli/export.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("export")
