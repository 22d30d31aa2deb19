"""Reading and writing files: tensors with a digest, weights, sealed folders, part stores, JSON, YAML, provenance."""
