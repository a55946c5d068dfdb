"""The door to `dqe-jax train`; its code is in `cli/train.py`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import run

    run("train")
