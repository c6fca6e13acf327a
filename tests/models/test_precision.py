"""Low precision, autocast around the call, and memory layouts: the answer is the same to the format's rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from tests.conformance.fingerprint import assert_untouched
from tests.single_input import only
from tests.zoo.architectures import bert, llama, vit

METHODS = ["gradient", "ig(steps=16)", "smoothgrad(samples=4)"]
# relative rounding of the format times the roughly ten roundings a value passes through
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(32, 3),
        ).eval()  # fmt: skip


def images() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_near_double(dtype: torch.dtype, method: str) -> None:
    model, x = net(), images()
    wanted = only(pb.explain(model.double(), x.double(), target=1, method=method))
    model = net().to(dtype)
    with assert_untouched(model):
        found = pb.explain(model, x.to(dtype), target=1, method=method)
    assert only(found).dtype == dtype
    assert found.score.dtype == torch.float64
    assert distance(only(found), wanted) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, bert])
def test_text_in_low_precision(build: object, dtype: torch.dtype) -> None:
    model, inputs = build()  # type: ignore[operator]
    wanted = only(pb.explain(model.double(), inputs, target=1, method="ig(steps=16)"))
    found = pb.explain(model.to(dtype), inputs, target=1, method="ig(steps=16)")
    assert only(found).dtype == dtype
    # these tiny random models cancel strongly, so directions are compared, not entries
    cosine = nn.functional.cosine_similarity(only(found).double().flatten(), wanted.flatten(), 0)
    assert cosine > 0.97
    if "attention_mask" in inputs:
        assert not only(found)[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_of_the_caller(method: str) -> None:
    """Forwards run in bfloat16 as the caller asked; results stay float32; the mode is as it was, also after an error."""
    model, x = net(), images()
    with torch.autocast("cpu", dtype=torch.bfloat16), assert_untouched(model, x):
        assert model(x).dtype == torch.bfloat16
        cast = pb.explain(model, x, target=1, method=method)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        with pytest.raises(pb.TargetError):
            pb.explain(model, x, target=99, method=method)
        assert torch.is_autocast_enabled("cpu")
        own = x.clone().requires_grad_()
        wanted = torch.autograd.grad(model(own)[:, 1].float().sum(), own)[0]
    assert not torch.is_autocast_enabled("cpu")
    exact = pb.explain(model, x, target=1, method=method)
    assert only(cast).dtype == torch.float32
    assert 1e-5 < distance(only(cast), only(exact)) < ROUNDING[torch.bfloat16]
    if method == "gradient":
        assert torch.equal(only(cast), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("site", [None, "0"])
def test_layouts(method: str, site: str | None) -> None:
    model, x = net().double(), images().double()
    wanted = only(pb.explain(model, x, target=1, method=method, site=site))
    wide = torch.zeros(2, 3, 10, 20, dtype=torch.float64)
    wide[..., ::2] = x
    layouts = {
        "strided": wide[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "expanded": x[:1].expand(2, 3, 10, 10),
    }
    for name, each in layouts.items():
        got = only(pb.explain(model, each, target=1, method=method, site=site))
        expected = wanted[:1].expand_as(wanted) if name == "expanded" else wanted
        assert torch.allclose(got, expected, atol=1e-12 * float(wanted.abs().max())), name
    whole = net().double().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with assert_untouched(whole):
        got = only(pb.explain(whole, layouts["channels last"], target=1, method=method, site=site))
    assert torch.allclose(got, wanted, atol=1e-11 * float(wanted.abs().max()))


def test_vit_in_bfloat16_keeps_its_prediction() -> None:
    model, inputs = vit()
    found = pb.explain(
        model.to(torch.bfloat16),
        {"pixel_values": inputs["pixel_values"].to(torch.bfloat16)},
        method="gradient",
    )
    with torch.no_grad():
        logits = model(inputs["pixel_values"].to(torch.bfloat16)).logits
    assert isinstance(found.target, Tensor)
    assert torch.equal(found.target, logits.argmax(1))
    assert torch.equal(found.score, logits.amax(1).double())
