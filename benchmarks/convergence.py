"""How fast integrated gradients converge, and whether ``tol`` keeps its word, on trained nets.

The error of a map is ‖map - reference‖ / ‖reference‖ per input, the reference being 1500 midpoint nodes in float64.
``tol`` doubles the intervals of the trapezoidal rule where the autograd graph has smooth operations only, and triples
those of the midpoint rule elsewhere. Nested rules that were tried beside them: end-corrected trapezoids (Gregory) and
midpoints, Richardson extrapolation of midpoints, Fejér's second rule (7, 15, 31, ...), Clenshaw-Curtis (9, 17, 33, ...)
and Patterson's extensions of Gauss-Legendre (7, 15, 31, ...; the first is Gauss-Kronrod), all of which share the nodes
of the level before.

    python -m benchmarks.convergence [--quick] [--text PATH]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pullback as pb
from pullback.attribution.baselines import baseline_point
from pullback.attribution.paths import nodes_and_weights
from pullback.datasets import mnist

REFERENCE = 1500
Rule = tuple[Tensor, Tensor]


def midpoint(steps: int) -> Rule:
    return nodes_and_weights("midpoint", steps)


def gauss_legendre(steps: int) -> Rule:
    return nodes_and_weights("gausslegendre", steps)


def trapezoid(steps: int) -> Rule:
    """``steps`` nodes with both ends: the edges of steps - 1 intervals."""
    weights = torch.ones(steps, dtype=torch.float64) / (steps - 1)
    weights[[0, -1]] /= 2
    return torch.linspace(0, 1, steps, dtype=torch.float64), weights


def gregory(steps: int) -> Rule:
    """Trapezoids with weights 3/8, 7/6, 23/24 at either end: fourth order (Davis and Rabinowitz 1984, sec. 2.9)."""
    nodes, weights = trapezoid(steps)
    change = torch.tensor([-1 / 8, 1 / 6, -1 / 24], dtype=torch.float64) / (steps - 1)
    weights[:3] += change
    weights[-3:] += change.flip(0)
    return nodes, weights


def corrected_midpoint(steps: int) -> Rule:
    """Midpoints with weights 13/12, 7/8, 25/24 at either end: fourth order, from the slope that three nodes have."""
    nodes, weights = midpoint(steps)
    change = torch.tensor([1 / 12, -1 / 8, 1 / 24], dtype=torch.float64) / steps
    weights[:3] += change
    weights[-3:] += change.flip(0)
    return nodes, weights


def patterson(steps: int) -> Rule:
    """Three Gauss-Legendre nodes extended to 7, 15, 31, ... (Patterson 1968): each level has the highest degree that
    keeping the nodes before allows. New nodes are the roots of the E for which ∫ G E p = 0 for every p of lower degree,
    G having the old nodes as roots.
    """
    legendre = np.polynomial.legendre
    nodes = legendre.leggauss(3)[0]
    fine, fine_weights = legendre.leggauss(2 * steps)
    while len(nodes) < steps:
        old = np.prod(fine[:, None] - nodes, axis=1)
        values = legendre.legvander(fine, len(nodes) + 1)
        moments = values[:, :-1].T @ (values * (old / np.abs(old).max() * fine_weights)[:, None])
        lower = np.linalg.solve(moments[:, :-1], -moments[:, -1])
        nodes = np.sort(np.append(nodes, legendre.legroots(np.append(lower, 1)).real))
    integrals = np.zeros(len(nodes))
    integrals[0] = 1
    weights = np.linalg.solve(legendre.legvander(nodes, len(nodes) - 1).T, integrals)
    return torch.tensor((nodes + 1) / 2), torch.tensor(weights)


def richardson(steps: int) -> Rule:
    """(9 M_n - M_{n/3}) / 8: fourth order, from the nodes of the finer midpoint level."""
    nodes, weights = midpoint(steps)
    weights = weights * 9 / 8
    weights[1::3] -= 3 / steps / 8
    return nodes, weights


def fejer(steps: int) -> Rule:
    """Fejér's second rule: the interior extrema of Chebyshev polynomials (Waldvogel 2006, eq. 2.3)."""
    angle = np.arange(1, steps + 1) * np.pi / (steps + 1)
    odd = np.arange(1, steps + 1, 2)
    weights = 4 * np.sin(angle) / (steps + 1) * (np.sin(np.outer(angle, odd)) / odd).sum(1)
    return torch.tensor((np.cos(angle) + 1) / 2), torch.tensor(weights / 2)


