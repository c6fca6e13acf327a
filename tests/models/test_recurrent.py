"""Recurrent nets in eval mode, modules that run several times, and activations in any spelling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pullback as pb
from tests.conformance.fingerprint import assert_untouched
from tests.models.recurrent import RecurrentClassifier
from tests.single_input import only


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def seeded(build: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().double().eval()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_classifiers(kind: type[nn.RNNBase]) -> None:
    model, x = seeded(lambda: RecurrentClassifier(kind)), noise(2, 5, 3)
    with assert_untouched(model, x):
        found = pb.explain(model, x, target=1, method="gradient")
        sums = pb.explain(model, x, target=1, method="ig(steps=64, quadrature='gausslegendre')")
        hidden = pb.explain(model, x, target=1, method="gradient", site="memory")
    own = x.clone().requires_grad_()
    wanted = torch.autograd.grad(model(own)[:, 1].sum(), own)[0]
    assert torch.allclose(only(found), wanted, atol=1e-12)
    assert sums.diagnostics["gap"].abs().max() < 1e-10
    # the head is linear and reads the last step: its weights are the gradient there, zero elsewhere
    assert torch.allclose(only(hidden)[:, -1], model.head.weight[1].detach().expand(2, 8), atol=1e-12)
    assert not only(hidden)[:, :-1].any()


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(x)))  # type: ignore[no-any-return]


def test_reused_modules_are_addressed_by_call() -> None:
    model, x = seeded(Reused), noise(2, 4)
    with pytest.raises(pb.SiteError, match=r'"block" ran 3 times.*"block@0", "block@1", "block@2"'):
        pb.explain(model, x, target=1, site="block")
    value = x
    for call in range(3):
        value = model.block(value)
        start = value.detach().requires_grad_()
        score = start
        for _ in range(2 - call):
            score = model.block(score)
        wanted = torch.autograd.grad(score[:, 1].sum(), start)[0]
        found = pb.explain(model, x, target=1, method="gradient", site=f"block@{call}")
        assert torch.allclose(found.point, value, atol=1e-12)  # type: ignore[arg-type]
        assert torch.allclose(only(found), wanted, atol=1e-12)


class Spelled(nn.Module):
    """One ReLU network in the spelling asked for; weights depend on the seed only."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(12, 2)
        self.relu = nn.ReLU(inplace=spelling == "module in place")
        self.spelling = spelling

    def activate(self, x: Tensor) -> Tensor:
        spelled: dict[str, Any] = {
            "module": self.relu, "module in place": self.relu, "functional": functional.relu,
            "functional in place": lambda z: functional.relu(z, inplace=True), "torch": torch.relu,
            "method": lambda z: z.relu(), "method in place": lambda z: z.relu_(), "clamp": lambda z: z.clamp(min=0),
        }  # fmt: skip
        return spelled[self.spelling](x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.activate(self.first(x))
        return self.last(self.activate(self.middle(x)).flatten(1))  # type: ignore[no-any-return]


SPELLINGS = ["module in place", "functional", "functional in place", "torch", "method", "method in place", "clamp"]  # fmt: skip


@pytest.mark.parametrize("site", [None, "first", "middle"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_activations_in_any_spelling(spelling: str, site: str | None) -> None:
    x, method = noise(2, 1, 6, 6), pb.SmoothGrad(pb.IntegratedGradients(steps=3), samples=2)
    model = seeded(lambda: Spelled(spelling))
    with assert_untouched(model, x):
        found = pb.explain(model, x, target=1, method=method, site=site)
    wanted = pb.explain(seeded(lambda: Spelled("module")), x, target=1, method=method, site=site)
    assert torch.allclose(only(found), only(wanted), atol=1e-12)
    assert torch.allclose(found.point, wanted.point, atol=1e-12)  # type: ignore[arg-type]
