"""A training step of a sparse autoencoder: ours against the same step written densely.

    OMP_NUM_THREADS=1 python -m benchmarks.sae

The dense step is what the formulas say: autograd, a scattered [batch, latents] matrix and a product to decode,
torch.topk, Adam neither fused nor foreach, whole-matrix projection and normalisation. One thread; seconds are the
processor's (``time.process_time``), since the wall clock of a shared machine measures its other users.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from pullback.core.resources import PeakMeter
from pullback.steering.sae import SparseAutoencoderConfig, Trainer, TrainingConfig


class DenseTrainer:
    """The naive step: encoder, encoder bias, decoder and decoder bias, from the same start as ours."""

    def __init__(self, trainer: Trainer) -> None:
        self.config = trainer.config
        self.weights = [value.detach().clone().requires_grad_() for value in trainer.autoencoder.parameters()]
        self.adam = torch.optim.Adam(
            self.weights, lr=self.config.peak_learning_rate, eps=6.25e-10, foreach=False, fused=False
        )

    def forward(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        encoder, bias, decoder, middle = self.weights
        z = (x - middle) @ encoder.t() + bias
        score = z
        if gradient is not None:
            scaled = gradient / gradient.norm(dim=1).mean()
            score = z * (1 + self.config.autoencoder.beta * (scaled @ decoder.t()).abs())
        indices = score.detach().topk(self.config.autoencoder.k).indices
        dense = torch.zeros_like(z).scatter(1, indices, z.gather(1, indices).relu())
        output = dense @ decoder + middle
        return (output - x).square().mean() / (x - x.mean(0)).square().mean()

    def step(self, x: Tensor, gradient: Tensor | None) -> Tensor:
        self.adam.zero_grad()
        loss = self.forward(x, gradient)
        loss.backward()
        decoder = self.weights[2]
        with torch.no_grad():
            assert decoder.grad is not None
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
        self.adam.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)
        return loss.detach()


def seconds_of(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each, in turn, after one round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            began = time.process_time()
            run()
            if number:
                found[name].append(time.process_time() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--latents", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-budget", type=int, default=8 * 2**20, help="bytes of scores at once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, options.batch, options.width, generator=generator)

    def trainer(selection: str, dtype: str = "exact") -> Trainer:
        shape = SparseAutoencoderConfig(options.width, options.latents, options.k, selection)  # type: ignore[arg-type]
        config = TrainingConfig(
            shape,
            tokens=1000 * options.batch,
            batch_tokens=options.batch,
            beta_warmup=0.0,
            memory_budget=options.memory_budget,
            score_dtype=dtype,  # type: ignore[arg-type]
        )
        return Trainer(config)

    for selection, gradient in (("topk", None), ("gradient", g)):
        ours = trainer(selection)
        dense = DenseTrainer(ours)
        first = float(ours.step(x, gradient).total.detach()), float(dense.step(x, gradient))
        apart = max(
            float((a.grad - b.grad).abs().max() / b.grad.abs().max())
            for a, b in zip(ours.autoencoder.parameters(), dense.weights, strict=True)
            if a.grad is not None and b.grad is not None
        )
        print(
            f"{selection}: loss {first[0]:.7f} against {first[1]:.7f}; "
            f"gradients of step 1 apart {apart:.1e} of the largest"
        )
        rough = trainer(selection, "bfloat16")
        agree = (
            rough.autoencoder.encode(x, gradient).indices,
            trainer(selection).autoencoder.encode(x, gradient).indices,
        )
        same = (agree[0].unsqueeze(2) == agree[1].unsqueeze(1)).any(2).double().mean()
        print(f"{selection}: with bfloat16 scores {float(same):.4%} of the selections are those of float32")
        ways: dict[str, Callable[[], object]] = {
            "dense": lambda gradient=gradient, dense=dense: dense.step(x, gradient),  # type: ignore[misc]
            "float32": lambda gradient=gradient, ours=ours: ours.step(x, gradient),  # type: ignore[misc]
            "bfloat16": lambda gradient=gradient, rough=rough: rough.step(x, gradient),  # type: ignore[misc]
        }
        seconds = seconds_of(ways, options.rounds)
        for name, each in seconds.items():
            ratios = [a / b for a, b in zip(seconds["dense"], each, strict=True)]
            print(
                f"{selection} {name}: {1000 * median(each):.0f} ms, {options.batch / median(each):,.0f} tokens/s, "
                f"{median(ratios):.2f} times dense [{min(ratios):.2f}, {max(ratios):.2f}]",
                flush=True,
            )
        ours.optimizer.zero_grad()
        with PeakMeter() as meter:
            ours.step(x, gradient)
        own = sum(value.numel() * value.element_size() for value in ours.autoencoder.parameters())
        matrix = options.batch * options.latents * 4
        print(
            f"{selection}: peak {meter.peak / 1e6:.1f} MB in a step, less the gradients' {own / 1e6:.1f} MB: "
            f"{(meter.peak - own) / matrix:.2f} of batch x latents x 4 bytes"
        )
        del ours, dense, rough, ways


if __name__ == "__main__":
    main()
