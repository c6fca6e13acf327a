"""Pullback ascent against its recursion: step lengths, ball, clip, zero gradients, several leaves, complex points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.spelling import parse_method
from pullback.core.errors import MethodError

from ..golden_net import example, tiny_cnn

X = example(2, 3, 8, 8)


def explain(method: Any, model: Any = None, x: Any = X, target: Any = (0, 2)) -> pb.Attribution:
    target = list(target) if isinstance(target, tuple) else target
    return pb.explain(tiny_cnn() if model is None else model, x, method=method, target=target)


def norms(values: Any) -> Tensor:
    assert isinstance(values, Tensor)
    return values.flatten(1).norm(dim=1)


def by_hand(
    inner: Any, steps: int, alpha: float, radius: float | None, clip: tuple[float, float] | None
) -> Tensor:
    """The recursion, one example at a time, on explained points."""
    rows = []
    for row, target in zip(X, (0, 2), strict=True):
        z = row.clone()
        for _ in range(steps):
            found = pb.explain(tiny_cnn(), z[None], method=inner, target=target).values
            assert isinstance(found, Tensor)
            z = z + alpha * found[0] / found[0].norm()
            if radius is not None and (z - row).norm() > radius:
                z = row + radius * (z - row) / (z - row).norm()
            if clip is not None:
                z = z.clamp(*clip)
        rows.append(z - row)
    return torch.stack(rows)


@pytest.mark.parametrize("inner", [pb.ExcitationPullback(), pb.SemanticPullback(), pb.Gradient()])
@pytest.mark.parametrize(
    ("radius", "clip"), [(None, None), (1.7, None), (None, (-1.0, 1.0)), (1.2, (-0.9, 0.8))]
)
def test_the_recursion(inner: Any, radius: float | None, clip: tuple[float, float] | None) -> None:
    method = pb.PullbackAscent(inner, steps=4, step_size=0.8, radius=radius, clip=clip)
    assert torch.allclose(explain(method).values, by_hand(inner, 4, 0.8, radius, clip), atol=1e-12)  # type: ignore[arg-type]


def test_a_step_has_the_given_length_and_the_ball_its_radius() -> None:
    assert torch.allclose(
        norms(explain(pb.PullbackAscent(steps=1)).values), torch.full((2,), 20.0).double(), rtol=1e-14
    )
    far = explain(pb.PullbackAscent(steps=5, radius=30.0)).values
    assert float(norms(far).max()) <= 30.0 * (1 + 1e-14)
    assert float(norms(far).min()) > 20.0
    for power in (1e-200, 1e200):
        # squares of these gradients vanish or overflow, their direction does not
        net = nn.Linear(3, 1, bias=False).double()
        with torch.no_grad():
            net.weight.copy_(torch.tensor([[3.0, 0.0, 4.0]]).double() * power)
        found = explain(pb.PullbackAscent(pb.Gradient(), 1, 10.0), net, torch.zeros(1, 3).double(), 0)
        assert torch.allclose(found.values, torch.tensor([[6.0, 0.0, 8.0]]).double(), rtol=1e-14)  # type: ignore[arg-type]


def test_clip_holds_at_every_step() -> None:
    found = explain(pb.PullbackAscent(steps=3, clip=(-1.0, 1.0)))
    assert isinstance(found.values, Tensor)
    end = X + found.values
    assert float(end.min()) >= -1.0 - 1e-14
    assert float(end.max()) <= 1.0 + 1e-14


def test_a_zero_gradient_stays_in_place() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)).double().eval()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
        net[0].weight[:, :2] = 0.0
    # the second example's ReLU is open, the first one's shut
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1e4 * float(net[0].weight[0, 2].detach().sign())]]).double()
    found = explain(pb.PullbackAscent(pb.Gradient(), steps=2, radius=1.0), net, x, 0).values
    assert isinstance(found, Tensor)
    assert torch.equal(found[0], torch.zeros(3).double())
    assert torch.isclose(found[1].norm(), torch.tensor(1.0).double())


def test_scores_on_the_way_rise_and_are_the_models() -> None:
    found = explain(pb.PullbackAscent(pb.ExcitationPullback(), steps=4, step_size=0.2))
    path = found.diagnostics["path_scores"]
    assert path.shape == (2, 5)
    assert torch.equal(path[:, 0], found.score)
    assert bool((path.diff(dim=1) > 0).all())
    end = tiny_cnn()(X + found.values)[torch.arange(2), [0, 2]].detach()
    assert torch.allclose(path[:, -1], end, atol=1e-12)
    assert any(each["rule"].startswith("SigmoidGate") for each in found.diagnostics["coverage"])
    assert torch.equal(torch.as_tensor(found.diagnostics["evaluations"]), torch.tensor([4, 4]))


def test_batch_mates_do_not_matter() -> None:
    method = pb.PullbackAscent(steps=3, step_size=2.0)
    whole = explain(method, target=1).values
    single = torch.cat([explain(method, x=row[None], target=1).values for row in X])  # type: ignore[misc]
    assert torch.allclose(whole, single, atol=1e-12)  # type: ignore[arg-type]


class _Sum(nn.Module):
    """Two inputs of different size with gradients 3 and 4 in one place each."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([3 * a[:, 0] + 4 * b[:, 1, 0], a[:, 1]], 1)


