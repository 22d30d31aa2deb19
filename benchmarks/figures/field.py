"""Figs 1 and 3a: latent vector fields in the plane, across training and initialisations.

python benchmarks/figures/field.py                                 # seed 0, two to four minutes on one core
python benchmarks/figures/field.py -o reach=8                      # the box of Fig. 1
python benchmarks/figures/field.py --paper --device cuda           # MNIST, 500 epochs of 60,000 images, 3 models
"""

from record import record

record("field")
