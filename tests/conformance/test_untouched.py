"""The user's model, inputs and process are as before after every call, whatever raises wherever."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb

from .fingerprint import assert_untouched
from .methods import INSTANCES, NAMES, explain, images, relative, smooth_net, values
from .nets import NETS, built


@pytest.mark.parametrize("name", NAMES)
def test_no_method_leaves_a_trace(name: str) -> None:
    net, x = smooth_net(), images()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[2].train()
    net[3].beta = torch.tensor(2.0)
    x.requires_grad_()
    with assert_untouched(net, x):
        explain(net, x, name)
        explain(net, x, name, site="1" if name != "FullGrad" else None, chunk=3)


def reference(model: nn.Module, x: Tensor, target: int) -> Tensor:
    """The gradient by autograd, on a private deep copy."""
    private = copy.deepcopy(model)
    leaf = x.detach().clone().requires_grad_()
    score = private(leaf * 1.0)[:, target].sum()
    return torch.autograd.grad(score, leaf)[0]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_habits_of_nets(name: str, dtype: torch.dtype) -> None:
    """Right gradients and no trace: nets that work in place, reuse modules, carry hooks, write buffers."""
    net, x = built(name, dtype)
    wanted = reference(net, x, 1)
    with assert_untouched(net, x):
        found = values(pb.explain(net, x, target=1, method="gradient"))
        pb.explain(
            net, x, target=1, method=pb.SmoothGrad(pb.IntegratedGradients(steps=3), samples=2), chunk=2
        )
    assert found.dtype == dtype
    assert relative(found, wanted) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NETS)
def test_habits_of_nets_at_a_layer(name: str) -> None:
    net, x = built(name)
    site = next(
        path for path, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.LSTM))
    )
    site += "@0" if name == "reused_module" else ""
    with assert_untouched(net, x):
        found = pb.explain(net, x, target=1, site=site, method=pb.IntegratedGradients(steps=32))
    assert torch.isfinite(values(found)).all()
    assert values(found).abs().sum() > 0


class _Raises(Exception):
    """What the injected fault raises."""


class _Fault:
    """Raises at the k-th time it is reached."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.left = at
        self.error = error
        self.raised = False

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.raised = True
            raise self.error


class _FaultyForward(nn.Module):
    def __init__(self, fault: Callable[[], None]) -> None:
        super().__init__()
        self.hit = lambda: fault()  # a closure, so that the private copy of the model shares the count

    def forward(self, x: Tensor) -> Tensor:
        self.hit()
        return x * 1.0


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Callable[[], None]) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        ctx.fault()
        return gradient, None


class _FaultyBackward(_FaultyForward):
    def forward(self, x: Tensor) -> Tensor:
        return _Counted.apply(x, self.hit)  # type: ignore[no-any-return,no-untyped-call]


def faulty_net(place: str, fault: _Fault) -> nn.Sequential:
    net = smooth_net()
    part = {"forward": _FaultyForward, "backward": _FaultyBackward}.get(place)
    if part is not None:
        net.insert(3, part(fault))
    net.register_buffer("steps_seen", torch.zeros(()))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    return net


FAULTY = {
    "ig": (pb.IntegratedGradients(steps=4), "input"),
    "smoothgrad of ig at a layer": (pb.SmoothGrad(pb.IntegratedGradients(steps=2), samples=2), "1"),
    "to a tolerance": (pb.IntegratedGradients(tol=1e-9, max_steps=9), "1"),
}


@pytest.mark.parametrize("error", [_Raises("fault"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["forward", "backward", "target"])
@pytest.mark.parametrize("case", FAULTY)
def test_nothing_is_left_behind_when_anything_raises(case: str, place: str, error: BaseException) -> None:
    """A fault at the k-th forward, backward or target call, for every k until the call succeeds."""
    method, site = FAULTY[case]
    x, count = images(2).requires_grad_(), 0
    for at in range(1, 200):
        fault = _Fault(at, error)
        net = faulty_net(place, fault)

        def target(output: Tensor, hit: _Fault = fault) -> Tensor:
            if place == "target":
                hit()
            return output[:, 1]

        with assert_untouched(net, x):
            try:
                pb.explain(net, x, target=target, method=method, site=site, chunk=3)
            except type(error) as raised:
                assert raised is error or raised.__cause__ is error  # noqa: PT017 - identity, over a loop
        if not fault.raised:
            break
        count += 1
    assert 3 <= count < 199


@pytest.mark.parametrize("budget", [None, "1MB"])
def test_nothing_is_left_behind_when_the_chunk_choice_raises(budget: str | None) -> None:
    """The probe that a memory budget makes is a forward too."""
    for at in range(1, 8):
        net = faulty_net("forward", _Fault(at, _Raises("fault")))
        with assert_untouched(net), pytest.raises(_Raises, match="fault"):
            pb.explain(
                net,
                images(2),
                target=1,
                method=pb.IntegratedGradients(steps=16),
                chunk=2,
                memory_budget=budget,
            )


class _Dividing(nn.Module):
    """Divides its weight in place at the first forward, as transformers' Rwkv does in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4).double()
        self.rescaled = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.rescaled:
            with torch.no_grad():
                self.first.weight.div_(2)
            self.rescaled = True
        out: Tensor = self.first(x)
        return out


class _DividingAlways(_Dividing):
    def forward(self, x: Tensor) -> Tensor:
        self.rescaled = False
        return super().forward(x)


@pytest.mark.parametrize("kind", [_Dividing, _DividingAlways])
def test_a_model_that_writes_into_its_parameters_keeps_them(kind: type[nn.Module]) -> None:
    net = kind().eval()
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = net.first.weight.detach().clone()
    with assert_untouched(net, x):
        found = pb.explain(net, x, target=1, method="gradient")
    assert torch.equal(net.first.weight, weight)
    if kind is _Dividing:
        assert relative(values(found), (weight[1] / 2).expand(2, 6)) <= 1e-12


@pytest.mark.parametrize("every", [1, 2])
def test_rwkv_keeps_its_weights(every: int) -> None:
    """transformers' Rwkv in eval mode divides weights of every n-th block in place at its first forward."""
    from tests.zoo.architectures import rwkv

    model, inputs = rwkv()
    model.config.rescale_every = every
    with assert_untouched(model, inputs):
        pb.explain(model, inputs, target=1, method=pb.IntegratedGradients(steps=2))


@pytest.mark.parametrize("name", list(INSTANCES)[:3])
def test_models_of_other_modes(name: str) -> None:
    """Inside no_grad, inference_mode, autocast off and on; parameters made under inference_mode; compiled."""
    net, x = smooth_net(), images()
    wanted = values(explain(net, x, name))
    with torch.no_grad(), assert_untouched(net, x):
        assert torch.equal(values(explain(net, x, name)), wanted)
    with torch.inference_mode(), assert_untouched(net, x):
        assert torch.equal(values(explain(net, x, name)), wanted)
        inside = x * 1.0
        assert torch.equal(values(explain(net, inside, name)), wanted)
    with torch.inference_mode():
        made = smooth_net()
    with assert_untouched(made, x):
        assert torch.equal(values(explain(made, x, name)), wanted)
        assert (
            relative(values(explain(made, x, name, site="1")), values(explain(net, x, name, site="1"))) == 0
        )
    compiled = torch.compile(net, backend="eager")
    with assert_untouched(net, x):
        assert torch.equal(values(explain(compiled, x, name)), wanted)
        assert torch.equal(
            values(explain(compiled, x, name, site="1")), values(explain(net, x, name, site="1"))
        )
