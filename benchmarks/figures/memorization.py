"""Figs 2 and 13 (left): memorisation, test error and rank over the bottleneck k.

python benchmarks/figures/memorization.py                                 # seed 0, a few minutes on one core
python benchmarks/figures/memorization.py -o data=cifar10 --data-root DATA --out results/figures/memorization-cifar10
python benchmarks/figures/memorization.py --paper --device cuda           # 500 epochs of 60,000 images, 9 models
"""

from record import record

record("memorization")
