"""Parameter randomization and the random logit: by hand on copies, closed forms, real digits, flags, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.controls import EdgeDetector
from pullback.core.errors import InputError
from pullback.datasets import mnist
from pullback.evaluation import TrainSpec, parameter_randomization, random_logit, train


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(classes: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 8), nn.Tanh(), nn.Linear(8, classes)
        ).double().eval()  # fmt: skip


def gradient(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).gather(1, target[:, None]).sum(), x)[0].flatten(1)


@pytest.mark.parametrize("order", ["cascading", "bottom_up", "independent"])
@pytest.mark.parametrize("draw", ["normal", "permutation"])
def test_layers_are_randomized_in_order_and_nothing_of_the_model_is(order: str, draw: str) -> None:
    """Which layers are new after each step is seen by a method that records the weights it is run with."""
    net, x, seen = network(), normal(3, 1, 8, 8), []
    before = copy.deepcopy(net.state_dict())

    class Recorder:
        def __call__(self, problem: Any) -> Tensor:
            seen.append({name: value.clone() for name, value in problem.posed.module.state_dict().items()})
            return pb.Gradient()(problem)

    state = torch.get_rng_state()
    result = parameter_randomization(net, x, method=Recorder(), order=order, draw=draw, ranking="signed")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    turn = ["5", "3", "0"] if order == "cascading" else ["0", "3", "5"]
    assert result.params["layers"] == turn
    target = net(x).argmax(1)
    for step, weights in enumerate(seen):
        new = {name for name, value in weights.items() if not torch.equal(value, before[name])}
        layers = turn[:step] if order != "independent" else turn[step - 1 : step] if step else []
        assert new == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        for name in new:
            value, old = weights[name], before[name]
            if draw == "permutation":
                assert torch.equal(value.flatten().sort().values, old.flatten().sort().values)
            elif value.numel() > 500:
                assert float(value.std()) == pytest.approx(float(old.std()), rel=0.1)
        changed = copy.deepcopy(net)
        changed.load_state_dict(weights)
        maps, clean = gradient(changed, x, target), gradient(net, x, target)
        for row in range(3):
            correlation = spearmanr(maps[row], clean[row]).statistic
            assert float(result.curve[row, step]) == pytest.approx(correlation, abs=1e-9)
    after = result.curve[:, 1:]
    torch.testing.assert_close(result.values, after.mean(1) if order == "independent" else after[:, -1])
    assert result.curve[:, 0].tolist() == pytest.approx([1.0] * 3)


def test_real_digits_tell_methods_apart() -> None:
    """Golden: the gradient loses all likeness, gradient times input over black pixels keeps it, edges are the model's not."""
    digits, test = mnist()[:1500], mnist(split="test")[:60]
    x, y = digits.x.flatten(1), digits.y

    def architecture() -> nn.Module:
        return nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    trained = train(architecture, x, y, TrainSpec(epochs=4))
    net = nn.Sequential(nn.Flatten(), trained.model)
    images = test.x.reshape(-1, 1, 28, 28)
    for ranking in ("absolute", "signed"):
        plain = parameter_randomization(net, images, method="gradient", ranking=ranking)
        assert abs(plain.mean()) < 0.05
    product = parameter_randomization(net, images, method="input_x_gradient")
    assert product.mean() > 0.8
    assert float(product.details["spearman_nonzero"][:, -1].mean()) < 0.5
    edges = parameter_randomization(net, images, method=EdgeDetector())
    for name in ("spearman", "cosine", "spearman_nonzero", "cosine_nonzero"):
        assert edges.details[name].flatten().tolist() == pytest.approx([1.0] * 240)
    image = parameter_randomization(net, images[:4], method="gradient", similarity="ssim")
    assert image.curve[:, 0].tolist() == pytest.approx([1.0] * 4)
    assert bool((image.values < 0.5).all())
    assert torch.equal(image.values, image.details["ssim"][:, -1])


def test_the_nonzero_variant_leaves_zeros_of_the_input_out() -> None:
    net, x = network(), normal(2, 1, 8, 8).clamp_min(0)
    result = parameter_randomization(net, x, method="gradient", layers=["5"])
    target = net(x).argmax(1)
    changed = parameter_randomization(net, x, method="gradient", layers=["5"], similarity="cosine")
    assert torch.equal(changed.values, result.details["cosine"][:, -1])
    maps: list[Tensor] = []

    class Recorder:
        def __call__(self, problem: Any) -> Tensor:
            maps.append(pb.Gradient()(problem))
            return maps[-1]

    parameter_randomization(net, x, method=Recorder(), layers=["5"])
    clean, after = (each.flatten(1).abs() for each in maps)
    torch.testing.assert_close(clean, gradient(net, x, target).abs())
    for row in range(2):
        keep = x[row].flatten() != 0
        expected = spearmanr(clean[row][keep], after[row][keep]).statistic
        assert float(result.details["spearman_nonzero"][row, -1]) == pytest.approx(expected, abs=1e-9)


def test_the_class_is_kept_when_the_model_forgets_it() -> None:
    """Also for a target that is the predicted class's probability: the index is that of the model itself."""
    net, x, asked = network(), normal(6, 1, 8, 8), []

    class Recorder:
        def __call__(self, problem: Any) -> Tensor:
            asked.append(problem.posed.targets[0].index.tolist())
            return pb.Gradient()(problem)

    for target in (None, pb.Probability(), 2):
        asked.clear()
        parameter_randomization(net, x, method=Recorder(), target=target)
        expected = [2] * 6 if target == 2 else net(x).argmax(1).tolist()
        assert asked == [expected] * 4


