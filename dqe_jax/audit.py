"""The door to `dqe-jax audit`; its code is in `cli/audit.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("audit")
