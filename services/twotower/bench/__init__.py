"""Benchmarks: what `twotower bench` measures. Ratios are taken within one run, since machines are noisy."""
