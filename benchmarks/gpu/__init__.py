"""The stages of ``make gpu-check``, each a program of its own; benchmarks/gpu_check.py runs them."""
