"""Fig. 3b-d and Fig. 13 (right): memorisation, attractors and trajectories across training.

python benchmarks/figures/training.py                                     # seed 0, a few minutes on one core
python benchmarks/figures/training.py --paper --device cuda               # MNIST, 500 epochs of 60,000 images
"""

from record import record

record("training")
