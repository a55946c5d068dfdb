"""The door to all commands: `python -m dqe_jax` is `dqe-jax`."""

if __name__ == "__main__":
    from dqe_jax.cli.commands import main

    main()
