"""Integrated gradients in domains: against one example and one step at a time, by hand, and several domains at once.

``python -m benchmarks.domains [--pairs 20] [--quick]``: B = 32, T = 512, 64 steps, ratios of alternating runs.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor, nn

import pullback as pb

from .alternating import alternate, ratio


def network(length: int) -> nn.Module:
    """A 1-D CNN of the size used for heart rate from PPG: three blocks, two classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 16, 9, padding=4), nn.GELU(), nn.AvgPool1d(2),
        nn.Conv1d(16, 32, 9, padding=4), nn.GELU(), nn.AvgPool1d(2),
        nn.Conv1d(32, 32, 9, padding=4), nn.GELU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 2),
    ).eval()  # fmt: skip


def one_at_a_time(net: nn.Module, x: Tensor, steps: int) -> Tensor:
    """The released code's pattern: for each example and each step one forward and backward of the spectrum."""
    found = []
    for row in x:
        spectrum = torch.fft.fft(row[None])
        total = torch.zeros_like(spectrum)
        for step in range(steps):
            z = (spectrum * ((step + 0.5) / steps)).requires_grad_()
            net(torch.fft.ifft(z).real)[0, 1].backward()
            assert z.grad is not None
            total += z.grad
        net.zero_grad()
        found.append((spectrum * (total / steps).conj()).real)
    return torch.cat(found)


def by_hand(net: nn.Module, x: Tensor, steps: int, chunk: int) -> Tensor:
    """The best loop one would write: in time, parameters frozen, ``chunk`` steps of the batch at once."""
    total = torch.zeros_like(x, dtype=torch.float64)
    alphas = (torch.arange(steps) + 0.5) / steps
    for part in alphas.split(chunk):
        z = (part[:, None, None, None] * x).flatten(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(net(z)[:, 1].sum(), z)
        total += gradient.reshape(len(part), *x.shape).sum(0)
    mean = total / steps
    found: Tensor = (torch.fft.fft(x) * torch.fft.fft(mean).conj()).real
    return found / x.shape[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small sizes, two pairs: does it run?")
    given = parser.parse_args()
    batch, length, steps = (4, 64, 8) if given.quick else (32, 512, 64)
    pairs = 2 if given.quick else given.pairs
    net, x = network(length), torch.randn(batch, 1, length, generator=torch.Generator().manual_seed(0))
    frozen = network(length).requires_grad_(False)
    ig = pb.IntegratedGradients(steps=steps)
    fourier = pb.InDomain(pb.Fourier(), ig)
    several = {
        "time": ig,
        "fourier": fourier,
        "dct": pb.InDomain(pb.DCT(), ig),
        "wavelet": pb.InDomain(pb.Wavelet("db4"), ig),
        "stft": pb.InDomain(pb.STFT(64), ig),
    }

    def ours() -> Tensor:
        found = pb.explain(net, x, target=1, method=fourier).values
        assert isinstance(found, Tensor)
        return found

    for other in (one_at_a_time(net, x, steps), by_hand(frozen, x, steps, 4)):
        torch.testing.assert_close(ours(), other.to(x.dtype), rtol=1e-3, atol=1e-6)
    chunks = (1, 2, 4, 8, 16)
    trial = alternate({str(chunk): partial(by_hand, frozen, x, steps, chunk) for chunk in chunks}, 3)
    best = int(min(trial, key=lambda name: min(trial[name])))
    print(f"B = {batch}, T = {length}, {steps} steps; best chunk by hand: {best} steps of the batch at once")
    seconds = alternate({"ours": ours, "by hand": lambda: by_hand(frozen, x, steps, best)}, pairs)
    print(ratio(seconds, "ours", "by hand"))
    seconds = alternate(
        {"ours": ours, "one at a time": lambda: one_at_a_time(net, x, steps)}, max(2, pairs // 4)
    )
    print(ratio(seconds, "one at a time", "ours"))
    seconds = alternate(
        {
            "five domains": lambda: pb.compare(net, x, several, target=1),
            "one": lambda: pb.compare(net, x, {"fourier": fourier}, target=1),
        },
        pairs,
    )
    print(ratio(seconds, "five domains", "one"))


if __name__ == "__main__":
    main()
