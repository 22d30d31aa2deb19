"""Training of autoencoders, classifiers and surrogates with one training loop."""
