"""A model of a GPU's time, which predicts what a step takes on GPUs that nobody has measured yet."""
