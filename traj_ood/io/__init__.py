"""Files: tensors with a digest, weights, atomic and sealed writes, part stores, bounded JSON and YAML, provenance."""