def clenshaw_curtis(steps: int) -> Rule:
    """Clenshaw-Curtis: the extrema of Chebyshev polynomials with both ends (Waldvogel 2006, eq. 2.4)."""
    count = steps - 1
    angle = np.arange(steps) * np.pi / count
    order = np.arange(1, count // 2 + 1)
    factor = np.where(2 * order == count, 1, 2) / (4 * order**2 - 1)
    ends = np.where((np.arange(steps) == 0) | (np.arange(steps) == count), 1, 2)
    weights = ends / count * (1 - (np.cos(2 * np.outer(angle, order)) * factor).sum(1))
    return torch.tensor((np.cos(angle) + 1) / 2), torch.tensor(weights / 2)


RULES: dict[str, tuple[Callable[[int], Rule], tuple[int, ...]]] = {
    "midpoint": (midpoint, (3, 9, 27, 81, 243)),
    "trapezoid": (trapezoid, (3, 5, 9, 17, 33, 65, 129)),
    "Gregory": (gregory, (9, 17, 33, 65)),
    "end-corrected": (corrected_midpoint, (9, 27, 81)),
    "Richardson": (richardson, (9, 27, 81)),
    "Fejér": (fejer, (7, 15, 31, 63, 127)),
    "Clenshaw-Curtis": (clenshaw_curtis, (9, 17, 33, 65)),
    "Patterson": (patterson, (7, 15, 31, 63)),
    "Gauss-Legendre": (gauss_legendre, (9, 16, 24, 32, 40, 50, 64, 128)),
}


def trained(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def image_nets(quick: bool) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Small nets trained on the embedded digits, with the inputs to explain."""
    digits, test = mnist(split="train"), mnist(split="test")
    count = 8 if quick else 24
    for name, act in (("GELU", nn.GELU), ("SiLU", nn.SiLU), ("ReLU", nn.ReLU)):
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(784, 128), act(), nn.Linear(128, 128), act(), nn.Linear(128, 10)]
        yield f"{name} perceptron", trained(nn.Sequential(*layers), digits.x, digits.y, 3), test.x[:count]
        convolutions: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 16, 2), (16, 32, 2), (32, 32, 1), (32, 32, 1)):
            convolutions += [nn.Conv2d(inputs, outputs, 3, stride, 1), act()]
        net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 49, 10))
        yield f"{name} CNN", trained(net, digits.x, digits.y, 3), test.x[:count]


def text_nets(path: Path, quick: bool) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Pre-norm transformers of four layers, trained on characters."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    text = path.read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    size = len(characters)
    llama = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    gpt2 = GPT2Config(
        vocab_size=size, n_embd=64, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    rows = [1_000_000 + 200 * row for row in range(8 if quick else 24)]
    inputs = {"input_ids": torch.stack([ids[start : start + 32] for start in rows])}
    for name, make, config in (("Llama", LlamaForCausalLM, llama), ("GPT-2", GPT2LMHeadModel, gpt2)):
        torch.manual_seed(0)
        model: Any = make(config)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(50 if quick else 500):
            starts = torch.randint(0, len(ids) - 200_000, (24,))
            batch = torch.stack([ids[start : start + 49] for start in starts])
            loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield name, model.eval(), inputs


def relative(values: Tensor, reference: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm
    error: Tensor = norm((values - reference).flatten(1), dim=1) / norm(reference.flatten(1), dim=1)
    return error


def measure(name: str, net: nn.Module, inputs: Any, quick: bool) -> None:
    """Print the error of every rule, and what ``tol`` did."""
    net = net.double()
    inputs = inputs.double() if isinstance(inputs, Tensor) else inputs
    problem = pb.pose(net, inputs)
    start = baseline_point(None, problem)
    assert isinstance(problem.point, Tensor)
    assert isinstance(start, Tensor)
    delta = problem.point - start

    def integrate(rule: Rule) -> Tensor:
        total = torch.zeros_like(delta)
        for alpha, weight in zip(*rule, strict=True):
            gradient = problem.grad(start + alpha * delta)
            assert isinstance(gradient, Tensor)
            total += weight * gradient
        return total * delta

    reference = integrate(midpoint(300 if quick else REFERENCE))
    print(f"\n## {name}\nworst (median) error of the map")
    for rule, (make, levels) in RULES.items():
        errors = [(steps, relative(integrate(make(steps)), reference)) for steps in levels]
        print(
            f"  {rule:16s}" + "  ".join(f"{n}: {e.max():.1e} ({e.median():.1e})" for n, e in errors),
            flush=True,
        )
    for tol in (0.05, 0.01):
        found = pb.explain(net, inputs, method=pb.IntegratedGradients(tol=tol))
        assert isinstance(found.values, Tensor)
        error, stated = relative(found.values, reference), found.diagnostics["error"]
        ratio = stated / error
        right = ((ratio > 0.5) & (ratio < 2)).double().mean()
        evaluations = found.diagnostics["evaluations"].double()
        print(
            f"  tol={tol}: {evaluations.mean():.1f} evaluations on average (at most {evaluations.max():.0f}), "
            f"error at most {error.max():.1e} (median {error.median():.1e}); "
            f"stated/true {ratio.min():.2f} to {ratio.max():.2f}, median {ratio.median():.2f}, "
            f"within a factor of two {right:.0%}; "
            f"converged {found.diagnostics['converged'].double().mean():.0%}",
            flush=True,
        )


def main() -> None:
    """Measure every net."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--quick", action="store_true", help="fewer inputs and less training, to see that it runs"
    )
    parser.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare/input.txt"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, net, images in image_nets(options.quick):
        measure(name, net, images, options.quick)
    if options.text.exists():
        for name, model, tokens in text_nets(options.text, options.quick):
            measure(name, model, tokens, options.quick)
    else:
        print(f"\nno text at {options.text}: transformers left out")


if __name__ == "__main__":
    main()
