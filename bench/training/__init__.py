"""Trainings of the same tasks by several optimizers: what runs there are, one run, all of them, and what they say."""
