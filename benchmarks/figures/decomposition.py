"""Prop. 3.2: test error against prototype and coverage error, and how often the bound holds, as stated and corrected.

python benchmarks/figures/decomposition.py                         # the bundled model, seed 0, one to two minutes
python benchmarks/figures/decomposition.py -o model=conv -o data=fashion-mnist --out results/figures/decomposition-conv
python benchmarks/figures/decomposition.py --paper --device cuda   # MNIST, 500 epochs of 60,000 images
"""

from record import record

record("decomposition")
