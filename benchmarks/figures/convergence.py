"""Prop. A.9, Figs 11 and 12: steps predicted from the Jacobian at the attractor against steps measured.

python benchmarks/figures/convergence.py                           # the bundled model, seed 0, two minutes on one core
python benchmarks/figures/convergence.py -o model=conv -o data=fashion-mnist --out results/figures/convergence-conv
python benchmarks/figures/convergence.py -o model=conv -o data=mnist -o images=500 --out …   # Fig. 11, ten epochs
python benchmarks/figures/convergence.py --paper --device cuda     # MNIST, 500 epochs of 60,000 images

Fig. 12 on the paper's model needs its weights (from the hub, or a local folder) and a folder of ImageNet's images, here
ROOT/ImageNet1k; ``-o data=imagenet-paper`` takes the training images of OpenOOD's data folder instead. Curves alone
(predict=false), at the paper's tolerance and limit for this model (App. D):

python benchmarks/figures/convergence.py -o model=facebook/vit-mae-base -o data=ImageNet1k -o images=2000 \\
    -o predict=false -o curve_tol=1e-5 -o curve_steps=500 --data-root ROOT --device cuda \\
    --out results/figures/convergence-vit-mae-base
"""

from record import record

record("convergence")
