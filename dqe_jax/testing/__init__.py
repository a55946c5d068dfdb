"""What tests of dqe_jax and of code that uses it share; nothing else of dqe_jax imports it.

-   `shapes`: checks the shapes and dtypes of signatures while tests run.
-   `small_runs`: configs whose runs take seconds, programs compiled once, and when two runs agree.
-   `standins`: made copies of the benchmarks, and photos in place of the published ones.
-   `small_models`: a model of a few thousand parameters over each backbone.
-   `torch_models`: the same of `transformers`, and what PyTorch computes with them.
"""
