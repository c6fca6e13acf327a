"""Models, prompts and slow re-derivations for the tests of patching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TOKENS", "brute_force", "gpt2", "logit_difference", "prompts", "two_layers"]

TOKENS = 11


def gpt2(dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """A tiny GPT-2 with weights large enough that nothing is nearly linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=8,
        n_embd=12,
        n_layer=2,
        n_head=3,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval().to(dtype)


def prompts() -> tuple[Tensor, Tensor]:
    """Two pairs of five tokens, which differ from the second or third token on in one or two places."""
    clean = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
    corrupted = torch.tensor([[1, 7, 3, 4, 5], [6, 7, 2, 3, 1]])
    return clean, corrupted


def logit_difference(output: Any) -> Tensor:
    """A metric that holds per-example answers, so that it is right on whole batches in order only."""
    logits = output.logits[:, -1]
    rows = torch.arange(2)
    return logits[rows, [3, 4]] - logits[rows, [5, 6]]


def two_layers(activation: type[nn.Module] = nn.GELU, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)).eval().to(dtype)


def brute_force(
    model: nn.Module,
    base: Any,
    other: Any,
    metric: Callable[[Any], Tensor],
    path: str,
    entry: tuple[Any, ...] = (),
) -> Tensor:
    """Exact patching of a module's output by the user's own hooks, one position at a time: (B, T).

    ``entry`` restricts the exchange to part of the features.
    """
    module = model.get_submodule(path)
    seen: list[Tensor] = []

    def call(inputs: Any) -> Tensor:
        with torch.no_grad():
            return metric(model(**inputs) if isinstance(inputs, dict) else model(inputs))

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    handle = module.register_forward_hook(lambda module, args, output: seen.append(first(output).clone()))
    call(other)
    handle.remove()
    before = call(base)
    columns = []
    for position in range(seen[0].shape[1]):

        def exchange(module: nn.Module, args: Any, output: Any, position: int = position) -> Any:
            value = first(output).clone()
            place = (slice(None), position, *entry)
            value[place] = seen[0][place]
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handle = module.register_forward_hook(exchange)
        columns.append(call(base) - before)
        handle.remove()
    return torch.stack(columns, 1)