def test_tied_parameters_stay_tied_and_nested_layers_are_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.scale = nn.Parameter(torch.tensor([1.0, 2, 3, 4]))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh()) * self.scale

    net, seen = Tied().double(), []

    class Recorder:
        def __call__(self, problem: Any) -> Tensor:
            module = problem.posed.module
            seen.append((module.first.weight.clone(), module.second.weight.clone(), module.scale.clone()))
            return pb.Gradient()(problem)

    result = parameter_randomization(net, normal(2, 4), method=Recorder(), order="independent")
    assert result.params["layers"] == ["", "first", "second"]
    for step, (first, second, scale) in enumerate(seen):
        assert torch.equal(first, second)
        assert torch.equal(first, net.first.weight) == (step < 2)
        assert torch.equal(scale, net.scale) == (step != 1)


def test_the_random_logit_of_opposite_classes() -> None:
    """Two logits, one the other's negative: the same magnitudes, the opposite signs."""
    net = nn.Linear(6, 2, bias=False).double()
    net.weight.data[1] = -net.weight.data[0]
    x = normal(3, 6)
    assert random_logit(net, x, method="gradient").values.tolist() == pytest.approx([1.0] * 3)
    for similarity in ("spearman", "cosine"):
        signed = random_logit(net, x, method="gradient", ranking="signed", similarity=similarity)
        assert signed.values.tolist() == pytest.approx([-1.0] * 3)


def test_the_other_class_is_random_by_example_and_never_the_same() -> None:
    net, x, target = network(4), normal(300, 1, 8, 8), torch.arange(300) % 4
    result = random_logit(net, x, method="gradient", target=target)
    other = result.details["other"]
    assert not bool((other == target).any())
    # each of three other classes for a third of 300, a standard deviation of 8
    counts = torch.bincount((other - target) % 4, minlength=4).tolist()
    assert counts[0] == 0
    assert all(60 < count < 140 for count in counts[1:])
    for row in (5, 17):
        alone = random_logit(net, x[row : row + 1], method="gradient", target=target[row : row + 1])
        assert int(alone.details["other"]) == int(other[row])
        maps = [gradient(net, x[row : row + 1], each[row : row + 1])[0].abs() for each in (target, other)]
        assert float(result.values[row]) == pytest.approx(spearmanr(*maps).statistic, abs=1e-9)
        torch.testing.assert_close(alone.values[0], result.values[row])
    assert not torch.equal(
        random_logit(net, x, method="gradient", target=target, seed=1).details["other"], other
    )

    def own(x: Tensor, index: Tensor) -> Tensor:
        return gradient(net, x, index)

    by_call = random_logit(net, x[:4], own, target=target[:4], other=other[:4])
    torch.testing.assert_close(by_call.values, result.values[:4])


def test_seeds_chunks_and_batch_mates() -> None:
    net, x = network(), normal(4, 1, 8, 8)
    first, again, other = (
        parameter_randomization(net, x, method="gradient", seed=seed).curve for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first[:, 1:], other[:, 1:])
    alone = parameter_randomization(net, x[2:3], method="gradient").curve
    torch.testing.assert_close(alone[0], first[2])
    torch.testing.assert_close(parameter_randomization(net, x, method="gradient", chunk=3).curve, first)


def test_collapsed_models_are_flagged() -> None:
    net = nn.Linear(4, 3).double()
    net.weight.data.zero_()
    for metric in (parameter_randomization, random_logit):
        with pytest.warns(
            UserWarning, match=f"{metric.__name__} is undefined .* for 2 of 2 examples: a map is constant"
        ):
            assert bool(metric(net, normal(2, 4), method="gradient").values.isnan().all())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"order": "random"}, "order='random' was given. Expected 'cascading', 'bottom_up', 'independent'"),
        ({"draw": "zero"}, "draw='zero' was given. Expected 'normal', 'permutation'"),
        ({"similarity": "l2"}, "similarity='l2' was given. Expected 'spearman', 'ssim', 'cosine'"),
        ({"ranking": "abs"}, "ranking='abs' was given. Expected 'absolute', 'signed'"),
        ({"layers": ["4"]}, "layers has '4', a module without parameters"),
        ({"layers": ["7"]}, "layers has '7', which the model has not. Nearest:"),
        ({"layers": []}, "no layers with parameters to randomize"),
        ({"similarity": "ssim", "model": nn.Linear(4, 3), "x": torch.ones(2, 4)}, 'similarity="ssim" was given for attributions of shape'),
        ({"model": torch.sin}, "A model of type builtin.* was given. Expected a torch.nn.Module"),
        ({"method": None}, "cannot be made again was given"),
        ({"method": None, "attribution": lambda x, target: x}, "would explain the model it was written for"),
        ({"attribution": torch.ones(2, 1, 8, 8)}, r"The attribution given differs from what Gradient\("),
    ],
)  # fmt: skip
def test_errors(change: dict[str, Any], text: str) -> None:
    settings: dict[str, Any] = {
        "model": network(),
        "x": torch.ones(2, 1, 8, 8).double(),
        "method": "gradient",
        **change,
    }
    with pytest.raises(InputError, match=text):
        parameter_randomization(
            settings.pop("model"), settings.pop("x"), settings.pop("attribution", None), **settings
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": lambda output: output[:, 0]}, "which is no class. Expected class indices"),
        ({"other": torch.tensor([1, 0]), "target": torch.tensor([1, 1])}, r"other=\[1, 0\] was given for the classes \[1, 1\]"),
        ({"model": nn.Linear(4, 1)}, "was given, which is no class|without another class to choose"),
    ],
)  # fmt: skip
def test_errors_of_the_random_logit(change: dict[str, Any], text: str) -> None:
    settings: dict[str, Any] = {"model": nn.Linear(4, 3), **change}
    with pytest.raises(InputError, match=text):
        random_logit(settings.pop("model"), torch.ones(2, 4), method="gradient", **settings)
