"""What rules cost: relevance and FullGrad against plain forward and backward, alternating in one process.

Memory is the most bytes alive at once beyond what was there before, as ``core.resources.PeakMeter`` counts them.

    python -m benchmarks.rules [--quick] [--threads 2]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pullback as pb
from benchmarks.alternating import alternate, ratio
from pullback.attribution.rules.presets import ATTNLRP, RELP, RELP_WITHOUT_ATTENTION
from pullback.core.overrides import overrides
from pullback.core.resources import PeakMeter
from pullback.core.rule import Rule
from pullback.core.shadow import shadow


def llama(hidden: int, layers: int) -> nn.Module:
    """A Llama with frozen parameters that takes embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 or 1,
        intermediate_size=hidden * 8 // 3,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(hidden: int, layers: int) -> nn.Module:
    """A GPT-2 with frozen parameters that takes embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=hidden,
        n_layer=layers,
        n_head=hidden // 64 or 1,
        vocab_size=100,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def coefficient(model: nn.Module, embeddings: Tensor, rules: Sequence[Rule]) -> Tensor:
    """The input's coefficient for one logit, by hand on a shadow."""
    x = embeddings.clone().requires_grad_()

    def run() -> Tensor:
        return torch.autograd.grad(model(inputs_embeds=x).logits[:, -1, 3].sum(), x)[0]

    if not rules:
        return run()
    with overrides(model, rules):
        return run()


def peak(run: Callable[[], object]) -> int:
    """The most bytes alive at once during a run."""
    with PeakMeter() as meter:
        run()
    return int(meter.peak)


def compare_on(name: str, model: nn.Module, embeddings: Tensor, pairs: int) -> None:
    """Print time and memory ratios for one model."""
    print(f"\n{name}, {tuple(embeddings.shape)}")
    private: Any = shadow(model).module
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: coefficient(private, embeddings, ()),
        "relp": lambda: coefficient(private, embeddings, RELP),
        "relp without attention": lambda: coefficient(private, embeddings, RELP_WITHOUT_ATTENTION),
        "attnlrp": lambda: coefficient(private, embeddings, ATTNLRP),
    }
    inputs = {"inputs_embeds": embeddings}
    ways["explain, gradient"] = lambda: pb.explain(model, inputs, target=3, method="gradient")
    ways["explain, relp"] = lambda: pb.explain(model, inputs, target=3, method="relp")
    ways["fullgrad terms"] = lambda: pb.attribution.fullgrad_terms(model, inputs, target=3)
    seconds = alternate(ways, pairs)
    for ours, other in [
        ("relp", "plain"),
        ("relp without attention", "plain"),
        ("attnlrp", "plain"),
        ("explain, relp", "explain, gradient"),
        ("fullgrad terms", "plain"),
        ("fullgrad terms", "explain, gradient"),
    ]:
        print(" ", ratio(seconds, ours, other))
    plain = peak(ways["plain"])
    print(f"  peak memory, relp / plain: {peak(ways['relp']) / plain:.3f}")


def main() -> None:
    """Run on a wide and a toy model of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy models and few pairs")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    pairs = 3 if arguments.quick else 20
    sizes = [(64, 2, (1, 16))] if arguments.quick else [(512, 6, (4, 64)), (64, 4, (1, 16))]
    for hidden, layers, shape in sizes:
        for build in (llama, gpt2):
            compare_on(
                f"{build.__name__}, hidden {hidden}, {layers} layers",
                build(hidden, layers),
                torch.randn(*shape, hidden),
                pairs,
            )


if __name__ == "__main__":
    main()
