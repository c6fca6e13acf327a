"""What an adversarial review found wrong in methods, each against an independent derivation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.problem import Problem
from tests.core.test_regressions import IDS, MASK, Reader, X, small


def test_leaves_of_one_point_keep_their_own_dtype() -> None:
    class Mixed(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a.float().square().sum(-1) + 1e6 * b.square().sum(-1))[:, None]

    inputs = {"a": torch.ones(2, 3).half(), "b": torch.ones(2, 3)}
    for method in (
        pb.SmoothGrad(samples=2, noise=0.0),
        pb.ExpectedGradients(baseline=pb.Dataset(torch.zeros(1)[0:1, None].expand(1, 3)), samples=2),
    ):
        values = pb.explain(Mixed(), inputs, target=0, method=method).values
        assert values["a"].dtype == torch.float16
        assert values["b"].dtype == torch.float32
        assert torch.isfinite(values["b"]).all()  # 2e6 does not fit float16


def test_uniform_baselines_of_an_example_ignore_its_padding() -> None:
    method = pb.ExpectedGradients(samples=4)
    both = pb.explain(Reader(), {"input_ids": IDS, "attention_mask": MASK}, target=0, method=method).values
    alone = {"input_ids": IDS[:1, 1:], "attention_mask": MASK[:1, 1:]}
    one = pb.explain(Reader(), alone, target=0, method=method).values
    torch.testing.assert_close(both[0, 1:], one[0], rtol=0, atol=1e-12)


def test_gradcam_over_tokens_ignores_padding() -> None:
    method = pb.GradCAM(channel_dim=-1, rectify=False)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    both = pb.explain(Reader(), inputs, target=0, site="layer", method=method).values
    alone = {"input_ids": IDS[:1, 1:], "attention_mask": MASK[:1, 1:]}
    one = pb.explain(Reader(), alone, target=0, site="layer", method=method).values
    torch.testing.assert_close(both[0, 1:], one[0], rtol=0, atol=1e-12)
    assert float(both[0, 0].abs().max()) == 0 < float(one.abs().max())


@dataclass(frozen=True, eq=False)
class Mine:
    """A user's baseline, whose repr shortens a long tensor."""

    value: Tensor

    def __call__(self, problem: Problem, draw: int = 0) -> Any:
        return self.value.expand_as(problem.point).clone()


def test_baselines_whose_text_is_the_same_share_nothing() -> None:
    net = nn.Sequential(nn.Linear(2000, 3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    x = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    middle = torch.zeros(2000, dtype=torch.float64)
    middle[10:-10] = 1
    ours = [
        pb.IntegratedGradients(steps=4, baseline=Mine(value))
        for value in (torch.zeros(2000).double(), middle)
    ]
    assert repr(ours[0]) == repr(ours[1])
    for wrapped in (lambda each: each, lambda each: pb.SmoothGrad(each, samples=2)):
        together = pb.compare(net, x, {str(n): wrapped(each) for n, each in enumerate(ours)}, target=0)
        alone = pb.explain(net, x, target=0, method=wrapped(ours[1]))
        torch.testing.assert_close(together["1"].values, alone.values, rtol=0, atol=1e-14)


def test_smoothgrad_says_that_the_method_inside_did_not_converge() -> None:
    inner = pb.IntegratedGradients(tol=1e-9, max_steps=9)
    methods = {"mean": pb.SmoothGrad(inner, samples=2), "variance": pb.VarGrad(inner, samples=2)}
    for result in pb.compare(small(), X, methods, target=0).values():
        assert any("did not reach" in note for note in result.diagnostics["notes"])
    fine = pb.SmoothGrad(pb.IntegratedGradients(tol=0.2), samples=2, noise=0.01)
    assert not pb.explain(small(), X, target=0, method=fine).diagnostics["notes"]


def test_nobody_leaves_a_batch_whose_draws_go_by_position() -> None:
    net = nn.Sequential(small()[0], nn.Dropout(0.5), nn.Tanh(), small()[2]).train()
    x = X * torch.tensor([1e-3, 3.0, 3.0]).double()[:, None]  # the first example is settled at once
    method = pb.IntegratedGradients(tol=1e-4)
    result = pb.explain(net, x, target=0, method=method, allow_train=True)
    assert result.diagnostics["converged"].all()
    (steps,) = result.diagnostics["evaluations"].unique().tolist()
    assert steps > 9
    fixed = pb.explain(net, x, target=0, method=pb.IntegratedGradients(steps=steps), allow_train=True)
    torch.testing.assert_close(result.values, fixed.values, rtol=0, atol=1e-12)


def test_targets_asked_together_keep_their_own_index() -> None:
    together = pb.explain_targets(small(), X, [lambda output: output.sum(1), [1, 0, 1]], method="gradient")
    alone = pb.explain(small(), X, target=[1, 0, 1], method="gradient")
    assert together[1].target.tolist() == alone.target.tolist() == [1, 0, 1]


class Turned:
    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def analysis(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.matrix.T


def test_the_point_of_nested_domains_is_in_the_last_one() -> None:
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(5)).double())[0]
    method = pb.InDomain(Turned(turn), pb.InDomain(Turned(turn), pb.InputXGradient()))
    found = pb.explain(small(), X, target=0, method=method)
    torch.testing.assert_close(found.point, X @ turn @ turn, rtol=0, atol=1e-13)
