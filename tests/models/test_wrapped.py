"""Models inside wrappers are explained as the plain model, to rounding, and nothing is left on the wrapper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.conformance.fingerprint import assert_untouched, of_model
from tests.zoo.architectures import gpt2, llama, tokens

METHODS = {"gradient": "gradient", "ig": "ig(steps=4)", "smoothgrad": "smoothgrad(samples=2)"}


def plain(build: Callable[[], Any] = llama) -> nn.Module:
    model: nn.Module = build()[0].double()
    return model


def values(model: Any, **settings: Any) -> dict[str, Tensor]:
    settings = {"target": 5, **settings}
    found = pb.compare(model, tokens(), METHODS, **settings)
    return {name: each.values for name, each in found.items()}  # type: ignore[misc]


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        assert value.abs().max() > 0
        assert (got[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel() -> None:
    wrapped = nn.parallel.DistributedDataParallel(plain())
    assert_equal(values(wrapped), values(plain()))
    assert all(parameter.grad is None for parameter in wrapped.parameters())
    # DDP still works: its reducer was neither called nor confused
    wrapped(tokens()).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())
    note = pb.explain(wrapped, tokens(), target=5, method="gradient").diagnostics["notes"]
    assert note == ["the model was unwrapped from DistributedDataParallel."]


@pytest.mark.parametrize("site", [None, "model.layers.0", "module.model.layers.0"])
def test_data_parallel(site: str | None) -> None:
    wrapped = nn.DataParallel(plain())
    wanted = values(plain(), site=site and "model.layers.0")
    with assert_untouched(wrapped):
        got = values(wrapped, site=site)
    assert_equal(got, wanted)


@pytest.mark.parametrize("where", ["root", "layer", "in place"])
def test_compiled(where: str) -> None:
    model: Any = plain()
    compiled: Any = model
    if where == "root":
        compiled = torch.compile(model, backend="eager")
    if where == "layer":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    if where == "in place":
        model.compile(backend="eager")
    with assert_untouched(compiled):
        got = values(compiled)
    assert_equal(got, values(plain()))


@pytest.mark.parametrize("frozen", [False, True])
def test_peft_lora(frozen: bool) -> None:
    """The adapters count: against the base model with the low-rank products added to its weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(plain(), config).double().eval()
    if frozen:
        wrapped.requires_grad_(False)
    merged = plain()
    for number, layer in enumerate(wrapped.base_model.model.model.layers):
        for name in ("q_proj", "v_proj"):
            adapter = getattr(layer.self_attn, name)
            update = adapter.lora_B["default"].weight @ adapter.lora_A["default"].weight * (4 / 2)
            own = getattr(merged.model.layers[number].self_attn, name)  # type: ignore[union-attr,index]
            own.weight.data += update.detach()
    with assert_untouched(wrapped):
        got = values(wrapped)
    wanted = values(merged)
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], atol=1e-10 * float(wanted[name].abs().max()))
        assert not torch.allclose(got[name], values(plain())[name], rtol=1e-2)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("site", [None, "transformer.h.0"])
def test_accelerate_offload(offload: str, site: str | None, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    wanted = values(plain(gpt2), site=site)
    model = plain(gpt2)
    device = torch.device("cpu")
    if offload == "cpu":
        model = accelerate.cpu_offload(model, execution_device=device)
    else:
        model = accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device=device)
    weights = dict(model.named_parameters())
    assert any(each.is_meta for each in weights.values())
    meta = {name: each.is_meta for name, each in weights.items()}
    assert_equal(values(model, site=site), wanted)
    after = dict(model.named_parameters())
    assert {name: each.is_meta for name, each in after.items()} == meta
    assert all(after[name] is each for name, each in weights.items())
    assert all(each.grad is None for each in after.values())
    # and again, and by itself
    assert_equal(values(model, site=site), wanted)
    assert torch.equal(model(tokens()).logits, plain(gpt2)(tokens()).logits)


def test_frozen_and_inference_mode() -> None:
    wanted = values(plain())
    frozen = plain().requires_grad_(False)
    assert_equal(values(frozen), wanted)
    with torch.inference_mode():
        born = plain()
        assert_equal(values(born), wanted)
    before = of_model(born)
    with torch.no_grad():
        assert_equal(values(born), wanted)
    assert of_model(born) == before


def test_a_plain_callable_says_what_it_lacks() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = pb.explain(lambda value: net(value), x, target=1, method="ig(steps=4)")
    assert torch.allclose(found.values, pb.explain(net, x, target=1, method="ig(steps=4)").values)  # type: ignore[arg-type]
    assert "plain callable" in found.diagnostics["notes"][0]
    assert all(parameter.grad is None for parameter in net.parameters())
    with pytest.raises(pb.SiteError, match='for a callable or a ScriptModule use site="input"'):
        pb.explain(lambda value: net(value), x, site="0")
