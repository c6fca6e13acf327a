"""Posing a problem: which models are taken, which are refused, and what to type instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.conformance.fingerprint import assert_untouched

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net(*extra: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), *extra, nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Dropout(0.3), "drops at random"),
        (nn.AlphaDropout(0.3), "drops at random"),
        (nn.BatchNorm1d(8), "uses batch statistics"),
        (nn.RReLU(), "draws slopes at random"),
    ],
)
def test_train_mode_is_refused_with_the_module_named(layer: nn.Module, reason: str) -> None:
    model = net(layer).train()
    with pytest.raises(
        pb.ModelError,
        match=rf'Sequential is in train mode and "1" {reason}.*Call model\.eval\(\) first, or pass allow_train=True',
    ):
        pb.explain(model, X)
    pb.explain(model.eval(), X, method="gradient")


def test_train_mode_that_changes_nothing_is_fine() -> None:
    model = net(nn.Dropout(0.0), nn.LayerNorm(8)).double().train()
    assert torch.equal(
        pb.explain(model, X, target=1, method="gradient").values,  # type: ignore[arg-type]
        pb.explain(model.eval(), X, target=1, method="gradient").values,  # type: ignore[arg-type]
    )


def test_allow_train_is_reproducible_and_freezes_one_draw() -> None:
    """The result is that of one fixed mask: clean score, every point and the gap belong to the same function."""
    model = net(nn.Dropout(0.5)).train()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with assert_untouched(model, X):
            results.append(
                pb.explain(model, X, target=1, method=pb.IntegratedGradients(steps=200), allow_train=True)
            )
        assert torch.equal(before, torch.get_rng_state())
    first, second = results
    assert torch.equal(first.values, second.values)  # type: ignore[arg-type]
    assert torch.equal(first.score, second.score)
    # a gap this small exists only if the scores at both ends use the path's mask
    assert float(first.diagnostics["gap"].abs().max()) <= 1e-4
    assert any("the forward draws random numbers" in note for note in first.diagnostics["notes"])
    at_layer = [
        (
            torch.manual_seed(seed),
            pb.explain(model, X, target=1, site="1", method="gradient", allow_train=True),
        )[1]
        for seed in (3, 4)
    ]
    assert torch.equal(at_layer[0].point, at_layer[1].point)  # type: ignore[arg-type]


def test_batch_statistics_in_train_mode_do_not_move_the_buffers() -> None:
    model = net(nn.BatchNorm1d(8)).double().train()
    with assert_untouched(model, X):
        pb.explain(model, X, target=1, method=pb.IntegratedGradients(steps=3), allow_train=True)


def test_plain_callables_have_an_input_only() -> None:
    model = net().eval()
    by_function = pb.explain(lambda x: model(x), X, target=1, method="gradient")
    assert torch.equal(by_function.values, pb.explain(model, X, target=1, method="gradient").values)  # type: ignore[arg-type]
    assert any("a plain callable" in note for note in by_function.diagnostics["notes"])
    with pytest.raises(pb.SiteError, match=r'"0" needs an nn\.Module that takes hooks; .* use site="input"'):
        pb.explain(lambda x: model(x), X, site="0")
    with pytest.raises(pb.InputError, match=r"the model is a str, which cannot be called"):
        pb.explain("resnet50", X)  # type: ignore[arg-type]


def test_a_callable_that_leaves_gradients_alone() -> None:
    model = net().eval()
    pb.explain(lambda x: model(x), X, target=1, method=pb.IntegratedGradients(steps=3))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_script_modules(make: Any) -> None:
    model = net().eval()
    script = make(model)
    wanted = pb.explain(model, X, target=1, method=pb.IntegratedGradients(steps=5))
    for parameter in script.parameters():
        parameter.grad = None
    found = pb.explain(script, X, target=1, method=pb.IntegratedGradients(steps=5))
    assert torch.allclose(found.values, wanted.values, atol=1e-12)  # type: ignore[arg-type]
    assert all(parameter.grad is None for parameter in script.parameters())
    assert any("ScriptModule" in note for note in found.diagnostics["notes"])
    with pytest.raises(pb.SiteError, match=r"takes hooks; for a callable or a ScriptModule use site=.input."):
        pb.explain(script, X, site="0")
    mixed = nn.Sequential(
        model[0], make(nn.Tanh().double()) if make is torch.jit.script else nn.Tanh(), model[2]
    )
    assert torch.allclose(
        pb.explain(mixed, X, target=1, site="0", method="gradient").values,
        pb.explain(model, X, target=1, site="0", method="gradient").values,
    )  # type: ignore[arg-type]


def test_sharded_models_are_refused_with_the_way_out() -> None:
    sharded = type("FullyShardedDataParallel", (nn.Sequential,), {"__module__": "torch.distributed.fsdp"})(
        nn.Linear(6, 2)
    )
    with pytest.raises(pb.ModelError, match=r"wrapped by FSDP; expected whole parameters\. Gather them with"):
        pb.explain(sharded.double().eval(), X)


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(pb.ModelError, match="uninitialised parameter of a lazy module"):
        pb.explain(nn.Sequential(nn.LazyLinear(3)).eval(), X)


def test_unreachable_sites() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)
            self.b = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).detach() + self.b(x)

    model = Detached().double().eval()
    with pytest.raises(
        pb.SiteError, match=r'the score does not depend on "a".*Choose a later site|no path leads from there'
    ):
        pb.explain(model, X, target=1, site="a", method="gradient")
    with pytest.raises(pb.SiteError, match=r'the score does not depend on "input"'):
        pb.explain(lambda x: model(x).detach(), X, target=1, method="gradient")


def test_not_finite_scores_and_outputs() -> None:
    with pytest.raises(pb.TargetError, match=r"the clean score of example 1 is (nan|inf)"):
        pb.explain(lambda x: torch.stack([x[:, 0] / torch.tensor([1.0, 0.0, 2.0])], 1), X, target=0)


@pytest.mark.parametrize("target", [None, 1, [0, 1, 2], torch.tensor([3, 2, 1])])
def test_scores_are_the_models(target: Any) -> None:
    model = net().eval()
    problem = pb.pose(model, X, target=target)
    with torch.no_grad():
        logits = model(X)
    index = logits.argmax(1) if target is None else torch.as_tensor(target).expand(3)
    assert torch.equal(problem.score(), logits[torch.arange(3), index])
    found = pb.explain(model, X, target=target, method="gradient")
    assert torch.equal(found.target, index)  # type: ignore[arg-type]


def test_the_predicted_class_is_fixed_on_the_clean_input() -> None:
    """Elsewhere another class may win; the score stays that of the class asked for."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    problem = pb.pose(model, torch.ones(1, 1).double())
    assert problem.score(-3 * torch.ones(1, 1).double()).tolist() == [-3.0]


@pytest.mark.parametrize("chunk", [1, 2, "auto"])
def test_chunks_of_the_clean_pass_agree_at_repeated_calls(chunk: Any) -> None:
    shared = nn.Linear(6, 6).double()
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh()).eval()
    found = pb.explain(model, X, target=2, site="0@1", method="gradient", chunk=chunk)
    with torch.no_grad():
        inner = model[2](model[1](model[0](X)))
    assert torch.allclose(found.point, inner)  # type: ignore[arg-type]
    wanted = torch.zeros(3, 6, dtype=torch.float64)
    wanted[:, 2] = 1 - inner[:, 2].tanh().square()
    assert torch.allclose(found.values, wanted)  # type: ignore[arg-type]
