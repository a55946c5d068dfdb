"""Will it fit, and how fast is it: plans for TPU slices and benchmarks."""
