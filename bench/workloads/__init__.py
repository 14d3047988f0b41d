"""What is measured: the models' shapes, their tensors, and the optimizers that take turns on them."""
