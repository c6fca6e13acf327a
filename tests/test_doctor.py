"""The doctor: its facts against hand counts, its verdicts against what explain does."""

import json

import pytest
import torch
from torch import nn

import pullback as pb
from pullback.doctor import diagnose


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def verdicts(found):
    return {verdict.method: verdict for verdict in found.methods}


def test_facts_of_a_small_net_are_the_hand_counted_ones() -> None:
    found = diagnose(mlp(), torch.ones(2, 4))
    assert found.parameters == 4 * 8 + 8 + 8 * 3 + 3
    assert (found.dtypes, found.devices, found.model) == (("float32",), ("cpu",), "Sequential")
    assert (found.site, found.point, found.tried, found.ready) == ("input", ((1, 4),), True, True)
    assert found.activations == ("relu",)
    assert "1/n in" in found.convergence


def test_every_registered_method_has_a_verdict_that_agrees_with_explain() -> None:
    model, x = mlp(), torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    found = verdicts(diagnose(model, x))
    assert list(found) == list(pb.METHODS)
    for name in ("Gradient", "InputXGradient", "GradCAM", "SmoothGrad"):
        if name == "GradCAM":  # the input is no layer
            with pytest.raises(pb.MethodError) as refused:
                pb.explain(model, x, method=name)
            assert found[name].remark == " ".join(str(refused.value).split())
            assert found[name].works is False
        else:
            assert pb.explain(model, x, method=name).values.shape == x.shape
            assert found[name].works is True
    assert "needs domain" in found["InDomain"].remark


def test_cam_works_at_a_convolutional_site() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    found = verdicts(diagnose(net, torch.ones(1, 1, 4, 4), site="0"))
    assert found["GradCAM"].works


@pytest.mark.parametrize("bias", [False, True])
def test_input_times_gradient_is_exact_just_where_the_net_is_homogeneous(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 3, bias=bias)).double()
    if bias:  # a hand-set bias: the sum misses the score by exactly the biases' own part
        nn.init.constant_(net[2].bias, 1.0)
    verdict = verdicts(diagnose(net, torch.ones(1, 4, dtype=torch.float64)))["InputXGradient"]
    assert verdict.works
    assert verdict.exact is not bias


@pytest.mark.parametrize(
    ("activation", "rate"), [(nn.GELU(), "1/n²"), (nn.ReLU(), "1/n in"), (nn.Identity(), "one step is exact")]
)
def test_convergence_follows_from_the_activation(activation: nn.Module, rate: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 2))
    assert rate in diagnose(net).convergence
    assert rate in diagnose(net, torch.ones(1, 4)).convergence


def test_functional_activations_are_seen_in_the_dry_run_only() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.linear(x)).relu_()

    assert diagnose(Functional()).activations == ()
    assert diagnose(Functional(), torch.ones(1, 4)).activations == ("relu", "silu")


def test_a_module_that_runs_twice_is_named_with_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.block(x))

    model = Twice()
    (reused,) = diagnose(model, torch.ones(1, 4)).reused
    assert reused.startswith("block (2 times")
    assert '"block@0"' in reused
    assert not model.block._forward_pre_hooks


def test_train_mode_is_reported_in_the_words_of_explain_and_by_path() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    with pytest.raises(pb.ModelError) as refused:
        pb.explain(net, torch.ones(1, 4))
    found = diagnose(net, torch.ones(1, 4))
    assert found.obstacles == (" ".join(str(refused.value).split()),)
    assert found.train_mode == ("1 drops at random",)
    assert not found.ready
    assert "model.eval()" in diagnose(net).obstacles[0]
    assert diagnose(net.eval()).ready


def test_a_fault_of_the_models_own_forward_is_an_obstacle_and_not_an_exception() -> None:
    found = diagnose(mlp(), torch.ones(1, 5))
    assert not found.tried
    assert found.obstacles[0].startswith("RuntimeError in the model or the method: mat1 and mat2")
    assert all(verdict.works is None for verdict in found.methods)


def test_wrapping_scripts_ties_and_norms_are_named() -> None:
    assert diagnose(torch.compile(mlp())).wrapping == ("torch.compile",)
    assert diagnose(nn.DataParallel(mlp())).wrapping == ("DataParallel",)
    scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.BatchNorm1d(2)).eval()
    found = diagnose(scripted)
    assert found.scripted == ("0",)
    assert found.batch_norms == 1
    shared = nn.Linear(2, 2)
    found = diagnose(nn.Sequential(shared, nn.Tanh(), shared))
    assert found.reused == ("0 = 2",)
    assert found.tied_parameters == ("0.weight = 2.weight", "0.bias = 2.bias")


def test_a_plain_callable_is_examined_through_its_run() -> None:
    found = diagnose(lambda x: torch.tanh(x).sum(1, keepdim=True), torch.ones(1, 3))
    assert (found.ready, found.parameters, found.activations) == (True, 0, ("tanh",))


def test_text_and_json_hold_the_same_findings() -> None:
    found = diagnose(mlp(), torch.ones(1, 4))
    read = json.loads(json.dumps(found.to_dict()))
    assert read["parameters"] == found.parameters
    assert read["ready"] is True
    assert [verdict["method"] for verdict in read["methods"]] == list(pb.METHODS)
    text = str(found)
    assert "67 parameters in float32 on cpu" in text
    assert "nothing found that stops explain()" in text
    assert all(name in text for name in pb.METHODS)


def test_the_model_is_left_alone() -> None:
    net = mlp()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    diagnose(net, torch.ones(1, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_language_model_is_explained_at_its_embeddings() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(config).eval()
    found = diagnose(model, {"input_ids": torch.tensor([[1, 2, 3]])})
    assert (found.ready, found.site, found.point) == (True, "embeddings", ((1, 3, 8),))
    assert found.attention in ("sdpa", "eager")
    assert "1/n²" in found.convergence
    assert any("lm_head.weight" in names for names in found.tied_parameters)
    assert diagnose(model).site == "embeddings"


def test_coverage_says_what_each_rule_handles_and_what_none_does() -> None:
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x, torch.ones(2, 3))

    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3), Distances())
    found = diagnose(net, torch.ones(1, 4))
    assert found.coverage == ("gelu by IdentityRule (2)", "cdist by the plain gradient in '5' (1)")
    assert "rules of RelP()" in str(found)
    assert not verdicts(found)["RelP"].works
    assert "covers cdist in module '5', 1 call" in verdicts(found)["RelP"].remark
    assert diagnose(nn.Linear(4, 3), torch.ones(1, 4)).coverage == ("nothing to act on",)
