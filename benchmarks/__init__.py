"""Measuring the operators and models against the best plain PyTorch offers. ``python -m benchmarks`` runs it all."""
