"""Relevance on whole models: MambaLRP written out, what the audit refuses, and the ways a model may run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import pullback as pb
from pullback.attribution.rules import IdentityRule
from pullback.attribution.rules.presets import MAMBALRP, RELP
from tests.single_input import only
from tests.zoo.architectures import ARCHITECTURES, WithoutFloat32, in_float64

TOKENS = torch.tensor([[3, 5, 7, 11, 4], [8, 6, 9, 10, 12]])


def explicit_mamba_lrp(model: Any, embeddings: Tensor) -> Tensor:
    """Logits of a Mamba whose ordinary gradient is MambaLRP: what a rule holds constant is detached by hand."""

    def norm(x: Tensor, module: Any) -> Tensor:
        spread = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
        return module.weight * x * spread.detach()  # type: ignore[no-any-return]

    def silu(x: Tensor) -> Tensor:
        return x * x.sigmoid().detach()

    hidden = embeddings
    for layer in model.backbone.layers:
        mixer = layer.mixer
        x, gate = mixer.in_proj(norm(hidden, layer.norm)).mT.chunk(2, 1)
        x = silu(mixer.conv1d(x)[..., : hidden.shape[1]])
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        step, enter, leave = mixer.x_proj(x.mT).detach().split(sizes, -1)
        step = F.softplus(mixer.dt_proj(step)).mT
        decay = -mixer.A_log.exp()
        state, outputs = torch.zeros_like(x[:, :, :1] * decay), []
        for time in range(hidden.shape[1]):
            now = step[:, :, time, None]
            state = (now * decay).exp() * state + now * enter[:, None, time] * x[:, :, time, None]
            outputs.append((state * leave[:, None, time]).sum(-1))
        product = (torch.stack(outputs, -1) + mixer.D[:, None] * x) * silu(gate)
        product = product / 2 + (product / 2).detach()
        hidden = hidden + mixer.out_proj(product.mT)
    return model.lm_head(norm(hidden, model.backbone.norm_f))  # type: ignore[no-any-return]


def test_mamba_lrp_is_the_model_with_its_scan_held_constant() -> None:
    pytest.importorskip("transformers")
    model, inputs = in_float64(ARCHITECTURES["mamba"]())
    with WithoutFloat32():
        problem = pb.pose(model, inputs, target=1)
        found = problem.under(MAMBALRP).grad()
        halves = problem.under(RELP).grad()
        expected = model(**inputs).logits
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
    logits = explicit_mamba_lrp(model, embeddings)
    assert torch.allclose(logits, expected, atol=1e-12)
    (wanted,) = torch.autograd.grad(logits[:, -1, 1].sum(), embeddings)
    assert isinstance(found, Tensor)
    assert isinstance(halves, Tensor)
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert (halves - wanted).abs().max() > 1e-4 * wanted.abs().max()


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2 * grads[0] * ctx.saved_tensors[0]


class Block(nn.Module):
    """A block that computes with the given function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


def network(function: Callable[[Tensor], Tensor]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts: dict[str, nn.Module] = {
            "first": nn.Linear(4, 4),
            "block": Block(function),
            "last": nn.Linear(4, 3),
        }
        model = nn.Sequential()
        for name, part in parts.items():
            model.add_module(name, part)
        return model.double().eval()


def scripted(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79 * x * (1.0 + 0.044 * x * x)))


X = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPAQUE: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], str]] = {
    "script": (lambda: torch.jit.script(scripted), r"\(TorchScript: its operations cannot be seen\)"),
    "function": (lambda: Squared.apply, r"Squared \(custom autograd\.Function"),
    "reentrant": (
        lambda: lambda x: checkpoint(F.gelu, x, use_reentrant=True),
        r"CheckpointFunction \(re-entrant checkpoint: use use_reentrant=False\)",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPAQUE)
def test_what_hides_its_operations_is_refused_with_its_module(name: str) -> None:
    make, text = OPAQUE[name]
    model = network(make())
    for _ in range(3):  # TorchScript fuses after some calls; before that its operations are ordinary nodes
        model(X.clone().requires_grad_()).sum().backward()
    with pytest.raises(pb.CoverageError, match=text + r".* in module 'block', 1 call"):
        pb.explain(model, X, method="relp", target=1)
    if name != "reentrant":  # torch refuses torch.autograd.grad through it
        assert only(pb.explain(model, X, method=pb.RelP(uncovered="gradient"), target=1)).any()


def test_a_compiled_block_is_seen_through() -> None:
    expected = only(pb.explain(network(F.gelu), X, method="relp", target=1))
    model = network(torch.compile(F.gelu, backend="aot_eager"))
    torch.testing.assert_close(
        only(pb.explain(model, X, method="relp", target=1)), expected, rtol=0, atol=1e-14
    )


def test_checkpoint_without_reentry_changes_nothing() -> None:
    expected = only(pb.explain(network(F.gelu), X, method="relp", target=1))
    model = network(lambda x: checkpoint(F.gelu, x, use_reentrant=False))
    assert torch.equal(only(pb.explain(model, X, method="relp", target=1)), expected)


def test_a_caller_in_inference_mode_or_without_gradients() -> None:
    model = network(F.silu)
    expected = pb.explain(model, X, method="relp", target=1)
    for context in (torch.inference_mode(), torch.no_grad()):
        with context:
            found = pb.explain(model, X, method="relp", target=1)
        assert torch.equal(only(found), only(expected))
        assert torch.equal(found.score, expected.score)
    with torch.inference_mode():
        inside = X.clone()
    assert torch.equal(only(pb.explain(model, inside, method="relp", target=1)), only(expected))


def test_autocast_conserves_to_its_precision() -> None:
    wide = network(F.gelu)
    for module in wide.modules():
        if isinstance(module, nn.Linear):
            module.bias = None  # type: ignore[assignment]
    exact = pb.explain(wide, X, method="relp", target=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pb.explain(wide.float(), X.float(), method="relp", target=1)
    # bfloat16 keeps 8 bits; five roundings follow one another
    assert (only(found).sum(1) - found.score).abs().max() <= 5 * 2**-8 * only(found).abs().sum(1).max()
    assert (only(found) - only(exact)).abs().max() <= 5 * 2**-8 * only(exact).abs().max()
    assert not torch.equal(only(found).double(), only(exact))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_key_value_cache_on_and_off(name: str) -> None:
    pytest.importorskip("transformers")
    model, inputs = in_float64(ARCHITECTURES[name]())
    with WithoutFloat32():
        on, off = (
            only(pb.explain(model, {**inputs, "use_cache": each}, method="relp", target=1))
            for each in (True, False)
        )
    assert torch.equal(on, off)


def test_training_goes_on_as_if_nothing_had_been_explained() -> None:
    pytest.importorskip("transformers")
    model, inputs = in_float64(ARCHITECTURES["gpt2"]())
    twin, other = copy.deepcopy(model), copy.deepcopy(model)

    def step(model: Any) -> Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loss: Tensor = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    pb.explain(model, inputs, method="relp", target=1)
    with pytest.raises(pb.CoverageError):
        pb.pose(model, inputs, target=1).under((IdentityRule(),)).grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    for _ in range(2):
        # another model of the same class shares its functions with the explained one
        loss = step(model)
        assert torch.equal(loss, step(twin))
        pb.explain(model, inputs, method="relp", target=1)
        assert torch.equal(loss, step(other))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.requires_grad
