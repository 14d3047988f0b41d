"""Benchmarks of agr_cuda's optimizers beside their peers: `python -m bench --help`."""
