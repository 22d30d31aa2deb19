"""Theorem 1 where the truth is known: angle between the vector field and the score, for mixtures of Gaussians.

python benchmarks/figures/score-field.py                           # seed 0, one and a half minutes on one core
python benchmarks/figures/score-field.py -o steps=40000            # less learning error at small noise
"""

from record import record

record("score-field")
