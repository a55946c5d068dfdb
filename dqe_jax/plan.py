"""The door to `dqe-jax plan`; its code is in `cli/plan.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("plan")
