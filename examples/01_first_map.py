# %% [markdown]
# # A first map
#
# Train a small convolutional net on the digits that come with the package, explain it, look, save, load.
# About ten seconds on one core.

# %%
import torch
from torch import nn

import pullback as pb
from pullback.datasets import mnist

torch.manual_seed(0)
train, test = mnist(split="train"), mnist(split="test")
net = nn.Sequential(
    nn.Conv2d(1, 8, 5, stride=2),
    nn.ReLU(),
    nn.Conv2d(8, 16, 3, stride=2),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(400, 10),
)
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for _ in range(4):
    for rows in torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train.x[rows]), train.y[rows]).backward()
        optimizer.step()
accuracy = (net(test.x).argmax(1) == test.y).float().mean().item()
print(f"{accuracy:.1%} of {len(test)} test digits are right")

# %% [markdown]
# The method "auto" is integrated gradients with as many steps as a relative error of 5 % takes. The result prints
# what was explained and how far to trust it.

# %%
a = pb.explain(net, test.x[:8])
print(a)
print("estimated error of each map:", [round(error, 3) for error in a.diagnostics["error"].tolist()])
assert bool(a.diagnostics["converged"].all())

# %% [markdown]
# Values are signed and in units of the score: red speaks for the class, blue against it. Where a map adds up,
# the sum of its values is the score minus the score of the baseline, here a black image.

# %%
black = net(torch.zeros_like(test.x[:8])).detach().gather(1, a.target[:, None])[:, 0]
for number in range(3):
    change = float(a.score[number] - black[number])
    print(
        f"digit {number}: values sum to {float(a.values[number].sum()):.3f}, the score changed by {change:.3f}"
    )

# %%
axes = a.plot(example=0)
axes.set_title(f"why {a.labels[0]}?")
axes.figure.savefig("first_map.png")

# %% [markdown]
# Another question: why this digit rather than the next best class? A target is any function of the output that gives
# one number per row; these two are ready-made.

# %%
rather = pb.explain(net, test.x[:8], target=pb.Margin(a.target))
sure = pb.explain(net, test.x[:8], target=pb.Probability(a.target))
print(rather.labels[0], "|", sure.labels[0])

# %% [markdown]
# One safetensors file holds values, point, target, method and diagnostics; one HTML file shows them offline.

# %%
a.save("first_map.safetensors")
again = pb.load("first_map.safetensors")
assert torch.equal(again.values, a.values)
assert again.method == a.method
a.to_html("first_map.html")
print("wrote first_map.png, first_map.safetensors and first_map.html")
