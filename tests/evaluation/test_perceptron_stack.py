"""The closed-form gradients of a stack against autograd on each model alone, and how a way of training is chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.errors import MethodError
from pullback.evaluation import PGD, Examples, Member, TrainSpec, View, ensembles, multilayer_perceptron
from pullback.evaluation.ensembles import fastest
from pullback.evaluation.perceptron_stack import cross_entropy_gradient, perceptron_stack
from pullback.evaluation.stacking import vmapped_stack
from pullback.evaluation.views import Shown

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(), "in place": lambda: nn.ReLU(inplace=True), "elu in place": lambda: nn.ELU(inplace=True),
    "gelu": lambda: nn.GELU(), "tanh": lambda: nn.Tanh(), "leaky": lambda: nn.LeakyReLU(0.1), "identity": nn.Identity,
}  # fmt: skip
X = torch.randn(3, 7, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (3, 7), generator=torch.Generator().manual_seed(1))


def models(activation: Callable[[], nn.Module]) -> list[nn.Sequential]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            nn.Sequential(
                nn.Flatten(), nn.Tanh(), nn.Linear(6, 5), activation(), nn.Linear(5, 5, bias=False), activation(),
                nn.Linear(5, 4),
            ).double()
            for _ in X
        ]  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("way", [perceptron_stack, vmapped_stack])
def test_gradients_are_those_of_each_model_alone(name: str, way: Callable[..., object]) -> None:
    alone = models(ACTIVATIONS[name])
    stack = way(copy.deepcopy(alone))
    before = X.clone()
    losses, logits = stack.learn(X.clone(), Y)
    gradient = stack.input_gradient(X, lambda z: cross_entropy_gradient(z, Y))
    assert torch.equal(X, before)
    # steps of 1 against the gradient, so that the weights become weight - gradient
    torch.optim.SGD(stack.parameters, lr=1.0).step()
    for member, model in enumerate(alone):
        point = X[member].clone().requires_grad_()
        result = model(point)
        loss = F.cross_entropy(result, Y[member])
        loss.backward()
        assert torch.allclose(losses[member], loss, atol=1e-12)
        assert torch.allclose(logits[member].mT, result, atol=1e-12)
        # of the summed losses, not their mean
        assert torch.allclose(gradient[member], 7 * point.grad, atol=1e-12)
        moved = stack.module(member)
        for new, old in zip(moved.parameters(), model.parameters(), strict=True):
            assert torch.allclose(new, old - old.grad, atol=1e-12)


def test_the_optimizer_sees_every_weight_once() -> None:
    stack = perceptron_stack(models(nn.ReLU))
    assert sum(each.numel() for each in stack.parameters) == 3 * (6 * 5 + 5 + 5 * 5 + 5 * 4 + 4)
    stack.parameters[0].zero_()
    assert all(not bool(each.any()) for each in stack.state)


@pytest.mark.parametrize("fault", ["frozen", "tied"])
def test_frozen_and_tied_weights_are_not_stacked(fault: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    if fault == "frozen":
        model[0].bias.requires_grad_(False)
    else:
        model[2] = model[0]
    with pytest.raises(MethodError, match="shared or with frozen"):
        perceptron_stack([model])


@pytest.mark.parametrize("fill", [0.0, 0.3])
def test_what_views_show_is_the_same_written_down_or_made_anew(fill: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 6, generator=generator)
    rank = torch.rand(20, 6, generator=generator).argsort(1).argsort(1)
    examples = Examples(x, torch.zeros(20, dtype=torch.long), {"a": rank}, fill)
    views = [View("a", 2), View(), View("a", 2, "bottom"), View("a", 2)]
    whose = [0, 1, 1, 0]
    # three distinct views
    needed = 3 * 20 * 6 * 4
    anew, written = (Shown(examples, views, whose, memory) for memory in (needed - 1, needed))
    assert (anew.bytes, written.bytes) == (0, needed)
    for rows in (torch.tensor([[3, 1, 4], [1, 5, 9]]), torch.tensor([2, 6, 5, 3]), torch.tensor([[0], [7]])):
        assert torch.equal(anew.batch(rows), written.batch(rows))
    shown = written.batch(torch.tensor([[3, 1, 4], [1, 5, 9]]))
    assert torch.equal(shown[1], x[[1, 5, 9]])
    kept = torch.where(rank[[1, 5, 9]] >= 4, x[[1, 5, 9]], torch.tensor(fill))
    assert torch.equal(shown[2], kept)


def chosen(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], members: int, factory: Callable[[], nn.Module]
) -> tuple[str, int]:
    """The way that is chosen where a step of a member takes so long, and how many steps of members were timed."""
    timed = 0

    def probe(way: str, *given: object) -> float:
        nonlocal timed
        count, steps = len(given[2]), given[4]
        timed += count * steps
        return seconds[way] * count * steps

    monkeypatch.setattr(ensembles, "_probed_seconds", probe)
    x = torch.rand(100, 1, 4, 4)
    examples = Examples(x, torch.zeros(100, dtype=torch.long))
    spec = TrainSpec(epochs=10, batch=10)
    every = [Member(seed) for seed in range(members)]
    return fastest(factory, factory(), examples, every, spec, members), timed


def test_auto_takes_the_faster_way_and_times_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def small() -> nn.Module:
        return multilayer_perceptron(16, 2, (8,))

    def large() -> nn.Module:
        return multilayer_perceptron(16, 2, (4096,))

    def convolutional() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))

    for factory, way in ((small, "stack"), (large, "stack"), (convolutional, "vmap")):
        found, timed = chosen(monkeypatch, {way: 1.0, "loop": 1.1}, 90, factory)
        assert (found, chosen(monkeypatch, {way: 1.1, "loop": 1.0}, 90, factory)[0]) == (way, "loop")
        # a hundredth of 90 members' 100 steps, at most
        assert 2 < timed <= 90
        # too little work to time anything: only small perceptrons are known to gain
        expected = "stack" if factory is small else "loop"
        assert chosen(monkeypatch, {}, 3, factory) == (expected, 0)
        assert chosen(monkeypatch, {}, 1, factory) == ("loop", 0)
    assert chosen(
        monkeypatch, {}, 90, lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16, 2))
    ) == ("loop", 0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_attack_climbs_to_where_the_ball_and_the_bounds_allow(norm: str) -> None:
    # cross-entropy of class 0 grows with x · w: the worst point of the ball is known
    w = torch.tensor([3.0, -4.0, 0.0, 1.0], dtype=torch.float64).reshape(1, 2, 2)
    x = torch.full((2, 1, 2, 2), 0.5, dtype=torch.float64).to(memory_format=torch.channels_last)

    def logits(points: Tensor) -> Tensor:
        score = (points * w).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)

    attack = PGD(norm, 0.2, steps=5)
    found = attack.perturb(logits, x, torch.zeros(2, dtype=torch.long), bounds=None)
    step = 0.2 * (w / w.norm() if norm == "l2" else w.sign())
    assert torch.allclose(found, x + step, atol=1e-9)
    starts = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    within = attack.perturb(logits, x, torch.zeros(2, dtype=torch.long), (0.45, 0.6), starts)
    assert float(within.min()) >= 0.45
    assert float(within.max()) <= 0.6
    # the largest components of the step are cut off at the bounds
    assert torch.allclose(within[:, 0, 0], torch.tensor([0.6, 0.45], dtype=torch.float64), atol=1e-9)
    assert bool((x == 0.5).all())
