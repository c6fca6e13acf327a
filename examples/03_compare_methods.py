# %% [markdown]
# # Several methods on one problem
#
# Half of every BlockMNIST image is a box that says nothing about the class. How much of each map lands there? One
# `compare`, which shares the clean pass and whatever the methods have in common; one page that shows the maps.

# %%
import torch
from torch import nn

import pullback as pb
from pullback.datasets import block_mnist
from pullback.evaluation import leakage
from pullback.viz import Attributions, Prose, Table, write_report

torch.manual_seed(0)
train, test = block_mnist(classes=range(10)), block_mnist(split="test", classes=range(10))
net = nn.Sequential(nn.Flatten(), nn.Linear(56 * 28, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
for _ in range(6):
    for rows in torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
accuracy = (net(test.x).argmax(1) == test.y).float().mean().item()
print(f"{accuracy:.1%} of {len(test)} test images are right")

# %%
images = test[:200]
methods = {
    "gradient": pb.Gradient(),
    "input × gradient": "inputxgradient",
    "integrated gradients": pb.IntegratedGradients(tol=0.05),
    "SmoothGrad": pb.SmoothGrad(samples=20),
    "smoothed integrated gradients": "smoothgrad(ig(steps=8), samples=10)",
    "random": pb.RandomAttribution(),
}
found = pb.compare(net, images.x, methods)
assert torch.equal(found["gradient"].values, pb.explain(net, images.x, method="gradient").values)

# %% [markdown]
# The share of the ten per cent strongest pixels that lie on the box; 0.5 is chance, which the random control shows.
# What methods share is counted for the first of them only: input × gradient reuses the gradient above it.

# %%
rows = []
for name, attribution in found.items():
    leaked = leakage(net, images.x, attribution.values, signal_mask=images.signal_mask)
    share = float(leaked.details["null_share@0.1"].mean())
    evaluations = float(attribution.diagnostics["evaluations"].float().mean())
    rows.append((name, share, evaluations))
    print(f"{name:<32}{share:.3f} on the box, {evaluations:5.1f} new gradients per image")

# %%
write_report(
    "methods.html",
    [
        Prose(f"A net with one hidden layer; {accuracy:.1%} of the test images are right."),
        Table(
            "Where the strongest pixels lie", ("method", "share on the box", "new gradients per image"), rows
        ),
        Attributions("The first images", found, examples=4),
    ],
    title="Methods on BlockMNIST",
)
print("wrote methods.html")
