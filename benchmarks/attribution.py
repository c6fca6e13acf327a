"""Integrated gradients at equal evaluations: ours, captum and the floor, alternating in one process.

The floor is a hand-written loop of forward and input gradient over the best chunk, with frozen parameters, midpoint
nodes and a running sum. captum runs Gauss-Legendre with the same number of steps, once with everything at once (its
default) and once with ``internal_batch_size`` at the floor's best chunk.

    python -m benchmarks.attribution [--quick]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import captum.attr
import torch
from torch import Tensor, nn

import pullback as pb
from benchmarks.alternating import alternate, ratio
from benchmarks.models import gpt2, perceptron, resnet18, vit
from pullback.core.shadow import shadow

STEPS = 48


def floor(score: Callable[[Tensor], Tensor], x: Tensor, chunk: int, steps: int = STEPS) -> Tensor:
    """Hand-written integrated gradients with a zero baseline."""
    alpha = (torch.arange(steps, dtype=x.dtype) + 0.5) / steps
    total = torch.zeros_like(x)
    for part in alpha.split(chunk):
        z = (part.reshape(-1, *[1] * (x.dim() - 1)) * x).requires_grad_()
        (gradient,) = torch.autograd.grad(score(z).sum(), z)
        total += gradient.sum(0, keepdim=True)
    return x * total / steps


def best_chunk(score: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The fastest chunk of 1, 2, 4, ..., 48 for the floor, best of three."""
    seconds = {}
    for chunk in (1, 2, 4, 6, 8, 12, 16, 24, 48):
        times = []
        for _ in range(3):
            began = time.perf_counter()
            floor(score, x, chunk)
            times.append(time.perf_counter() - began)
        seconds[chunk] = min(times)
    best = min(seconds, key=lambda chunk: seconds[chunk])
    print(
        "  floor by chunk, in units of the best: "
        + "  ".join(f"{c}: {t / seconds[best]:.2f}" for c, t in seconds.items())
    )
    return best


def compare_on(name: str, model: nn.Module, inputs: Any, pairs: int) -> None:
    """Print the ratios for one model."""
    print(f"\n## {name}: {STEPS} steps")
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    tokens = isinstance(inputs, dict)
    x = model.get_input_embeddings()(inputs["input_ids"]).detach() if tokens else inputs

    def logits(z: Tensor) -> Tensor:
        output = model(inputs_embeds=z) if tokens else model(z)
        values = getattr(output, "logits", output)
        return values[:, -1] if tokens else values

    target = int(logits(x).argmax())

    def score(z: Tensor) -> Tensor:
        return logits(z)[:, target]

    model.requires_grad_(False)
    chunk = best_chunk(score, x)
    model.requires_grad_(True)

    def by_hand() -> Tensor:
        model.requires_grad_(False)
        try:
            return floor(score, x, chunk)
        finally:
            for parameter, flag in zip(model.parameters(), frozen, strict=True):
                parameter.requires_grad_(flag)

    def captum_all() -> Any:
        return captum.attr.IntegratedGradients(score).attribute(x, n_steps=STEPS)

    def captum_chunked() -> Any:
        return captum.attr.IntegratedGradients(score).attribute(x, n_steps=STEPS, internal_batch_size=chunk)

    method = pb.IntegratedGradients(steps=STEPS, baseline=pb.Zeros())

    def ours() -> Any:
        if tokens:
            return pb.explain(model, {"inputs_embeds": x}, target=target, method=method)
        return pb.explain(model, x, target=target, method=method)

    seconds = alternate(
        {"pullback": ours, "floor": by_hand, "captum": captum_all, "captum, chunked": captum_chunked}, pairs
    )
    used = pb.explain(model, {"inputs_embeds": x} if tokens else x, target=target, method=method).meta[
        "chunk"
    ]
    print(f"  floor's best chunk {chunk}, our chunk {used}")
    for other in ("floor", "captum", "captum, chunked"):
        print("  " + str(ratio(seconds, "pullback", other)))


def several_targets(pairs: int) -> None:
    """Ten targets at once against ten calls."""
    model, x = resnet18()
    method = pb.IntegratedGradients(steps=8)
    seconds = alternate(
        {
            "explain_targets": lambda: pb.explain_targets(model, x, list(range(10)), method=method),
            "ten calls": lambda: [pb.explain(model, x, target=k, method=method) for k in range(10)],
        },
        pairs,
    )
    print("\n## Ten targets of a ResNet-18, 8 steps each")
    print("  " + str(ratio(seconds, "explain_targets", "ten calls")))


def shadow_cost() -> None:
    """Milliseconds to build the private shadow of a model, the only absolute time here: best and median of 50."""
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(25)]
    for name, model in (
        ("101 small modules", nn.Sequential(*layers)),
        ("ResNet-18", resnet18()[0]),
        ("GPT-2", gpt2()[0]),
    ):
        seconds = []
        for _ in range(50):
            began = time.perf_counter()
            shadow(model)
            seconds.append(1000 * (time.perf_counter() - began))
        count = sum(1 for _ in model.modules())
        print(
            f"\n## Shadow of {name} ({count} modules): best {min(seconds):.1f} ms, median {median(seconds):.1f} ms"
        )


def main() -> None:
    """Run everything and print ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="three pairs only, to see that it runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="names of parts, comma-separated: perceptron,resnet18,vit,gpt2,targets"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    pairs = 3 if options.quick else 20
    wanted = options.only.split(",") if options.only else []
    for make in (perceptron, resnet18, vit, gpt2):
        if not wanted or make.__name__ in wanted:
            model, inputs = make()
            compare_on(make.__name__, model, inputs, pairs)
    if not wanted or "targets" in wanted:
        several_targets(pairs)
    if not wanted or "shadow" in wanted:
        shadow_cost()


if __name__ == "__main__":
    main()
