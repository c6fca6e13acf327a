"""The shadow of a module tree: equal values, shared storage, constant parameters, no trace on the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pullback.core.shadow import shadow

Fingerprint = dict[str, Any]


def leaves(output: Tensor) -> list[Tensor]:
    """Every tensor whose gradient the graph of ``output`` would accumulate."""
    seen, found = set(), []
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo.extend(parent for parent, _ in node.next_functions)
    return found


def fingerprint(model: nn.Module) -> Fingerprint:
    """Identities and one-level contents of all a module holds, with tensor versions, flags and gradients."""
    found: Fingerprint = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            contents: Any = None
            if isinstance(value, dict):
                contents = [(key, id(item)) for key, item in value.items()]
            elif isinstance(value, (list, tuple)):
                contents = [id(item) for item in value]
            elif isinstance(value, set):
                contents = set(value)
            found[f"{path}.{name}"] = (id(value), contents)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"{name} state"] = (
            id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, id(tensor.grad),
            None if tensor.is_meta else tensor.detach().clone(),
        )  # fmt: skip
    return found


def assert_same(before: Fingerprint, after: Fingerprint) -> None:
    assert before.keys() == after.keys()
    for name, old in before.items():
        *identities, values = old
        *now, values_now = after[name]
        assert identities == now, name
        if isinstance(values, Tensor):
            assert torch.equal(values, values_now), name
        else:
            assert values == values_now, name


def assert_constant_shadow(model: nn.Module, x: Tensor) -> nn.Module:
    """The contract, in eval mode: value of the frozen original, gradient, storage, no leak, no trace."""
    parameters = list(model.parameters())
    before = fingerprint(model)
    private = shadow(model).module
    leaf = x.clone().requires_grad_()
    output = private(leaf)
    assert all(variable is leaf for variable in leaves(output))
    if parameters:
        got = torch.autograd.grad(output.sum(), parameters, allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in got)
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    assert_same(before, fingerprint(model))
    shared = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    copied = dict(private.named_parameters(remove_duplicate=False)) | dict(private.named_buffers())
    assert shared.keys() == copied.keys()
    for name, tensor in shared.items():
        assert copied[name].data_ptr() == tensor.data_ptr(), name
        assert copied[name].stride() == tensor.stride(), name
        assert not copied[name].requires_grad, name
    flags = [parameter.requires_grad for parameter in parameters]
    model.requires_grad_(False)
    expected = x.clone().requires_grad_()
    value = model(expected)
    assert torch.equal(output, value)
    assert torch.equal(gradient, torch.autograd.grad(value.sum(), expected)[0])
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    return private


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.cell = kind(3, 4, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x)[0]
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.again = self.encode

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.decode(self.encode(x)).tanh())
        return out


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(3, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "batch_norm": lambda: nn.Sequential(nn.Conv1d(5, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)),
    "lstm": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm_projection": lambda: Recurrent(nn.LSTM, proj_size=2, dropout=0.0),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN, num_layers=2),
    "attention": lambda: nn.TransformerEncoderLayer(3, 1, 8, batch_first=True),
    "weight_norm_old": old_weight_norm,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "spectral_norm_old": lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "tied": Tied,
    "parameter_list": lambda: nn.Sequential(nn.Linear(3, 3), nn.PReLU(), nn.LayerNorm(3)),
    "graph_module": lambda: torch.fx.symbolic_trace(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    ),
}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_values_gradients_and_storage_are_the_models_and_parameters_are_constants(name: str) -> None:
    assert_constant_shadow(MODELS[name]().double().eval(), torch.randn(2, 5, 3, dtype=torch.float64))


def test_the_leak_check_can_fail() -> None:
    model, x = nn.Linear(3, 4), torch.randn(2, 3, requires_grad=True)
    assert any(variable is model.weight for variable in leaves(model(x)))


def test_tied_parameters_and_modules_stay_tied() -> None:
    private = assert_constant_shadow(Tied().eval(), torch.randn(2, 3))
    assert private.encode.weight is private.decode.weight
    assert private.again is private.encode
    assert [name for name, _ in private.named_modules()] == ["", "encode", "decode"]


def test_a_frozen_parameter_is_kept_and_a_parameter_subclass_keeps_its_class_and_attributes() -> None:
    class Tagged(nn.Parameter):
        pass

    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    model.weight = Tagged(model.weight.detach())
    model.weight.note = "kept"
    private = shadow(model).module
    assert private.bias is model.bias
    assert type(private.weight) is Tagged
    assert private.weight.note == "kept"
    assert not private.weight.requires_grad
    assert private.weight.data_ptr() == model.weight.data_ptr()


def test_a_wrapper_subclass_parameter_works_trainable_and_frozen() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    for trainable in (True, False):
        model = nn.Linear(3, 2, bias=False)
        model.weight = nn.Parameter(TwoTensor(torch.ones(2, 3), torch.ones(2, 3)), requires_grad=trainable)
        private = shadow(model).module
        assert type(private.weight.data) is TwoTensor
        assert not private.weight.requires_grad
        x = torch.ones(1, 3, requires_grad=True)
        assert private(x).sum().item() == 6.0
        assert (private.weight is model.weight) is not trainable


def test_private_tensors_protect_what_a_forward_writes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("steps", torch.zeros(()))
            self.plain = torch.zeros(2)
            self.same = self.steps

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.plain.add_(1)
            self.calls = 1
            return self.norm(x)

    model = Counting().train()
    before, x = fingerprint(model), torch.randn(8, 3)
    private = shadow(model, private=True).module
    private(x)
    assert_same(before, fingerprint(model))
    assert model.plain.tolist() == [0, 0]
    assert not hasattr(model, "calls")
    assert private.steps.item() == 1
    assert private.same is private.steps
    assert private.norm.weight.data_ptr() != model.norm.weight.data_ptr()
    shadow(model).module(x)  # shared buffers: the write is seen
    assert model.steps.item() == 1


@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode_parameters_and_callers(inside: bool) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).eval()
    assert model[0].weight.is_inference()
    with torch.inference_mode(inside):
        private = shadow(model).module
        ordinary = shadow(nn.Linear(3, 2)).module
    for tensor in [*private.parameters(), *private.buffers(), *ordinary.parameters()]:
        assert not tensor.is_inference()
    assert private[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert private[1].running_mean.data_ptr() == model[1].running_mean.data_ptr()
    x = torch.randn(2, 3, requires_grad=True)
    (got,) = torch.autograd.grad(private(x).sum(), x)
    scale = model[1].weight * (model[1].running_var + model[1].eps).rsqrt()
    with torch.inference_mode():
        slope = 1 - model[2](model[1](model[0](x))) ** 2
        expected = (model[3].weight.sum(0) * slope * scale) @ model[0].weight
    torch.testing.assert_close(got, expected.clone(), rtol=1e-5, atol=1e-6)  # float32 rounding
    assert torch.autograd.grad(ordinary(x).sum(), x)[0].shape == x.shape


def test_user_hooks_run_and_see_the_shadow() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    seen: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, args, output: (seen.append(module), output * 2)[1])
    model[0].register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True, prepend=True
    )
    gradients: list[nn.Module] = []
    model[1].register_full_backward_hook(lambda module, grad_in, grad_out: gradients.append(module))
    private = shadow(model).module
    x = torch.randn(2, 3, requires_grad=True)
    output = private(x)
    output.sum().backward()
    assert seen == [private[0]]
    assert gradients == [private[1]]
    linear = (x + 1) @ model[0].weight.T + model[0].bias
    torch.testing.assert_close(output, (2 * linear).relu(), rtol=1e-5, atol=1e-6)  # float32 rounding
    private[1].register_forward_hook(lambda *_: None)
    assert not model[1]._forward_hooks


def test_recurrent_modules_in_eval_mode_train_only_where_cudnn_may_run() -> None:
    model = nn.LSTM(3, 4, 2, dropout=0.5).eval()
    assert not shadow(model).module.training
    offloaded = nn.LSTM(3, 4, 2, dropout=0.5, device="meta").eval()  # meta stands for weights not loaded yet
    private = shadow(offloaded).module
    assert (private.training, private.dropout) == (True, 0.0)
    assert (offloaded.training, offloaded.dropout) == (False, 0.5)
    assert shadow(offloaded.train()).module.dropout == 0.5


def test_the_cost_grows_with_the_number_of_modules_only() -> None:
    """Milliseconds are measured in benchmarks/attribution.py; here four times the modules cost about four times."""

    def seconds(blocks: int) -> float:
        layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(blocks)]
        model, times = nn.Sequential(*layers), []
        for _ in range(12):
            start = time.thread_time()
            shadow(model)
            times.append(time.thread_time() - start)
        return min(times)

    # a quadratic pass would cost sixteen times; the bound leaves room for a busy machine
    assert seconds(100) < 10 * seconds(25)
