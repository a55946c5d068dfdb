"""Small helpers that know nothing of the rest of dqe_jax."""
