"""The picture of README: images as trajectories in the latent plane of a small autoencoder (docs/trajectories.png).

A convolutional autoencoder with two latent units (Table 4 of the paper, d = 16) is trained for ten epochs on the seven
ID classes of ``fashion``; then f(z) = E(D(z)) is repeated from images that it has not seen. It is an illustration: two
units are too few for any score worth having, and no number of README comes from here.

    python benchmarks/trajectory_picture.py             # two minutes on one core
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from traj_ood.analysis import Workspace
from traj_ood.analysis.field import plane, settled_ends, vector_field
from traj_ood.analysis.images import sample, stack
from traj_ood.analysis.models import paper_recipe, train_conv
from traj_ood.autoencoders import ConvAutoencoder
from traj_ood.data import load_benchmark
from traj_ood.drawing.style import INKS, Frame, canvas, save_figure
from traj_ood.index import greedy_leaders

EPOCHS, TRAIN, SHOWN, SEED = 10, 5_000, 400, 0
OOD = {"noise": 1, "textures": 2, "faces": 1, "bag": 1}  # sets of `fashion`, and how many of their images are shown
ID_SHOWN = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/trajectories.png"))
    parser.add_argument("--work", type=Path, default=Path("runs/trajectory-picture"))
    chosen = parser.parse_args()
    bench = load_benchmark("fashion")
    train = sample(bench.train.images, TRAIN, SEED, "train")
    trained = train_conv(
        Workspace(chosen.work, torch.device("cpu")),
        "plane",
        train,
        (1, 32, 32),
        paper_recipe(EPOCHS),
        width=16,
        bottleneck=2,
        seed=SEED,
    )
    model = trained.final
    model.chunk = 24
    known = sample(bench.test.images, SHOWN, SEED, "test")
    images = {"ID": stack(model.transform, known)}
    images |= {s.name: stack(model.transform, sample(s.images, 60, SEED, s.name)) for s in bench.ood if s.name in OOD}
    draw(model, images, chosen.out)
    print(f"Written to {chosen.out}")


def draw(model: ConvAutoencoder, images: dict[str, Tensor], out: Path) -> None:
    """The field, the trajectories of a few images of each kind, and the attractors, decoded."""
    codes = {name: model.encode(batch) for name, batch in images.items()}
    every = torch.cat(list(codes.values())).double()
    low, high = (torch.quantile(every, share, dim=0) for share in (0.01, 0.99))
    low, high = low - torch.tensor([0.18, 0.36]) * (high - low), high + 0.18 * (high - low)
    grid = plane(low, high, 41).float()
    arrows = vector_field(model.self_map, grid, model.chunk)
    diagonal = float((high - low).norm())
    starts = torch.cat([plane(low, high, 8).float(), codes["ID"][:60]])
    ends = settled_ends(model.self_map, starts, diagonal, 1e-6, 400, model.chunk)
    spots = ends[greedy_leaders(ends.double(), 0.01 * diagonal)[0]]
    legend = {
        "ID image (unseen garment)": {"color": INKS["id"], "linewidth": 1.8},
        "OOD image": {"color": INKS["near"], "linewidth": 1.8},
        "attractor of f, decoded": {"color": INKS["gold"], "marker": "*", "markersize": 11, "linestyle": ""},
    }
    figure, (axis,) = canvas(Frame(8.4, 4.7, (0.05, 0.05, 0.05, 0.05)), legend=legend)
    x, y = (grid[:, k].reshape(41, 41).double().numpy() for k in range(2))
    u, v = (arrows[:, k].reshape(41, 41).double().numpy() for k in range(2))
    axis.streamplot(x[0], y[:, 0], u, v, color=INKS["rule"], linewidth=0.9, density=1.5, arrowsize=0.8, zorder=0)
    for name, count in {"ID": ID_SHOWN, **OOD}.items():
        ink = "id" if name == "ID" else "near"
        for row in spread(codes[name], count):
            trajectory(axis, model, codes[name][row], INKS[ink])
            picture(axis, images[name][row], codes[name][row], INKS[ink], model)
    axis.plot(*spots.double().numpy().T, "*", color=INKS["gold"], markersize=17, markeredgecolor="white", zorder=5)
    for spot in spots:
        picture(axis, model.decode(spot[None])[0], spot, INKS["gold"], model, offset=(0.0, -27.0))
    axis.set(xlim=(float(low[0]), float(high[0])), ylim=(float(low[1]), float(high[1])), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    save_figure(figure, out)


def spread(codes: Tensor, count: int) -> list[int]:
    """Rows of ``count`` codes that lie far from each other: the first is that farthest from the middle."""
    middle = codes.double().median(dim=0).values
    inside = (codes.double() - middle).norm(dim=1)
    order = [int(inside.argsort()[int(0.9 * len(codes))])]
    while len(order) < count:
        distances = torch.cdist(codes.double(), codes[order].double()).amin(dim=1)
        distances[inside > torch.quantile(inside, 0.97)] = -1
        order.append(int(distances.argmax()))
    return order


def trajectory(axis: Axes, model: ConvAutoencoder, start: Tensor, colour: str) -> None:
    """z_0, z_1, … until it settles, with a disc at each of the first steps."""
    points = [start[None]]
    with torch.inference_mode():
        for _ in range(60):
            points.append(model.self_map(points[-1]))
    path = torch.cat(points).double().numpy()
    axis.plot(*path.T, "-", color=colour, linewidth=1.8, zorder=3)
    axis.plot(*path[1:12].T, "o", color=colour, markersize=2.6, zorder=3)


def picture(
    axis: Axes, image: Tensor, place: Tensor, colour: str, model: ConvAutoencoder, offset: tuple[float, float] = (0, 0)
) -> None:
    """A thumbnail (C, H, W) in the model's units at a place of the plane, in a frame of a colour."""
    mean, std = model.preprocessing.mean, model.preprocessing.std
    pixels = np.clip(image.detach().double().numpy()[0] * std[0] + mean[0], 0, 1)
    box = OffsetImage(pixels, zoom=0.8, cmap="gray", norm=None, clim=(0, 1))
    note = AnnotationBbox(
        box,
        tuple(map(float, place)),
        xybox=offset,
        boxcoords="offset points",
        pad=0.12,
        bboxprops={"edgecolor": colour, "linewidth": 1.6, "boxstyle": "square,pad=0.08"},
        zorder=4,
    )
    axis.add_artist(note)


if __name__ == "__main__":
    main()
