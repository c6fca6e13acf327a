"""captum's classes as our methods: equal to direct use, and never on the user's own modules."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from captum import attr as captum_attr
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.captum_adapter import classes
from pullback.attribution.spelling import parse_method
from pullback.core.errors import MethodError
from tests.golden_net import example, fill, largest, tiny_cnn

X = example(3, 3, 8, 8)
MASK = (torch.arange(192) % 4).reshape(1, 3, 8, 8)
REFERENCES = example(2, 3, 8, 8) * 0.2
# name -> parameters of our form; the same go to captum's attribute
CASES: dict[str, dict[str, Any]] = {
    "Saliency": {"abs": False},
    "InputXGradient": {},
    "IntegratedGradients": {"n_steps": 5, "method": "riemann_middle"},
    "DeepLift": {},
    "GuidedBackprop": {},
    "Deconvolution": {},
    "FeatureAblation": {"feature_mask": MASK},
    "Occlusion": {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)},
    "ShapleyValues": {"feature_mask": MASK},
}


def found(method: Any, x: Tensor = X, **settings: Any) -> Tensor:
    values = pb.explain(tiny_cnn(), x, target=1, method=method, **settings).values
    assert isinstance(values, Tensor)
    return values


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Input Tensor 0|Setting")
def test_as_captum_gives_it_directly(name: str) -> None:
    theirs = getattr(captum_attr, name)(tiny_cnn()).attribute(X.clone(), target=1, **CASES[name])
    assert float(theirs.detach().abs().max()) > 1e-4
    assert largest(found(pb.Captum(name, CASES[name])), theirs) < 1e-12


@pytest.mark.filterwarnings("ignore:Setting")
def test_distributions_of_baselines() -> None:
    theirs = captum_attr.DeepLiftShap(tiny_cnn()).attribute(X.clone(), baselines=REFERENCES, target=1)
    ours = found(pb.Captum("DeepLiftShap", baseline=pb.Dataset(REFERENCES)))
    assert largest(ours, theirs) < 1e-12
    with pytest.raises(MethodError, match="DeepLiftShap refuses: AssertionError"):
        found(pb.Captum("DeepLiftShap"))


@pytest.mark.filterwarnings("ignore:Setting|Input Tensor")
def test_layer_relevance_of_captum() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    fill(net)
    x = example(2, 6)
    theirs = captum_attr.LRP(copy.deepcopy(net)).attribute(x.clone(), target=1)
    version = net[0].weight._version
    assert largest(pb.explain(net, x, target=1, method="captum('LRP')").values, theirs) < 1e-12
    # captum's LRP copies all weights back into place, which would break a graph the user still holds
    assert net[0].weight._version == version


STOCHASTIC: dict[str, dict[str, Any]] = {
    "GradientShap": {"n_samples": 3, "stdevs": 0.2},
    "ShapleyValueSampling": {"feature_mask": MASK, "n_samples": 2},
    "NoiseTunnel": {"attribution_method": "Saliency", "nt_samples": 3, "stdevs": 0.5},
}


@pytest.mark.parametrize("name", [*CASES, *STOCHASTIC])
def test_rows_do_not_depend_on_batch_mates_or_chunks(name: str) -> None:
    method = pb.Captum(name, CASES.get(name, STOCHASTIC.get(name)), seed=4)
    whole = found(method)
    singles = torch.cat([found(method, row[None]) for row in X])
    assert largest(whole, singles) < 1e-12
    assert largest(whole, found(method, chunk=2)) < 1e-12


@pytest.mark.parametrize("name", STOCHASTIC)
def test_draws_follow_the_seed_and_leave_the_global_state(name: str) -> None:
    net, method = tiny_cnn(), pb.Captum(name, STOCHASTIC[name])
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    first = pb.explain(net, X[:1], target=1, method=method).values
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)  # noqa: NPY002
    torch.rand(3)
    assert torch.equal(found(method, X[:1]), first)
    assert not torch.equal(found(method, X[:1], seed=1), first)


@pytest.mark.parametrize(
    "name", ["Saliency", "IntegratedGradients", "DeepLift", "GuidedBackprop", "FeatureAblation"]
)
def test_a_layer_site_is_the_rest_of_the_net(name: str) -> None:
    """Explaining at the output of module 3 is explaining the modules after it on what they receive."""
    net = tiny_cnn()
    head = net[4:]
    with torch.no_grad():
        inner = net[:4](X)
    ours = pb.explain(net, X, target=1, site="3", method=pb.Captum(name)).values
    assert largest(ours, pb.explain(head, inner, target=1, method=pb.Captum(name)).values) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_users_model_is_never_touched(name: str) -> None:
    net = tiny_cnn()
    state, keys = copy.deepcopy(net.state_dict()), [set(vars(part)) for part in net.modules()]
    pb.explain(net, X, target=1, method=pb.Captum(name, CASES[name]))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in net.modules())
    assert [set(vars(part)) for part in net.modules()] == keys
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_gaps_and_evaluations_are_recorded() -> None:
    lift = pb.explain(tiny_cnn(), X, target=1, method=pb.Captum("DeepLift"))
    assert float(lift.diagnostics["gap"].abs().max()) < 1e-14
    assert lift.diagnostics["evaluations"].tolist() == [2, 2, 2]
    assert "functional ones pass their gradient" in lift.diagnostics["notes"][0]
    path = pb.explain(tiny_cnn(), X, target=1, method=pb.Captum("IntegratedGradients", {"n_steps": 9}))
    assert path.diagnostics["evaluations"].tolist() == [9, 9, 9]
    change = path.score - pb.pose(tiny_cnn(), torch.zeros_like(X), target=1).score()
    assert largest(path.diagnostics["gap"], path.values.flatten(1).sum(1) - change) < 1e-14


def test_per_example_targets_follow_their_rows() -> None:
    """Were rows and examples mixed up when captum repeats them, targets would be."""
    target = torch.tensor([2, 0, 1])
    for name in ("IntegratedGradients", "DeepLift", "FeatureAblation", "Saliency"):
        whole = pb.explain(tiny_cnn(), X, target=target, method=pb.Captum(name)).values
        for row in range(3):
            alone = pb.explain(
                tiny_cnn(), X[row : row + 1], target=int(target[row]), method=pb.Captum(name)
            ).values
            assert largest(whole[row : row + 1], alone) < 1e-12


def test_several_inputs_and_smoothing_of_captum() -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a.square() * b).sum(1, keepdim=True)

    a, b = example(2, 4), example(2, 4) + 0.5
    product = pb.explain(Pair(), (a, b), target=0, method=pb.Captum("InputXGradient")).values
    assert isinstance(product, dict)
    assert largest(product["a"], 2 * a.square() * b) < 1e-14
    assert largest(product["b"], a.square() * b) < 1e-14
    ablated = pb.explain(Pair(), (a, b), target=0, method=pb.Captum("FeatureAblation")).values
    assert isinstance(ablated, dict)
    assert largest(ablated["a"], a.square() * b) < 1e-14


def test_text_round_trips_and_equal_methods_are_equal() -> None:
    method = pb.Captum(
        "integrated_gradients", {"n_steps": 8, "method": "riemann_left"}, baseline=pb.Blur(sigma=2.0)
    )
    assert method.name == "IntegratedGradients"
    assert parse_method(repr(method)) == method
    assert hash(parse_method(repr(method))) == hash(method)
    assert (
        parse_method('captum("IntegratedGradients", {"n_steps": 8, "method": "riemann_left"}, blur(2.0))')
        == method
    )
    assert pb.Captum("FeatureAblation", {"feature_mask": MASK}) == pb.Captum(
        "FeatureAblation", {"feature_mask": MASK.clone()}
    )
    nested = pb.SmoothGrad(pb.Captum("DeepLift"), samples=2)
    assert parse_method(repr(nested)) == nested


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("DeepLif",), "captum has no class 'DeepLif' that explains an input. Nearest: \"DeepLift\""),
        (("LayerGradCam",), "A layer method is an input method at another site"),
        (("NeuronGradient",), "A neuron method is an input method with another target"),
        (("LimeBase",), "captum has no class 'LimeBase'"),
        (
            ("IntegratedGradients", {"steps": 8}),
            "captum's IntegratedGradients has no parameter 'steps'. Nearest: \"n_steps\"",
        ),
        (("Saliency", {"target": 1}), r"captum's target is not a parameter here: use target= of explain\(\)"),
        (("DeepLift", {"baselines": 0}), "use baseline="),
        (
            ("DeepLift", {"custom_attribution_func": len}),
            "plain value or a tensor.*got builtin_function_or_method",
        ),
        (("DeepLift", 3), "parameters are given by name"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(arguments: tuple[Any, ...], text: str) -> None:
    with pytest.raises(MethodError, match=text):
        pb.Captum(*arguments)


def test_refusals_at_the_call() -> None:
    with pytest.raises(MethodError, match="takes no baseline"):
        found("captum('Saliency')", baseline="blur")
    with pytest.raises(MethodError, match=r"needs an nn\.Module"):
        pb.explain(lambda z: z.sum(1, keepdim=True), example(1, 4), target=0, method=pb.Captum("DeepLift"))
    with pytest.raises(MethodError, match="LRP refuses: TypeError: Module of type"):
        found(pb.Captum("LRP"))
    with pytest.raises(MethodError, match="no module '1x'"):
        found(pb.Captum("GuidedGradCam", {"layer": "1x"}))
    assert found(pb.Captum("GuidedGradCam", {"layer": "3"})).shape == X.shape


def test_every_class_that_explains_an_input_is_known() -> None:
    named = {"DeepLift", "DeepLiftShap", "LRP", "Lime", "KernelShap", "FeaturePermutation", "GuidedGradCam"}
    assert named | CASES.keys() | STOCHASTIC.keys() == classes().keys()


def test_threads_share_a_model() -> None:
    net, results = tiny_cnn(), []
    expected = found(pb.Captum("DeepLift"))

    def work() -> None:
        results.append(largest(pb.explain(net, X, target=1, method=pb.Captum("DeepLift")).values, expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert max(results) < 1e-14
