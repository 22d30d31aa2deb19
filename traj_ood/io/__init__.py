"""Files: weights and checkpoints, atomic and sealed writes, part files, bounded JSON and YAML, provenance."""
