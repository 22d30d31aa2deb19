"""Prop. A.9, Figs 11 and 12: steps predicted from the Jacobian at the attractor against steps measured.

python benchmarks/figures/convergence.py                           # the bundled model, seed 0, two minutes on one core
python benchmarks/figures/convergence.py -o model=conv -o data=fashion-mnist --out results/figures/convergence-conv
python benchmarks/figures/convergence.py -o model=conv -o data=mnist -o images=500 --out …   # Fig. 11, ten epochs
python benchmarks/figures/convergence.py --paper --device cuda     # MNIST, 500 epochs of 60,000 images
"""

from record import record

record("convergence")
