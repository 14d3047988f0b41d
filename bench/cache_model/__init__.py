"""A model of a GPU's second-level cache, which predicts what DRAM moves for a schedule."""