def test_leaves_share_one_norm() -> None:
    inputs = {"a": torch.zeros(1, 2).double(), "b": torch.zeros(1, 2, 2).double()}
    found = explain(pb.PullbackAscent(pb.Gradient(), 2, 5.0), _Sum(), inputs, 0).values
    assert isinstance(found, dict)
    wanted = {"a": torch.tensor([[6.0, 0.0]]), "b": torch.tensor([[[0.0, 0.0], [8.0, 0.0]]])}
    assert all(torch.allclose(found[name], each.double()) for name, each in wanted.items())


@dataclass(frozen=True)
class _Spectrum:
    """The orthonormal Fourier transform: complex coefficients."""

    def analysis(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, norm="ortho")

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return torch.fft.ifft(coefficients, norm="ortho").real


def test_complex_points() -> None:
    """An orthonormal change of variable does not change the way: transforming it back gives the plain one."""
    net = nn.Linear(6, 2).double()
    x, ascent = example(2, 6), pb.PullbackAscent(pb.Gradient(), 3, 1.5)
    problem = pb.pose(net, x, target=1).in_domain(_Spectrum())
    found = ascent(problem)
    assert isinstance(found, Tensor)
    assert found.is_complex()
    assert torch.allclose(_Spectrum().synthesis(found), explain(ascent, net, x, 1).values, atol=1e-12)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"clip=.* needs real values"):
        pb.PullbackAscent(pb.Gradient(), clip=(0.0, 1.0))(problem)


def test_text_and_parameters() -> None:
    method = pb.PullbackAscent(pb.ExcitationPullback(0.1), radius=100.0, clip=(-1.0, 1.0))
    assert parse_method(repr(method)) == method
    for make, message in (
        (lambda: pb.PullbackAscent(steps=0), "steps is a whole number"),
        (lambda: pb.PullbackAscent(step_size=0.0), "step_size is a finite number above 0"),
        (lambda: pb.PullbackAscent(radius=math.inf), "radius is a finite number above 0"),
        (lambda: pb.PullbackAscent(clip=(1.0, -1.0)), r"low < high.*got \(1.0, -1.0\)"),
        (lambda: pb.PullbackAscent(pb.Gradient), "give an object: Gradient"),
    ):
        with pytest.raises(MethodError, match=message):
            make()  # type: ignore[no-untyped-call]


def test_a_method_of_another_shape_is_refused() -> None:
    with pytest.raises(MethodError, match="needs a direction of the point's shape"):
        pb.explain(tiny_cnn(), X, method=pb.PullbackAscent(pb.GradCAM()), site="3", target=0)
