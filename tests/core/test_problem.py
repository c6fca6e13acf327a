"""A Problem: scores and gradients at any points, moved, repeated, in other coordinates, under rules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.overrides import Rule

X = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)


def cubes(x: Tensor) -> Tensor:
    """Scores Σx³ and Σx², so gradients are 3x² and 2x."""
    return torch.stack([x.pow(3).sum(1), x.square().sum(1)], 1)


class Cubes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return cubes(self.same(x))


def posed(**settings: object) -> pb.Problem:
    return pb.pose(Cubes(), X, target=[0, 1], **settings)  # type: ignore[arg-type]


def slope(x: Tensor) -> Tensor:
    """The gradient by hand: the first example asks for cubes, the second for squares."""
    wanted = 2 * x
    wanted[0::2] = 3 * x[0::2].square()
    return wanted


@pytest.mark.parametrize("site", ["input", "same", "same:input"])
@pytest.mark.parametrize("chunk", ["auto", 1, 3])
def test_scores_and_gradients_by_hand(site: str, chunk: object) -> None:
    problem = posed(site=site, chunk=chunk)
    assert torch.equal(problem.point, X)  # type: ignore[arg-type]
    assert torch.allclose(problem.score(), torch.stack([X[0].pow(3).sum(), X[1].square().sum()]))
    assert torch.allclose(problem.grad(), slope(X))  # type: ignore[arg-type]
    # k·B rows: row r is about example r mod B
    many = torch.cat([X + number for number in range(3)])
    assert torch.allclose(problem.grad(many), slope(many))  # type: ignore[arg-type]
    scores = torch.stack([cubes(many)[row, row % 2] for row in range(6)])
    assert torch.allclose(problem.score(many), scores)
    assert problem.evaluations_of_rows().tolist() == [4, 4]


def test_at_moves_the_point_and_its_score() -> None:
    problem, moved = posed(), posed().at(X + 1)
    assert torch.allclose(moved.score(), problem.score(X + 1))
    assert torch.allclose(moved.grad(), slope(X + 1))  # type: ignore[arg-type]
    assert torch.equal(problem.point, X)  # type: ignore[arg-type]


def test_rows_keep_the_example_they_are_about() -> None:
    problem = posed()
    part = problem.rows(torch.tensor([1, 1, 0]))
    assert torch.allclose(part.score(), problem.score()[[1, 1, 0]])
    assert torch.allclose(part.grad(), slope(X)[[1, 1, 0]])  # type: ignore[arg-type]
    moved = problem.rows(torch.tensor([1, 0]), X + 2)
    # the first row is example 1, asking for squares, at the first point
    assert torch.allclose(moved.score(), torch.stack([(X[0] + 2).square().sum(), (X[1] + 2).pow(3).sum()]))
    again = part.rows(torch.tensor([2]))
    assert again.examples.tolist() == [0]
    assert part.evaluations_of_rows().tolist() == [2, 2, 1]


@pytest.mark.parametrize("z", [X[:, :2], X[:1], torch.ones(3, 3).double(), torch.tensor(1.0), X[:0]])
def test_wrong_shapes_are_refused(z: Tensor) -> None:
    for ask in (posed().score, posed().grad, posed().at):
        with pytest.raises(
            pb.InputError,
            match=r"a value at the site 'input' has shape \[\(2, 3\)\] \(or a multiple of 2 rows\), got",
        ):
            ask(z)


@dataclass(frozen=True)
class Mixed:
    """An invertible linear change of variable."""

    matrix = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.0, 0.0, 3.0]], dtype=torch.float64)

    def analysis(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return coefficients @ torch.linalg.inv(self.matrix).T


@dataclass(frozen=True)
class Spectrum:
    """The full complex spectrum."""

    def analysis(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)

    def synthesis(self, coefficients: Tensor) -> Tensor:
        return torch.fft.ifft(coefficients).real


def test_domains_change_the_variable_not_the_score() -> None:
    problem = posed()
    mixed = problem.in_domain(Mixed())
    inverse = torch.linalg.inv(Mixed.matrix)
    assert torch.allclose(mixed.score(), problem.score())
    assert torch.allclose(mixed.grad(), slope(X) @ inverse)  # type: ignore[arg-type]
    twice = mixed.in_domain(Mixed())
    assert torch.allclose(twice.score(twice.point), problem.score())
    assert torch.allclose(twice.grad(), slope(X) @ inverse @ inverse)  # type: ignore[arg-type]
    assert torch.allclose(twice.at_site().point, X)  # type: ignore[arg-type]
    assert torch.allclose(twice.analysis(X), twice.point)  # type: ignore[arg-type]


def test_integrated_gradients_in_the_spectrum_are_complete() -> None:
    """Re(Δc · conj(∂F)) sums to f(x) - f(0): for the square, exactly |c|²/N per frequency."""
    found = pb.explain(Cubes(), X, target=1, method=pb.InDomain(Spectrum(), pb.IntegratedGradients(steps=4)))
    assert torch.allclose(found.values, torch.fft.fft(X).abs().square() / 3)  # type: ignore[arg-type]
    assert float(found.diagnostics["gap"].abs().max()) <= 1e-12


def test_a_domain_needs_one_tensor() -> None:
    problem = pb.pose(lambda a, b: a + b, (X, X), target=0)
    with pytest.raises(
        pb.MethodError,
        match=r'a domain needs one tensor, but 2 input leaves are explained: a, b.*site="input:a"',
    ):
        problem.in_domain(Mixed())


def test_rules_keep_scores_and_need_modules() -> None:
    problem = posed()
    assert torch.equal(problem.under([]).score(), problem.score())
    with pytest.raises(pb.MethodError, match=r'uncovered is "error" or "gradient", got \'ignore\''):
        problem.under([], uncovered="ignore")
    rules: list[Rule] = [object()]  # type: ignore[list-item]
    with pytest.raises(
        pb.MethodError, match=r"rules need a torch\.nn\.Module; a plain callable cannot be looked into"
    ):
        pb.pose(cubes, X, target=0).under(rules).grad()


def test_shared_work_is_done_once_per_memo() -> None:
    problem, calls = posed(), []
    memo: dict[object, object] = {}
    for _ in range(2):
        problem.fresh(memo).shared("key", lambda: calls.append(1))
    assert len(calls) == 1
    problem.shared("key", lambda: calls.append(2))
    problem.shared("key", lambda: calls.append(2))
    assert len(calls) == 3
    fresh = problem.fresh(memo)
    fresh.record(gap=1)
    assert "gap" not in problem.diagnostics
    # another place is another problem: nothing is shared with it
    assert problem.fresh({}).at(X).memo is None


def test_notes_are_kept_once() -> None:
    problem = posed()
    problem.note("a")
    problem.note("a")
    assert problem.diagnostics["notes"].count("a") == 1
    assert problem.fresh().diagnostics["notes"] == problem.diagnostics["notes"]
