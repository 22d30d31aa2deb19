"""Figs 16 and 17: residuals and norms over 300 steps of encoders with decoders and of language models.

python benchmarks/figures/dynamics.py                                     # the bundled model; the others random, small
python benchmarks/figures/dynamics.py --paper --device cuda --data-root DIR  # DIR/ImageNet1k, DIR/pile.jsonl
"""

from record import record

record("dynamics")
