"""Embeds, ranks and measures: the protocols of the benchmarks, reports and submissions."""
