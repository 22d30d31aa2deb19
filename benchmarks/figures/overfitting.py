"""Fig. 14: memorisation against the number of training images, k = 128.

python benchmarks/figures/overfitting.py                                  # seed 0, a few minutes on one core
python benchmarks/figures/overfitting.py --paper --device cuda
"""

from record import record

record("overfitting")
