"""The commands of `dqe-jax`: a file parses the flags of one and calls the function that does it."""
