"""Activations written out in several operations: one term f(x) - f'(x) x, and the first pass as the recorded one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pullback as pb
from pullback.attribution import conservation_report, fullgrad_terms
from pullback.attribution.rules.presets import RELP
from tests.attribution.test_fullgrad_terms import gap, linear, weighted
from tests.golden_net import example, largest


class WrittenOutGELU(nn.Module):
    """transformers' NewGELUActivation."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


class InPlaceSwishActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(torch.sigmoid(x))


class NormalisingActivation(nn.Module):
    """Called an activation, and mixes the entries of a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x - x.mean(-1, keepdim=True))


class BranchingActivation(nn.Module):
    """Entrywise on two entries, but not on more."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * x if x.numel() == 2 else torch.tanh(x) * x.sum(-1, keepdim=True)


class TwoSignalsActivation(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * torch.sigmoid(gate)


def net_with(activation: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(linear(6, 8), activation, linear(8, 3))


def test_a_chain_has_one_term_and_it_is_the_scalar_function_s() -> None:
    net, x = net_with(WrittenOutGELU()), example(2, 6)
    found = fullgrad_terms(net, x, target=weighted)
    assert [name for name, _ in found.terms] == ["0:linear", "1:WrittenOutGELU", "2:linear"]
    assert found.uncovered == ()
    assert gap(found) < 1e-14
    z = net[0](x).detach().requires_grad_()
    y = net[1](z)
    (slope,) = torch.autograd.grad(y.sum(), z, retain_graph=True)
    (delta,) = torch.autograd.grad(weighted(net[2](y)).sum(), y)
    assert largest(found.terms[1][1], delta * (y - slope * z).detach()) < 1e-14
    # its operations taken alone add up to the same for each example
    functional = pb.attribution.fullgrad_terms(_Calls(net), x, target=weighted)
    assert len(functional.terms) == 6
    apart = torch.stack([total for name, total in functional.sums().items() if "linear" not in name]).sum(0)
    assert largest(found.sums()["1:WrittenOutGELU"], apart) < 1e-14


class _Calls(nn.Module):
    """The same network, its activation called as a function."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.first, self.last = net[0], net[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(WrittenOutGELU.forward(None, self.first(x)))  # type: ignore[no-any-return, arg-type]


@pytest.mark.parametrize(
    "activation",
    [InPlaceSwishActivation(), NormalisingActivation(), BranchingActivation(), nn.SiLU(), nn.Softsign()],
)
def test_what_is_no_chain_has_the_terms_of_its_operations(activation: nn.Module) -> None:
    net, x = net_with(activation), example(2, 6)
    found = fullgrad_terms(net, x, target=weighted)
    assert gap(found) < 1e-14
    assert found.uncovered == ()
    chained = isinstance(activation, nn.Softsign)
    assert ("1:Softsign" in dict(found.terms)) == chained
    assert largest(net(x), fullgrad_values(net, x)) == 0


def fullgrad_values(net: nn.Module, x: Tensor) -> Tensor:
    """The output as the recorded forward computes it."""
    seen: list[Tensor] = []

    def target(output: Tensor) -> Tensor:
        seen.append(output.detach().clone())
        return output.sum(1)

    fullgrad_terms(net, x, target=target)
    assert all(torch.equal(each, seen[0]) for each in seen)
    return seen[-1]


def test_a_chain_whose_result_is_overwritten_is_computed_again() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation, self.read = WrittenOutGELU(), linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.read(self.activation(x * 1.0).mul_(2.0))  # type: ignore[no-any-return]

    found = fullgrad_terms(Overwritten(), example(2, 6), target=weighted)
    assert gap(found) < 1e-14
    assert "activation:WrittenOutGELU" in dict(found.terms)


def test_under_rules_and_in_the_conservation_report_every_operation_stands_for_itself() -> None:
    net, x = net_with(WrittenOutGELU()), example(2, 6)
    ruled = fullgrad_terms(net, x, target=weighted, rules=RELP)
    assert gap(ruled) < 1e-14
    assert "1:WrittenOutGELU" not in dict(ruled.terms)
    report = conservation_report(net, x, weighted)
    # the literal 1 of the gate is a constant, the rest a leak
    assert all(bool(part[1].any()) for part in ((b.name, b.absorbed) for b in report.blocks if b.name == "1"))


CALLS: list[int] = []


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        return F.gelu(self.read(x))


@pytest.mark.parametrize(("rows", "forwards"), [(1, 1), (4, 1), (5, 2)])
def test_the_first_pass_is_the_recorded_one_for_a_few_rows(rows: int, forwards: int) -> None:
    CALLS.clear()
    found = fullgrad_terms(Counted(), example(rows, 6))
    assert gap(found) < 1e-14
    assert len(CALLS) == forwards


@pytest.mark.parametrize("site", [None, "read", "read:input"])
def test_it_gives_the_terms_of_a_pass_of_its_own(site: str | None) -> None:
    net, x = Counted(), example(3, 6)
    CALLS.clear()
    live = fullgrad_terms(net, x, 1, site=site)
    assert len(CALLS) == 1
    apart = fullgrad_terms(net, x, 1, site=site, chunk=3)
    assert len(CALLS) == 3
    assert [name for name, _ in live.terms] == [name for name, _ in apart.terms]
    for (_, a), (_, b) in zip(live.terms, apart.terms, strict=True):
        assert torch.equal(a, b)
    assert largest(live.input_term, apart.input_term) == 0
    assert torch.equal(live.score, apart.score)


def test_tokens_take_their_embeddings_from_the_first_pass() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.read = nn.Embedding(9, 6).double(), Counted()

        def forward(self, ids: Tensor) -> Tensor:
            return self.read(self.embed(ids)).sum(1)  # type: ignore[no-any-return]

    net, ids = Tokens(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    CALLS.clear()
    found = fullgrad_terms(net, ids, 1)
    assert len(CALLS) == 1
    assert gap(found) < 1e-14
    apart = fullgrad_terms(net, ids, 1, chunk=2)
    assert largest(found.input_term, apart.input_term) == 0


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.randn(x.shape[1:], dtype=x.dtype)).tanh()


@pytest.mark.parametrize("case", ["random", "no gradient"])
def test_where_the_first_pass_cannot_serve_there_is_another(case: str) -> None:
    state, x = torch.get_rng_state(), example(2, 6)
    if case == "random":
        found = fullgrad_terms(Noisy(), x, 1)
    else:
        with torch.no_grad(), torch.inference_mode():
            found = fullgrad_terms(net_with(nn.Tanh()), x, 1)
    assert gap(found) < 1e-14
    assert torch.equal(state, torch.get_rng_state())
