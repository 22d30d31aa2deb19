"""Models from data: the training loop, and what is trained with it."""
