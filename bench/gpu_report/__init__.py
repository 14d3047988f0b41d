"""Everything that needs a GPU, unattended: `python -m bench.gpu_report`."""
