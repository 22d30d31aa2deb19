"""Fig. 6: variance of the outputs of untrained torchvision backbones on N(0, I), over that of the inputs.

python benchmarks/figures/contraction.py                           # seed 0, two minutes on one core
python benchmarks/figures/contraction.py --paper --device cuda     # 1,000 images of 224 pixels
"""

from record import record

record("contraction")
