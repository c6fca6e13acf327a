"""Draws docs/images/block_mnist.png with the package itself: two nets, one BlockMNIST digit, five methods.

Run it from the repository root: python docs/images/block_mnist.py (about half a minute on one core).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure

import pullback as pb
from pullback.demo import trained_network
from pullback.evaluation import PGD
from pullback.viz import heat_map

METHODS = {
    "gradient": pb.Gradient(),
    "SmoothGrad": pb.SmoothGrad(),
    "input × gradient": pb.InputXGradient(),
    "integrated gradients": pb.IntegratedGradients(tol=0.05),
    "DeepLift (captum)": pb.Captum("DeepLift"),
}
NETS = {"standard net": None, "robust net": PGD("l2", radius=2.0)}
EXAMPLE = 2


def main() -> None:
    figure = Figure(figsize=(7.2, 5.0), dpi=110, layout="constrained")
    axes = figure.subplots(len(NETS), 1 + len(METHODS))
    for row, (name, attack) in zip(axes, NETS.items(), strict=True):
        data, trained = trained_network(seed=0, images=10, train_images=None, attack=attack)
        image = data.x[EXAMPLE : EXAMPLE + 1]
        found = pb.compare(trained.model, image, METHODS, target=int(data.y[EXAMPLE]))
        row[0].imshow(image[0, 0], cmap="gray", interpolation="nearest")
        row[0].set_title("image", fontsize=8)
        row[0].set_xticks([])
        row[0].set_yticks([])
        row[0].set_ylabel(f"{name}, {trained.accuracy:.1%} right", fontsize=9)
        for ax, (method, attribution) in zip(row[1:], found.items(), strict=True):
            heat_map(attribution.values[0], ax, signed=True)
            ax.set_title(method, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
