"""Relevance at the level of a user: conservation, presets, coverage, hygiene and what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pullback as pb
from pullback.attribution.rules import IdentityRule, register_rule
from pullback.attribution.rules.linear import Epsilon
from pullback.attribution.rules.presets import PRESETS, RELP, _registered
from tests.conformance.fingerprint import assert_untouched
from tests.single_input import only

TEXT = torch.tensor([[3, 5, 7, 11, 4], [8, 6, 9, 10, 12]])


def llama(**settings: Any) -> nn.Module:
    """Bias-free, with its float32 norms left in the model's dtype, so that float64 holds to the end."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, **settings,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double().eval()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.__class__ = DoubleNorm
    return model


class DoubleNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def sums(model: nn.Module, method: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    found = pb.explain(model, TEXT, method=method, target=3, **settings)
    return only(found).flatten(1).sum(1), found.score


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_relp_conserves_and_others_do_not(attention: str) -> None:
    model = llama(attn_implementation=attention)
    total, score = sums(model, pb.RelP())
    torch.testing.assert_close(total, score, rtol=0, atol=1e-13)
    assert only(pb.explain(model, TEXT, method=pb.CPLRP(), target=3)).flatten(1).sum(1).allclose(score)
    for method in (pb.AttnLRP(), pb.RelP(attention="gradient"), pb.InputXGradient()):
        assert (sums(model, method)[0] - score).abs().max() > 1e-2 * score.abs().max(), method


def test_conserved_at_every_layer() -> None:
    model = llama()
    for site in ("embeddings", "model.layers.0", "model.layers.1", "model.norm:input"):
        total, score = sums(model, pb.RelP(), site=site)
        torch.testing.assert_close(total, score, rtol=0, atol=1e-13)


def test_eager_equals_fused_in_every_attention_setting() -> None:
    models = [llama(attn_implementation=name) for name in ("sdpa", "eager")]
    for attention in ("detach", "gradient", "attnlrp"):
        one, other = (
            only(pb.explain(model, TEXT, method=pb.RelP(attention=attention), target=3)) for model in models
        )
        # transformers computes the eager softmax in float32, in a float64 model, too
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("way", ["cache", "checkpoint", "compiled"])
def test_the_way_a_model_runs_does_not_matter(way: str) -> None:
    model = llama()
    expected = only(pb.explain(model, TEXT, method=pb.RelP(), target=3))
    inputs: Any = TEXT
    if way == "cache":
        inputs = {"input_ids": TEXT, "use_cache": False}
    if way == "compiled":
        model = torch.compile(model, backend="eager")
    if way == "checkpoint":
        # transformers checkpoints in training mode only; the model has no dropout
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = only(pb.explain(model, inputs, method=pb.RelP(), target=3, allow_train=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_a_batch_equals_its_examples() -> None:
    model = llama()
    whole = only(pb.explain(model, TEXT, method=pb.RelP(), target=3))
    for row in range(2):
        alone = only(pb.explain(model, TEXT[row : row + 1], method=pb.RelP(), target=3))
        torch.testing.assert_close(whole[row], alone[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_low_precision_conserves_to_its_precision(dtype: torch.dtype, tolerance: float) -> None:
    model = llama().to(dtype)
    total, score = sums(model, pb.RelP())
    assert (total.double() - score).abs().max() <= tolerance * score.abs().max()


def test_linear_and_relu_models_are_input_times_gradient() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for model in (net, net[0]):
        plain = only(pb.explain(model, x, method="inputxgradient"))
        assert torch.equal(only(pb.explain(model, x, method="relp")), plain)
    note = pb.explain(net[0], x, method="relp").diagnostics["notes"]
    assert note == [
        "no rule had anything to act on: the model is linear, and this is its input times gradient"
    ]


def test_targets_keep_their_own_derivative() -> None:
    """A log-softmax in the target is neither ruled nor audited: at the logits, it is the ordinary gradient."""
    model = llama()
    ruled = pb.explain(model, TEXT, method=pb.RelP(), target=pb.LogProb(3), site="lm_head")
    plain = pb.explain(model, TEXT, method="inputxgradient", target=pb.LogProb(3), site="lm_head")
    torch.testing.assert_close(only(ruled), only(plain), rtol=0, atol=1e-14)
    assert only(ruled).any()


def test_identity_rule_acts_however_the_model_was_built() -> None:
    """RelP's published code loses the rule when it is switched on after construction."""
    coverage = pb.explain(llama(), TEXT, method=pb.RelP(), target=3).diagnostics["coverage"]
    assert {entry["module"] for entry in coverage if entry["rule"] == "IdentityRule(within=None)"} == {
        f"model.layers.{number}.mlp.act_fn" for number in range(2)
    }
    assert not [entry for entry in coverage if entry["rule"] == "gradient"]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.saved_tensors[0].exp()


class Named(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


def test_uncovered_operations_are_named_or_recorded() -> None:
    net = nn.Sequential(Named(lambda x: torch.cdist(x, torch.ones(2, 3))))
    with pytest.raises(
        pb.CoverageError, match=r"covers cdist in module '0', 1 call\..*uncovered=\"gradient\""
    ):
        pb.explain(net, torch.ones(1, 3), method="relp", target=0)
    found = pb.explain(net, torch.ones(1, 3), method=pb.RelP(uncovered="gradient"), target=0)
    assert {"operation": "cdist", "module": "0", "rule": "gradient", "count": 1} in found.diagnostics[
        "coverage"
    ]
    hidden = nn.Sequential(Named(Opaque.apply))
    with pytest.raises(pb.CoverageError, match=r"Opaque \(custom autograd\.Function"):
        pb.explain(hidden, torch.ones(1, 3), method="relp", target=0)


def test_registered_rules_cover_operations_of_ones_own() -> None:
    net = nn.Sequential(Named(lambda x: torch.cdist(x, torch.ones(2, 3))))
    try:
        rule = register_rule("cdist", "gradient")
        assert only(pb.explain(net, torch.ones(1, 3), method="relp", target=0)).any()
        with pytest.raises(pb.MethodError, match=r"cdist has a rule already.*replace=True"):
            register_rule("cdist", "constant")
        assert register_rule("cdist", "constant", replace=True) != rule
    finally:
        _registered.clear()
    with pytest.raises(
        pb.MethodError, match=r"operation 'gellu', which does not exist\. Did you mean 'gelu'"
    ):
        register_rule("gellu", "identity")
    with pytest.raises(pb.MethodError, match=r"treatment is one of 'gradient'.*got 'idenity'"):
        register_rule("cdist", "idenity")


def test_what_makes_no_sense_is_refused() -> None:
    x = torch.ones(1, 3)
    net = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    with pytest.raises(pb.MethodError, match=r"rules 'rellp' is no preset.*Did you mean 'relp'"):
        pb.Relevance("rellp")
    with pytest.raises(pb.MethodError, match=r"attention is one of 'detach'.*got 'on'"):
        pb.Relevance("relp", attention="on")
    with pytest.raises(pb.MethodError, match=r'uncovered is "error" or "gradient"'):
        pb.Relevance("relp", uncovered="ignore")
    with pytest.raises(pb.MethodError, match=r"both claim .* everywhere, so the second would never act"):
        pb.Relevance((Epsilon(1e-6), Epsilon(0.1)))
    with pytest.raises(pb.MethodError, match=r"modules matching '\*x_proj', and Sequential has none"):
        pb.explain(net, x, method=pb.MambaLRP(), target=0)
    with pytest.raises(pb.MethodError, match=r"nothing leads from \"input\" to the score.*softmax"):
        pb.explain(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), x, method="relp", target=0)
    with pytest.raises(pb.MethodError, match=r"rules need a torch\.nn\.Module"):
        pb.explain(lambda x: x.square(), x, method="relp", target=0)


def test_the_model_is_untouched_and_plain_gradients_return() -> None:
    model = llama()
    before = only(pb.explain(model, TEXT, method="gradient", target=3))
    with assert_untouched(model, TEXT):
        pb.explain(model, TEXT, method="relp", target=3)
        with pytest.raises(pb.CoverageError):
            pb.pose(model, TEXT, target=3).under((IdentityRule(),)).grad()
    assert torch.equal(only(pb.explain(model, TEXT, method="gradient", target=3)), before)


def test_threads_with_and_without_rules() -> None:
    model = llama()
    wanted = {
        name: only(pb.explain(model, TEXT, method=name, target=3)) for name in ("relp", "inputxgradient")
    }
    wrong: list[str] = []

    def work(name: str) -> None:
        for _ in range(5):
            if not torch.allclose(
                only(pb.explain(model, TEXT, method=name, target=3)), wanted[name], atol=1e-13
            ):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in wanted for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_presets_are_plain_tuples() -> None:
    assert all(type(rules) is tuple for rules in PRESETS.values())
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    own = pb.Relevance((*RELP,))
    assert torch.equal(
        only(pb.explain(net, x, method=own, target=0)), only(pb.explain(net, x, method=pb.RelP(), target=0))
    )


def test_smoothgrad_and_integrated_gradients_compose_with_rules() -> None:
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.Linear(8, 2, bias=False)).double()
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pb.explain(net, x, method=pb.SmoothGrad(pb.RelP(), samples=3), target=0)
    problem = pb.pose(net, x, target=0)
    noisy = pb.explain(net, x, method="smoothgrad(relp(), samples=3)", target=0)
    assert torch.equal(only(found), only(noisy))
    assert F.cosine_similarity(only(found).flatten(), pb.RelP()(problem).flatten(), dim=0) > 0.9
