"""DQE-CIR in JAX: composed image retrieval with attribute weights and target-relative negatives."""

__version__ = "0.2.0"
