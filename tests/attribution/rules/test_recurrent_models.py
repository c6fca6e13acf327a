"""Models with recurrent layers under the recurrent rule: conservation, coverage, batches, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pullback as pb
from pullback.attribution.rules.presets import RELP
from pullback.attribution.rules.recurrent import RecurrentDecomposition
from pullback.core.errors import CoverageError, MethodError
from pullback.core.operations import LINEAR
from pullback.core.overrides import overrides
from tests.core.rules import Scaled, points
from tests.models.recurrent import RecurrentClassifier

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}
RULE = RecurrentDecomposition()


def without_biases(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
    return model.double().eval()


@pytest.fixture(autouse=True)
def _seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def relevance(problem: pb.Problem, *rules: Any) -> Tensor:
    return times_point(problem, problem.under(rules or (RULE,)))


def times_point(problem: pb.Problem, differentiated: pb.Problem) -> Tensor:
    point, coefficient = problem.point, differentiated.grad()
    assert isinstance(point, Tensor)
    assert isinstance(coefficient, Tensor)
    return point * coefficient


class Packed(nn.Module):
    """Sequences of lengths 2, 5 and 3, summed over time."""

    lengths = (2, 5, 3)

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = list(self.lengths[: len(x)])
        packed = pack_padded_sequence(x, rows, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.memory(packed)[0], batch_first=True)
        return self.head(y.sum(1))  # type: ignore[no-any-return]


class Loop(nn.Module):
    """An LSTM as a loop over its cell, or over the cell written out in torch's elementary operations."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            if self.written_out:
                weights = self.cell.weight_ih, self.cell.weight_hh
                i, f, g, o = (step @ weights[0].T + h @ weights[1].T).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                h, c = self.cell(step, (h, c))
        return self.head(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_relevance_is_conserved_per_example(kind: str) -> None:
    problem = pb.pose(without_biases(RecurrentClassifier(KINDS[kind])), points(5, 6, 3).detach(), target=1)
    found = relevance(problem)
    torch.testing.assert_close(found.flatten(1).sum(1), problem.score(), rtol=1e-12, atol=1e-14)
    plain = times_point(problem, problem)
    assert not torch.allclose(plain.flatten(1).sum(1), problem.score(), rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_alone_has_the_same_relevance(kind: str) -> None:
    model, x = RecurrentClassifier(KINDS[kind]).double().eval(), points(4, 6, 3).detach()
    together = relevance(pb.pose(model, x, target=0))
    alone = torch.cat([relevance(pb.pose(model, row[None], target=0)) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_rule_the_audit_names_the_layer(kind: str) -> None:
    problem = pb.pose(RecurrentClassifier(KINDS[kind]).eval(), torch.ones(2, 4, 3), target=0)
    with pytest.raises(CoverageError, match=f"covers {kind} in module 'memory', 1 call"):
        relevance(problem, Scaled())
    with pytest.raises(CoverageError, match=f"covers {kind} in module 'memory', 1 call"):
        relevance(problem, RecurrentDecomposition(within="head"))
    assert torch.equal(relevance(problem, RecurrentDecomposition(within="memory")), relevance(problem))


def test_coverage_counts_the_call_and_the_native_graph_is_gone() -> None:
    model, x = RecurrentClassifier(nn.LSTM).eval().requires_grad_(False), points(2, 4, 3, dtype=torch.float32)
    with overrides(model, [RULE]) as coverage:
        output = model(x)
    assert coverage.covered == {("lstm", "memory", "RecurrentDecomposition(within=None)"): 1}
    seen, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    assert not [node for node in seen if "Rnn" in node.name() or "Sigmoid" in node.name()]


def test_several_gradients_at_once() -> None:
    model, x = RecurrentClassifier(nn.GRU).double().eval().requires_grad_(False), points(2, 4, 3)
    with overrides(model, [RULE]):
        output = model(x)
        weights = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
        (together,) = torch.autograd.grad(output, x, weights, is_grads_batched=True, retain_graph=True)
        singly = [torch.autograd.grad(output, x, weight, retain_graph=True)[0] for weight in weights]
    torch.testing.assert_close(together, torch.stack(singly), rtol=1e-12, atol=1e-14)


def test_drawn_dropout_between_layers_is_refused() -> None:
    model = RecurrentClassifier(nn.LSTM).train()
    problem = pb.pose(model, torch.ones(2, 4, 3), target=0, allow_train=True)
    with pytest.raises(MethodError, match=r"lstm in module 'memory' draws dropout\(0.2\).*model.eval\(\)"):
        relevance(problem)
    model.memory.dropout = 0.0
    assert relevance(pb.pose(model, torch.ones(2, 4, 3), target=0, allow_train=True)).abs().sum() > 0


@pytest.mark.skipif("_pad_packed_sequence" not in LINEAR, reason="core does not know packing as linear")
def test_packed_sequences() -> None:
    model, x = without_biases(Packed()), points(3, 5, 3).detach()
    problem = pb.pose(model, x, target=0, chunk=3)
    found = relevance(problem)
    torch.testing.assert_close(found.flatten(1).sum(1), problem.score(), rtol=1e-12, atol=1e-14)
    assert found[0, 2:].abs().max() == 0 == found[2, 3:].abs().max()  # padding


def test_a_written_out_cell_has_the_relevance_of_the_native_one() -> None:
    native, written_out = without_biases(Loop(False)), without_biases(Loop(True))
    written_out.load_state_dict(native.state_dict())
    x = points(3, 5, 3).detach()
    found = [relevance(pb.pose(model, x, target=1), *RELP) for model in (native, written_out)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
