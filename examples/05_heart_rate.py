# %% [markdown]
# # Does a heart-rate net read the heart rate?
#
# A regressor learns the rate from made-up pulse waves: pulses with overtones, a wandering baseline, noise. It is then
# asked about real ones (embedded in the package). In the frequency domain its attribution has to lie at the rate of
# the heart; in the time domain there is no such place. Twenty seconds on one core.

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.datasets import ppg
from pullback.evaluation import deletion, insertion

RATE, SECONDS = 32.0, 8.0
LENGTH = int(RATE * SECONDS)
MIDDLE, SPREAD = 80.0, 20.0  # the net's output is (beats per minute - MIDDLE) / SPREAD


def pulses(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Made-up windows (n, 1, LENGTH) of standard score, and their mean rates (n,) in beats per minute."""

    def uniform(low: float, high: float, columns: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(n, columns, generator=generator)

    turn = 2 * math.pi
    time = torch.arange(LENGTH) / RATE
    # the rate sways by some per cent, as with the breath
    sway = 1 + uniform(-0.04, 0.04) * torch.sin(turn * (uniform(0.05, 0.3) * time + uniform(0, 1)))
    beats = torch.cumsum(uniform(40, 120) / 60 * sway, 1) / RATE
    strengths = torch.cat([torch.ones(n, 1), *(uniform(0, high) for high in (1.4, 1.3, 1.0, 0.8))], 1)
    phases = uniform(0, 1, 5)
    overtone = torch.arange(1, 6)[:, None]
    waves = torch.sin(turn * (overtone * beats[:, None] + phases[..., None]))
    wander = uniform(0, 0.8) * torch.sin(turn * (uniform(0.05, 0.4) * time + uniform(0, 1)))
    x = (strengths[..., None] * waves).sum(1) + wander + 0.15 * torch.randn(n, LENGTH, generator=generator)
    rates = 60 * (beats[:, -1] - beats[:, 0]) * RATE / (LENGTH - 1)
    return standard(x[:, None]), rates


def standard(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


# %%
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
net = nn.Sequential(
    nn.Conv1d(1, 48, 65, padding=32, stride=4), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 1),
)  # fmt: skip
STEPS = 600
optimizer = torch.optim.Adam(net.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=STEPS)
for _ in range(STEPS):
    x, rates = pulses(128, generator)
    optimizer.zero_grad()
    (net(x)[:, 0] - (rates - MIDDLE) / SPREAD).square().mean().backward()
    optimizer.step()
    schedule.step()


def beats_per_minute(output: Tensor) -> Tensor:
    return MIDDLE + SPREAD * output[:, 0]


windows = ppg(seconds=SECONDS, step=1, sample_rate=RATE)
real, truth = standard(windows.x), windows.y
made, made_rates = pulses(200, generator)
with torch.no_grad():
    told, made_told = beats_per_minute(net(real)), beats_per_minute(net(made))
    flat = float(beats_per_minute(net(torch.zeros(1, 1, LENGTH))))
print(f"made-up pulses: off by {(made_told - made_rates).abs().mean():.1f} beats per minute on average")
print(
    f"{len(real)} windows of a real pulse: off by {(told - truth).abs().mean():.1f}, {told.mean():.0f} on average"
)
print(f"a flat line, the baseline: {flat:.0f}")

# %% [markdown]
# The real pulse is slower than what the net says of a flat line, so the question is: why slower? The score is the
# answer with its sign turned, in beats per minute, and the values of a window sum to how much slower.


# %%
def slower(output: Tensor) -> Tensor:
    return -beats_per_minute(output)


fourier = pb.Fourier(sides="one", sample_rate=RATE)
in_frequency, in_time = pb.InDomain(fourier, pb.IntegratedGradients()), pb.IntegratedGradients()
found = pb.compare(net, real, {"frequency": in_frequency, "time": in_time}, target=slower)
frequencies = fourier.frequencies(LENGTH)
sums = " and ".join(f"{float(a.values.sum(-1).mean()):.2f} by {name}" for name, a in found.items())
print(f"mean sum of the values: {sums}; slower than the flat line by {flat - float(told.mean()):.2f}")


def at_the_rate(values: Tensor, truth: Tensor = truth) -> Tensor:
    """Which windows have their largest value at the heart's rate, to one frequency (7.5 beats per minute)."""
    peaks = frequencies[values[:, 0].argmax(-1)]
    return (peaks - truth / 60).abs() <= 1 / SECONDS


shuffled = pb.explain(net, real, target=slower, method=pb.InDomain(fourier, pb.RandomAttribution()))
rows = {
    "attribution": found["frequency"].values,
    "power of the signal": fourier.analysis(real).abs().square(),
    "random": shuffled.values,
}
for name, values in rows.items():
    print(f"largest at the heart's rate, {name}: {at_the_rate(values).float().mean():.0%} of the windows")
assert at_the_rate(rows["attribution"]).float().mean() > 0.9

# %% [markdown]
# A harder recording, with movement and sharper pulses, whose overtones are mostly stronger than the rate itself.

# %%
other = ppg(recording="timer", seconds=SECONDS, step=1, sample_rate=RATE)
hard = standard(other.x)
with torch.no_grad():
    right = (beats_per_minute(net(hard)) - other.y).abs() < 5
there = at_the_rate(pb.explain(net, hard, target=slower, method=in_frequency).values, other.y)
strongest = at_the_rate(fourier.analysis(hard).abs().square(), other.y)
print(f"the other recording: {int(right.sum())} of {len(hard)} windows are right to 5 beats per minute")
print(
    f"largest at the heart's rate, attribution: {there.float().mean():.0%}, power: {strongest.float().mean():.0%}"
)

# %% [markdown]
# Which map finds what the answer rests on with fewer numbers? Coefficients (or samples) are taken out, or put back into
# a flat line, the most important first; a coefficient is two numbers of 2 x 129, a sample one of 256, so fractions
# compare. A random order in the same domain is the control.

# %%
levels = (0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1)
curves = {}
for name, domain in (("frequency", fourier), ("time", None)):
    random = shuffled if domain is not None else pb.explain(net, real, target=slower, method="random")
    for order, attribution in ((name, found[name]), (f"{name}, random order", random)):
        curves[order] = [
            metric(net, real, attribution, target=slower, domain=domain, levels=levels)
            for metric in (deletion, insertion)
        ]
at = {f"{level:.0%}": levels.index(level) for level in (0.02, 0.1)}
print("the net's answer, areas under curves   deletion   insertion   with 2 % put back   10 %")
for order, (removed, restored) in curves.items():
    early = [float(-restored.curve[:, place].mean()) for place in at.values()]
    print(
        f"{order:<36}{-removed.values.mean():11.1f}{-restored.values.mean():12.1f}{early[0]:20.1f}{early[1]:7.1f}"
    )

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), constrained_layout=True)
example = 4
a = found["frequency"].values[example, 0]
axes[0, 0].plot(torch.arange(LENGTH) / RATE, real[example, 0], color="0.2", linewidth=0.9)
axes[0, 0].set(
    title=f"a real pulse, {truth[example]:.0f} beats per minute", xlabel="seconds", ylabel="standard score"
)
power = fourier.analysis(real)[example, 0].abs().square()
axes[0, 1].plot(frequencies, power / power.max() * a.max(), color="0.6", linestyle=":", label="power, scaled")
axes[0, 1].plot(frequencies, a, color="#b2182b", label="attribution")
axes[0, 1].axvline(float(truth[example]) / 60, color="#2166ac", linewidth=0.8, label="the heart's rate")
axes[0, 1].set(title="why slower? by frequency", xlabel="Hz", ylabel="beats per minute", xlim=(0, 6))
for (order, results), colour, line in zip(
    curves.items(), ("#b2182b", "#b2182b", "#2166ac", "#2166ac"), ("-", ":") * 2, strict=True
):
    for axis, result in zip(axes[1], results, strict=True):
        axis.plot(levels, -result.curve.mean(0), color=colour, linestyle=line, label=order)
axes[1, 0].set(title="deletion", xlabel="fraction taken out", ylabel="the net's beats per minute")
axes[1, 1].set(title="insertion", xlabel="fraction put back")
for axis in axes.flat[1:]:
    axis.legend(frameon=False, fontsize=8)
for axis in axes.flat:
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig("heart_rate.png", dpi=110)
assert curves["frequency"][1].values.mean() > curves["frequency, random order"][1].values.mean()
assert curves["frequency"][0].values.mean() < curves["frequency, random order"][0].values.mean()
print("wrote heart_rate.png")
