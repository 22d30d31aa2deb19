"""Figs 4, 7-9, 15 and 18: attractors of noise as a dictionary of images.

python benchmarks/figures/probe.py                                        # the bundled model, 5 minutes on one core
python benchmarks/figures/probe.py --option model=conv --option data=cifar10,fashion-mnist --data-root DATA \\
    --out results/figures/probe-conv-cifar10                              # an autoencoder of Table 4
python benchmarks/figures/probe.py --paper --device cuda --data-root DIR  # Stable Diffusion; DIR/LAION2B, …: folders
python benchmarks/figures/probe.py --paper --device cuda --data-root DIR --option model=sdxl-vae
"""

from record import record

record("probe")
