"""Models trained together are the models that train alone, whoever else is in the stack."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.evaluation import (
    PGD,
    Ensemble,
    Examples,
    Member,
    TrainSpec,
    View,
    multilayer_perceptron,
    train,
    train_ensemble,
)
from pullback.evaluation.attack import Bounds

DATA = torch.Generator().manual_seed(0)
X = torch.rand(120, 1, 6, 6, generator=DATA, dtype=torch.float64)
Y = (X[:, 0, :3].sum((1, 2)) > X[:, 0, 3:].sum((1, 2))).long()
RANK = torch.rand(120, 36, generator=DATA).argsort(1).argsort(1).to(torch.int16)
FILL = torch.rand(1, 6, 6, generator=DATA, dtype=torch.float64)
EXAMPLES = Examples(X, Y, {"a": RANK, "b": 35 - RANK}, FILL)
FEW = EXAMPLES.part(torch.arange(40))
VIEWS = (View("a", 5, "top"), View("a", 9, "bottom"), View("b", 9, "top"), View())
MEMBERS = [Member(seed, view) for seed, view in itertools.product((0, 1), VIEWS)]
SPEC = TrainSpec(epochs=3, batch=32, learning_rate=5e-3)


def perceptron() -> nn.Module:
    return multilayer_perceptron(36, 2, (8, 8)).double()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


def furthest(one: Ensemble, other: Ensemble, x: Tensor = X) -> float:
    """The largest difference between the logits of the members of two ensembles."""
    with torch.no_grad():
        pairs = zip(one.runs, other.runs, strict=True)
        return max(float((a.model(x) - b.model(x)).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("way", ["stack", "vmap"])
@pytest.mark.parametrize(
    ("attack", "bounds"),
    [(None, None), (PGD("l2", 0.3, steps=2), None), (PGD("linf", 0.1, steps=2), (0.0, 1.0))],
)
def test_together_as_alone(way: str, attack: PGD | None, bounds: Bounds) -> None:
    spec = replace(SPEC, attack=attack, bounds=bounds)
    settings = {"validation": FEW, "test": EXAMPLES}
    alone = train_ensemble(perceptron, EXAMPLES, MEMBERS, spec, vectorize="loop", **settings)
    together = train_ensemble(perceptron, EXAMPLES, MEMBERS, spec, vectorize=way, **settings)
    # float64: only the order of sums differs
    assert furthest(alone, together) < 1e-10
    assert torch.equal(alone.predicted, together.predicted)
    for one, other in zip(alone.runs, together.runs, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-6)  # epoch sums are kept in float32
        for name in ("train_accuracy", "accuracy", "converged", "collapsed"):
            assert getattr(one, name) == getattr(other, name)


def test_in_single_precision_accuracies_agree_within_one_image() -> None:
    examples = Examples(X.float(), Y, EXAMPLES.ranks, FILL.float())
    spec = replace(SPEC, epochs=10)
    factory = lambda: multilayer_perceptron(36, 2, (8, 8))  # noqa: E731
    ways = [
        train_ensemble(factory, examples, MEMBERS, spec, test=examples, vectorize=way)
        for way in ("loop", "stack")
    ]
    alone, together = ((found.predicted == Y).sum(1) for found in ways)
    assert len(set(alone.tolist())) > 1
    assert int((alone - together).abs().max()) <= 1


def test_a_member_is_the_model_that_train_gives_for_its_masked_data() -> None:
    member = Member(5, View("a", 9, "bottom"))
    kept = (RANK >= 27).reshape(120, 1, 6, 6)
    points = torch.where(kept, X, FILL)
    expected = train(perceptron, points, Y, replace(SPEC, seed=5))
    (found,) = train_ensemble(perceptron, EXAMPLES, [member], SPEC, vectorize="stack").runs
    assert torch.allclose(found.model(X), expected.model(X), atol=1e-10)
    assert found.train_accuracy == expected.train_accuracy


@pytest.mark.parametrize("chunk", [1, 3])
def test_who_trains_together_and_in_which_order_does_not_matter(chunk: int) -> None:
    whole = train_ensemble(perceptron, EXAMPLES, MEMBERS, SPEC, vectorize="stack")
    parts = train_ensemble(perceptron, EXAMPLES, MEMBERS[::-1], SPEC, vectorize="stack", chunk=chunk)
    assert furthest(whole, Ensemble(parts.runs[::-1], None)) < 1e-12
    again = train_ensemble(perceptron, EXAMPLES, MEMBERS[2:3], SPEC, vectorize="stack", memory_budget=1)
    assert furthest(Ensemble(whole.runs[2:3], None), again) < 1e-12


def test_seeds_decide_weights_and_order_of_the_data() -> None:
    before = torch.get_rng_state()
    same, again, other = train_ensemble(
        perceptron, EXAMPLES, [Member(0), Member(0), Member(1)], SPEC, vectorize="stack"
    ).runs
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(same.model(X), again.model(X))
    assert not torch.allclose(same.model(X), other.model(X), atol=1e-3)


def test_mapped_convolutions_equal_the_loop_after_twenty_steps() -> None:
    examples = Examples(X.float(), Y, EXAMPLES.ranks, FILL.float())
    spec = replace(SPEC, epochs=5, learning_rate=1e-3)
    alone = train_ensemble(convolutional, examples, MEMBERS[:4], spec, vectorize="loop")
    together = train_ensemble(convolutional, examples, MEMBERS[:4], spec, vectorize="vmap")
    assert furthest(alone, together, X.float()) < 1e-5
    for one, other in zip(alone.runs, together.runs, strict=True):
        assert torch.allclose(one.model[1].running_mean, other.model[1].running_mean, atol=1e-6)
        assert int(other.model[1].num_batches_tracked) == 20


@pytest.mark.parametrize("way", ["loop", "stack"])
def test_early_stopping_keeps_the_weights_of_the_best_epoch(way: str) -> None:
    # validation labels are the opposite: the more is learnt, the worse, so an early epoch is the best
    against = Examples(X, 1 - Y, EXAMPLES.ranks, FILL)
    spec = replace(SPEC, epochs=12, learning_rate=0.01)
    stopped = train_ensemble(
        perceptron, EXAMPLES, MEMBERS, replace(spec, patience=2), validation=against, vectorize=way
    )
    assert len({len(run.losses) for run in stopped.runs}) > 1
    for member, run in zip(MEMBERS, stopped.runs, strict=True):
        one = [member]
        lengths = range(1, len(run.losses) + 1)
        course = [
            train_ensemble(
                perceptron, EXAMPLES, one, replace(spec, epochs=n), validation=against, vectorize="loop"
            ).runs[0]
            for n in lengths
        ]
        best = max(course, key=lambda trained: trained.accuracy)  # the first of equals
        assert run.accuracy == best.accuracy
        assert torch.allclose(run.model(X), best.model(X), atol=1e-10)
        assert len(run.losses) in (12, course.index(best) + 3)


def test_memory_on_accelerators_takes_another_path_with_the_same_masks() -> None:
    rows = torch.tensor([[3, 1, 4], [1, 5, 9]])
    whose = [0, 1, 1, 0]
    for fill in (0.0, FILL):
        examples = replace(EXAMPLES, fill=fill)
        found = examples.seen_by(rows, VIEWS, whose)
        assert torch.equal(found, examples._seen_at_once(rows, VIEWS, whose))
        for shown, view, number in zip(found, VIEWS, whose, strict=True):
            assert torch.equal(shown, examples.seen(rows[number], view))
    colour = Examples(X.expand(-1, 3, -1, -1), Y, {"a": RANK}, 0.5)
    kept = (colour.seen(torch.arange(120), View("a", 5)) == X).all(1)
    assert torch.equal(kept.flatten(1), RANK < 5)


@pytest.mark.parametrize("factory", [perceptron, lambda: convolutional().double()])
def test_auto_gives_what_every_way_gives(factory: Callable[[], nn.Module]) -> None:
    found = train_ensemble(factory, EXAMPLES, MEMBERS[:3], replace(SPEC, epochs=1), vectorize="auto")
    alone = train_ensemble(factory, EXAMPLES, MEMBERS[:3], replace(SPEC, epochs=1), vectorize="loop")
    assert furthest(found, alone) < 1e-10


def test_dropout_trains_one_by_one_and_is_refused_otherwise() -> None:
    def dropping() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 2)).double()

    auto = train_ensemble(dropping, EXAMPLES, MEMBERS[:2], SPEC)
    assert furthest(auto, train_ensemble(dropping, EXAMPLES, MEMBERS[:2], SPEC, vectorize="loop")) == 0
    with pytest.raises(MethodError, match="Dropout at '1', which is not a linear layer"):
        train_ensemble(dropping, EXAMPLES, MEMBERS, SPEC, vectorize="stack")
    with pytest.raises(MethodError, match=r"random dropout at '1'. Use vectorize=\"loop\""):
        train_ensemble(dropping, EXAMPLES, MEMBERS, SPEC, vectorize="vmap")


def test_a_dead_member_is_flagged_and_the_others_are_not() -> None:
    def fragile() -> nn.Module:
        model = multilayer_perceptron(36, 2, (8,)).double()
        if torch.initial_seed() == 1:
            nn.init.constant_(model[1].bias, -100.0)
        return model

    runs = train_ensemble(
        fragile, EXAMPLES, [Member(0), Member(1)], replace(SPEC, epochs=20), vectorize="stack"
    ).runs
    assert [run.collapsed for run in runs] == [False, True]
    assert not runs[1].converged


def test_errors_say_what_was_given() -> None:
    with pytest.raises(MethodError, match="vectorize='fast'"):
        train_ensemble(perceptron, EXAMPLES, MEMBERS, SPEC, vectorize="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 members"):
        train_ensemble(perceptron, EXAMPLES, [], SPEC)
    with pytest.raises(InputError, match=r"Views of \['c'\]"):
        train_ensemble(perceptron, EXAMPLES, [Member(0, View("c", 3))], SPEC)
    with pytest.raises(MethodError, match="patience=1 was given without validation"):
        train_ensemble(perceptron, EXAMPLES, MEMBERS, replace(SPEC, patience=1))
    with pytest.raises(MethodError, match="patience=0"):
        TrainSpec(patience=0)
    with pytest.raises(InputError, match=r"Ranks 'a' of shape \(120, 7\)"):
        Examples(X, Y, {"a": RANK[:, :7]})
    with pytest.raises(MethodError, match=r"a Linear, which is not an nn.Sequential"):
        train_ensemble(
            lambda: nn.Linear(6, 2).double(), Examples(X[:, 0, 0], Y), MEMBERS[3:4], SPEC, vectorize="stack"
        )
