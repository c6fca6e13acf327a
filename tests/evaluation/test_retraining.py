"""Training is repeatable and leaves the world alone; attacks against closed forms on linear models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError
from pullback.evaluation import PGD, TrainSpec, multilayer_perceptron, train

DATA = torch.Generator().manual_seed(0)
X = torch.rand(300, 8, generator=DATA)
Y = (X[:, 0] > X[:, 1]).long()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("attack", [None, PGD("l2", 0.1), PGD("linf", 0.05, steps=2)])
def test_equal_specs_give_equal_models_and_the_global_generator_is_untouched(attack: PGD | None) -> None:
    spec = TrainSpec(epochs=2, seed=3, attack=attack)
    before = torch.get_rng_state()
    first = train(small, X, Y, spec)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)  # another state of the global generator must not matter
    second = train(small, X, Y, spec)
    assert torch.equal(weights(first.model), weights(second.model))
    assert first.losses == second.losses
    other = train(small, X, Y, TrainSpec(epochs=2, seed=4, attack=attack))
    assert not torch.equal(weights(first.model), weights(other.model))


def test_the_seed_decides_the_initial_weights_and_the_architecture_not_the_order_of_the_data() -> None:
    def first_batch_and_weights(width: int, seed: int) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def factory() -> nn.Module:
            model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
            kept.append(weights(model).clone())
            model.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
            return model

        train(factory, X, Y, TrainSpec(epochs=1, batch=32, seed=seed))
        return kept[1], kept[0]

    batch, start = first_batch_and_weights(4, seed=0)
    wider_batch, _ = first_batch_and_weights(9, seed=0)
    other_batch, other_start = first_batch_and_weights(4, seed=1)
    assert torch.equal(batch, wider_batch)
    assert not torch.equal(batch, other_batch)
    assert not torch.equal(batch, X[:32])
    assert not torch.equal(start, other_start)


def test_one_full_batch_step_of_sgd_is_the_gradient_step_written_out() -> None:
    spec = TrainSpec(epochs=1, batch=300, learning_rate=0.5, optimizer="sgd", seed=1)
    starts: list[nn.Linear] = []

    def factory() -> nn.Module:
        model = nn.Linear(8, 2).double()
        starts.append(nn.Linear(8, 2).double())
        starts[-1].load_state_dict(model.state_dict())
        return model

    trained = train(factory, X.double(), Y, spec)
    weight, bias = starts[0].weight.detach(), starts[0].bias.detach()
    error = (X.double() @ weight.T + bias).softmax(1) - nn.functional.one_hot(Y).double()
    expected = weight - 0.5 * error.T @ X.double() / 300
    assert torch.allclose(trained.model.weight, expected, atol=1e-12)


def test_what_is_reported() -> None:
    seen: list[tuple[int, float]] = []
    spec = TrainSpec(epochs=30, batch=32, learning_rate=0.02)
    trained = train(small, X, Y, spec, validation=(X[:50], Y[:50]), progress=lambda *step: seen.append(step))
    assert not trained.model.training
    assert trained.train_accuracy == float((trained.model(X).argmax(1) == Y).double().mean())
    assert trained.train_accuracy > 0.95
    assert trained.accuracy == float((trained.model(X[:50]).argmax(1) == Y[:50]).double().mean())
    assert trained.converged
    assert not trained.collapsed
    assert seen == list(enumerate(trained.losses, start=1))
    assert trained.losses[-1] < trained.losses[0] / 2
    assert trained.seconds > 0
    assert train(small, X, Y, TrainSpec(epochs=1)).accuracy is None


def test_a_collapsed_model_is_reported() -> None:
    def dead() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        nn.init.constant_(model[0].bias, -100.0)
        return model

    trained = train(dead, X, Y, TrainSpec(epochs=1))
    assert trained.collapsed
    assert not trained.converged


def test_a_model_is_not_collapsed_for_learning_a_single_class_that_is_all_there_is() -> None:
    trained = train(small, X, torch.zeros(300, dtype=torch.long), TrainSpec(epochs=3))
    assert not trained.collapsed


def test_training_that_has_not_settled_is_not_converged() -> None:
    assert not train(small, X, Y, TrainSpec(epochs=1, batch=300)).converged


LINEAR = seeded(lambda: nn.Linear(5, 2).double())
POINT = torch.rand(7, 5, generator=DATA, dtype=torch.float64)
LABEL = torch.tensor([0, 1, 1, 0, 1, 0, 0])


@pytest.mark.parametrize("start", [None, 0])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_on_a_linear_model_the_attack_finds_the_closed_form(norm: str, start: int | None) -> None:
    # The worst point for label y lies along w_other - w_y: its unit vector (l2) or its sign (linf).
    away = (LINEAR.weight[1 - LABEL] - LINEAR.weight[LABEL]).detach()
    direction = away / away.norm(dim=1, keepdim=True) if norm == "l2" else away.sign()
    generator = None if start is None else torch.Generator().manual_seed(start)
    found = PGD(norm, radius=0.3, steps=60, step_size=0.3).perturb(LINEAR, POINT, LABEL, None, generator)
    assert torch.allclose(found, POINT + 0.3 * direction, atol=1e-10)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_attack_stays_in_the_ball_and_in_bounds_and_raises_the_loss(norm: str) -> None:
    model = seeded(lambda: multilayer_perceptron(8, 2, (16,)))
    attack = PGD(norm, radius=0.4)
    for generator in (None, torch.Generator().manual_seed(1)):
        found = attack.perturb(model, X, Y, (0.0, 1.0), generator)
        delta = found - X
        length = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
        assert float(length.max()) <= 0.4 * (1 + 1e-5)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        before, after = (
            nn.functional.cross_entropy(model(points), Y, reduction="none") for points in (X, found)
        )
        # Not all: near a kink of the network a step along the gradient may overshoot.
        assert float((after > before).double().mean()) > 0.95
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not found.requires_grad


def test_the_attack_on_one_example_does_not_depend_on_the_others() -> None:
    model = seeded(lambda: multilayer_perceptron(8, 2, (16,)).double())
    attack = PGD("l2", radius=0.4)
    together = attack.perturb(model, X.double(), Y)
    alone = torch.cat([attack.perturb(model, X[i : i + 1].double(), Y[i : i + 1]) for i in range(10)])
    assert torch.allclose(together[:10], alone, atol=1e-10)


def test_the_default_step_size_and_a_given_one() -> None:
    one = PGD("linf", radius=0.5, steps=1).perturb(LINEAR, POINT, LABEL, None)
    assert torch.allclose((one - POINT).abs(), torch.tensor(0.5, dtype=torch.float64))  # 2.5 radii, projected
    short = PGD("l2", radius=0.5, steps=2, step_size=0.1).perturb(LINEAR, POINT, LABEL, None)
    assert torch.allclose((short - POINT).norm(dim=1), torch.tensor(0.2, dtype=torch.float64))


def test_a_zero_gradient_leaves_the_point_where_it_is() -> None:
    model = nn.Linear(5, 2).double()
    nn.init.zeros_(model.weight)
    assert torch.equal(PGD("l2", 1.0).perturb(model, POINT, LABEL, None), POINT)


def test_errors_say_what_was_given() -> None:
    with pytest.raises(MethodError, match="norm='l1' was given"):
        PGD("l1", 1.0)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="radius=-1"):
        PGD("l2", -1)
    with pytest.raises(MethodError, match="optimizer='lion'"):
        TrainSpec(optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="epochs=0"):
        TrainSpec(epochs=0)
    with pytest.raises(InputError, match=r"x of shape \(300, 8\) and y of shape \(5,\)"):
        train(small, X, Y[:5], TrainSpec())
