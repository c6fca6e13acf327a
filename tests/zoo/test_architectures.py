"""The zoo itself: weights that give tests teeth, and what it says of precision and attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pullback.core.inputs import nested_tensors
from tests.zoo.architectures import (
    ARCHITECTURES,
    CORE,
    FLOAT32_INSIDE,
    SCORED,
    Inputs,
    WithoutFloat32,
    in_float64,
    with_attention,
)

pytest.importorskip("transformers")


class Rounded(TorchFunctionMode):
    """Notes every float32 value that carries a derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and result.requires_grad:
            self.found = True
        return result


@lru_cache(maxsize=2)
def built(name: str) -> tuple[nn.Module, Inputs]:
    return in_float64(ARCHITECTURES[name]())


def first(output: Any) -> Tensor:
    parts = [output] if isinstance(output, Tensor) else list(output.values())
    return next(part.detach() for part in nested_tensors(parts) if part.is_floating_point())


def test_the_zoo_is_large_and_its_tables_name_its_entries() -> None:
    assert len(ARCHITECTURES) >= 95
    assert len(set(CORE)) == 35
    assert set(CORE) | set(SCORED) | set(FLOAT32_INSIDE) <= set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_bias_scale_or_running_statistic_is_left_at_its_start(name: str) -> None:
    model, _ = built(name)
    assert not any(module.training for module in model.modules())
    vectors = [each for each in model.parameters() if each.ndim == 1]
    vectors += [
        each for path, each in model.named_buffers() if path.endswith(("running_mean", "running_var"))
    ]
    assert all(each.numel() == 1 or each.std() > 1e-4 for each in vectors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float32_is_where_it_is_said_to_be_and_can_be_kept_out(name: str) -> None:
    model, inputs = in_float64(ARCHITECTURES[name]())
    with WithoutFloat32(), Rounded() as raised:
        exact = first(model(**inputs))
    with Rounded() as plain:
        rounded = first(model(**inputs))
    assert plain.found == (name in FLOAT32_INSIDE)
    assert not raised.found
    assert exact.dtype == torch.float64
    # float32 or not: rotary angles are, in nearly all decoders
    assert (exact - rounded).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eager_and_fused_attention_agree(name: str) -> None:
    found = []
    for implementation in ("eager", "sdpa"):
        entry = with_attention(name, implementation)
        if entry is None:
            pytest.skip("no choice of attention")
        model, inputs = in_float64(entry)
        assert model.config._attn_implementation == implementation
        assert not model.training
        with WithoutFloat32():
            found.append(first(model(**inputs)))
    eager, fused = found
    model, inputs = built(name)
    with WithoutFloat32():
        assert torch.equal(first(model(**inputs)), fused)
    assert (eager - fused).abs().max() <= 1e-9 * fused.abs().max()


def test_models_without_a_choice_of_attention() -> None:
    assert with_attention("plain_vgg", "sdpa") is None
    assert with_attention("mamba", "eager") is None
    assert with_attention("llama", "eager") is not None
