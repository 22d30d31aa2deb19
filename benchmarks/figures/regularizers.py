"""Table 3: autoencoder variants on equal budgets: contraction, health, memorisation, OOD detection.

python benchmarks/figures/regularizers.py                                 # seed 0, a few minutes on one core
python benchmarks/figures/regularizers.py --option benchmark=cifar10-local --data-root DATA
"""

from record import record

record("regularizers")
