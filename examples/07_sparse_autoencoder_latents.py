# %% [markdown]
# # Latents of sparse autoencoders: explaining by them, and when the gradient should choose them
#
# Two small worlds whose directions are known. In both a model reads four quiet "whispers" out of activations that are
# mostly loud directions it ignores. With four latents per token, a TopK autoencoder keeps what is large; a g-SAE keeps
# what moves the loss. In the first world that helps; in the second it hurts. Then a score is explained by latents.

# %%
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import pullback as pb
from pullback.steering.sae import (
    Latents,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    TrainingConfig,
    circuit_curve,
    evaluate_sae,
    latent_effects,
    train_sae,
)

torch.set_num_threads(1)
warnings.simplefilter("ignore")  # what they say is printed below
WIDTH, LOUD, K = 32, 28, 4


class World(nn.Module):
    """Logits from whispers: through a gate that only opens where one is on, or linearly."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        draw = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)).Q.float()
        self.loud, self.whispers = basis[:LOUD], basis[LOUD:]
        self.readout = 6 * torch.randn(WIDTH, 4, generator=draw)
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        heard = self.site(x) @ self.whispers.T
        return (torch.relu(heard - 0.175) if self.gated else heard) @ self.readout.T

    @torch.no_grad()
    def batch(self, count: int, seed: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        lots = torch.rand(count, LOUD, generator=draw)
        active = lots.argsort(1).argsort(1) < K if self.gated else lots < K / LOUD
        on = torch.rand(count, 4, generator=draw) < 0.25
        quiet = (0.5 if self.gated else 0.6) * (0.75 + 0.5 * torch.rand(count, 4, generator=draw))
        x = (active * (1 + torch.rand(count, LOUD, generator=draw))) @ self.loud + (
            on * quiet
        ) @ self.whispers
        return {"x": x, "labels": torch.multinomial(self(x).softmax(-1), 1, generator=draw)[:, 0]}


def trained(world: World, selection: str, beta: float) -> SparseAutoencoder:
    config = TrainingConfig(
        SparseAutoencoderConfig(WIDTH, 64, K, selection=selection, beta=beta, auxiliary_weight=0.0),
        tokens=2000 * 256, batch_tokens=256, learning_rate=3e-3, skip_positions=(), log_every=2000, tensorboard=False,
    )  # fmt: skip
    return train_sae(world, "site", [world.batch(4096, seed) for seed in range(120)], config).sae


# %% [markdown]
# Loss recovered (against the mean in place of the activations) and FVU on new tokens. A g-SAE is judged with labels
# drawn afresh, so that its choice cannot peek at the answer, and without gradients, as one would use it for free.

# %%
found, lines = {}, []
for gated, beta in ((True, 10.0), (False, 30.0)):
    world = World(gated).eval()
    test = [world.batch(8192, 10_000)]
    for selection in ("topk", "gradient"):
        autoencoder = trained(world, selection, beta)
        evaluation = evaluate_sae(world, "site", test, autoencoder, skip_positions=())
        for way, each in evaluation.selections.items():
            found[gated, selection, way] = each
            name = f"{'gated' if gated else 'linear'} readout, {selection}, {way}"
            lines.append(f"{name:42} loss recovered {each.ce_score_mean:6.3f}   FVU {each.fvu:.3f}")
            print(lines[-1])
        if gated and selection == "gradient":
            kept, kept_world = autoencoder, world

fresh, free = found[True, "gradient", "fresh label"], found[True, "gradient", "gradient-free"]
plain = found[True, "topk", "gradient-free"]
assert fresh.ce_score_mean > plain.ce_score_mean + 0.3  # where a gate makes the gradient sparse, it helps ...
assert fresh.fvu > plain.fvu  # ... for a worse reconstruction ...
assert free.ce_score_mean < fresh.ce_score_mean - 0.3  # ... and only while gradients choose
# with slots to spare and a gradient along whispers that are off, TopK is better
assert (
    found[False, "topk", "gradient-free"].ce_score_mean
    > found[False, "gradient", "fresh label"].ce_score_mean
)

# %% [markdown]
# Any method explains a score by latents: they are a site. What no latent and no error has is the decoder's bias.

# %%
x = kept_world.batch(64, 20_000)["x"]
loud_and_quiet = x[(x @ kept_world.whispers.T > 0.3).any(1)]
gradient = pb.explain(kept_world, loud_and_quiet, site="site", method="gradient")
latents = Latents(kept, "all", gradient=gradient.values).at("site")
shares = pb.explain(kept_world, loud_and_quiet, site=latents, method="input_x_gradient")
bias = (gradient.values * kept.decoder_bias).sum(1)
total = shares.values.sum(1) + bias
assert torch.allclose(total, (gradient.values * loud_and_quiet).sum(1), rtol=1e-3, atol=1e-3)
strongest = shares.values[:, :64].abs().sum(0).argsort(descending=True)[:4]
likeness = (kept.decoder[strongest] @ kept_world.whispers.T).abs().amax(1)
print("the four strongest latents point along whispers:", [round(value, 2) for value in likeness.tolist()])
assert likeness.min() > 0.6

# %% [markdown]
# The circuit of a behaviour: latents ranked by their effect, then kept alone (faithfulness) or left out
# (completeness). Without gradients this autoencoder does not select whispers, so that they are left to the error: the
# error node is the circuit, which is what collapsed inference looks like from inside.

# %%
sequence = x[:32].unsqueeze(1)
model = nn.Sequential(kept_world)
metric = lambda output: output.amax(-1).squeeze(1)  # noqa: E731
complete = latent_effects(
    model, sequence, sequence.roll(1, 0), metric, {"0.site": kept}, "atp", selection="topk"
)
sizes = [0, 1, 4, 16, 65]
curve = circuit_curve(
    model, sequence, sequence, metric, {"0.site": kept}, complete, sizes, ablation="mean", selection="topk"
)
for size, inside, outside in zip(sizes, curve.faithfulness, curve.completeness, strict=True):
    lines.append(f"{size:3} nodes: faithfulness {inside:6.3f}, without them {outside:6.3f}")
    print(lines[-1])
assert abs(curve.faithfulness[-1] - 1) < 1e-3
assert abs(curve.completeness[-1]) < 1e-3
strongest_node = complete.ranked(1)[0]
print("first node:", strongest_node)
assert strongest_node.latent is None
Path("latents.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
