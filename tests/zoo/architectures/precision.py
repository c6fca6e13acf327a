"""Where a float64 model computes in float32 all the same, and how to keep it from doing so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["FLOAT32_INSIDE", "WithoutFloat32"]

NORMS = "its norms"
ATTENTION = "its attention"
RECURRENCE = "its norms and its recurrence"
ROUTERS = "its norms and its routers"

# with the default attention; only what carries a derivative counts (rotary angles are float32 nearly everywhere)
FLOAT32_INSIDE: dict[str, str] = {
    **dict.fromkeys((
        "phi3", "llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "cohere", "cohere2", "olmo",
        "olmo2", "granite", "glm4", "helium", "diffllama", "apertus", "exaone4", "lfm2", "gpt_oss", "deberta", "eurobert",
        "t5", "t5_v1_1", "umt5", "longt5", "llava", "paligemma", "qwen2_vl",
    ), NORMS),
    **dict.fromkeys((
        "gpt_neo", "gptj", "codegen", "mpt", "bloom", "modernbert", "modernbert_decoder", "xlm", "funnel", "longformer",
        "esm", "prophetnet", "git",
    ), ATTENTION),
    **dict.fromkeys((
        "jamba", "rwkv", "recurrent_gemma", "qwen3_next", "bamba", "zamba", "zamba2", "falcon_h1", "granite_hybrid",
    ), RECURRENCE),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "nemotron_h"), RECURRENCE + ", and its logits"),
    **dict.fromkeys((
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "llama4_text", "granitemoe", "minimax",
        "ernie4_5_moe", "glm4_moe", "switch_transformers",
    ), ROUTERS),
}  # fmt: skip


class WithoutFloat32(TorchFunctionMode):
    """Casts of float64 tensors to float32 inside this context leave them in float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
            kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in kwargs.items()}
        return func(*args, **kwargs)
