"""What steering costs while generating, and what a fit costs beside the passes that it takes.

``python -m benchmarks.steering [--pairs 20] [--quick] [--only tokens|fit]``: one thread, ratios of alternating runs.

Tokens: greedy generation with a cache by models of width 512, unsteered, steered at one block and at all of them.
Fit: GrAInS against the bare passes of the model that it was seen to make, of the same shapes, with the backward where
it had one; the vision tower's passes are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pullback.steering import SteeringVector, fit

from .alternating import alternate, ratio

VOCABULARY = 8192


def llama(width: int, blocks: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=8,
            num_key_value_heads=8, intermediate_size=width * 8 // 3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )
    ).eval()  # fmt: skip


def gpt2(width: int, blocks: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=width, n_layer=blocks, n_head=8, eos_token_id=None, pad_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def random_vector(model: Any, width: int, blocks: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    return SteeringVector.from_displacements(
        {block: torch.randn(width, generator=generator) for block in range(blocks)}, model
    )


def tokens(
    kind: str, build: Callable[[int, int], Any], width: int, blocks: int, new: int, pairs: int
) -> None:
    """Time per generated token over that of the model as it is."""
    model = build(width, blocks)
    vector = random_vector(model, width, blocks)
    ids = torch.randint(3, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @torch.no_grad()
    def generated(context: Callable[[], Any]) -> Tensor:
        with context():
            found: Tensor = model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return found

    ways: dict[str, Callable[[], Any]] = {
        "unsteered": contextlib.nullcontext,
        "one block": partial(vector.apply, model, 0.4, layers=blocks // 2),
        "all blocks": partial(vector.apply, model, 0.4),
        "generated, all blocks": partial(vector.apply, model, 0.4, scope="generated"),
    }
    seconds = alternate({name: partial(generated, context) for name, context in ways.items()}, pairs)
    each = sorted(seconds["unsteered"])[len(seconds["unsteered"]) // 2] / new
    print(f"{kind}, width {width}, {blocks} blocks: {1000 * each:.1f} ms for a token unsteered")
    for name in list(ways)[1:]:
        print("  ", ratio(seconds, name, "unsteered"))


@contextlib.contextmanager
def passes(model: Any) -> Iterator[list[tuple[tuple[int, ...], bool]]]:
    """The shapes of the embeddings that the model's class is called with, and whether with gradients."""
    seen: list[tuple[tuple[int, ...], bool]] = []
    kind, own = type(model), type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        ids = kwargs.get("input_ids")
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else tuple(kwargs["inputs_embeds"].shape[:2])
        seen.append((shape, output.logits.requires_grad))
        return output

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    kind.forward = forward
    try:
        yield seen
    finally:
        kind.forward = own


def fits(width: int, blocks: int, length: int, steps: int, count: int, pairs: int) -> None:
    """The time of a fit over that of its passes alone."""
    model = llama(width, blocks)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    pairs_of_answers = [(prompt, 5 + number, 50 + number) for number, prompt in enumerate(prompts)]
    for method in ("grains", "mean_grad"):

        def fitted(method: Any = method) -> SteeringVector:
            return fit(model, None, pairs_of_answers, method, k=4, steps=steps, batch_size=count)

        with passes(model) as seen:
            fitted()
        bare = [(torch.randn(*shape, width, generator=generator), backward) for shape, backward in seen]
        frozen = llama(width, blocks).requires_grad_(False)

        def alone(bare: Any = bare, frozen: Any = frozen) -> None:
            for embeddings, backward in bare:
                with torch.set_grad_enabled(backward):
                    point = embeddings.clone().requires_grad_(backward)
                    logits = frozen(inputs_embeds=point, attention_mask=torch.ones(point.shape[:2])).logits
                if backward:
                    torch.autograd.grad(logits[:, -1, 5].sum(), point)

        rows = sum(shape[0] for shape, _ in seen)
        both = sum(shape[0] for shape, backward in seen if backward)
        print(f"{method}: {rows / count:.1f} forwards a pair, {both / count:.1f} of them with a backward")
        print("  ", ratio(alternate({"fit": fitted, "passes": alone}, pairs), "fit", "passes"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--only", choices=["tokens", "fit"])
    parser.add_argument("--quick", action="store_true", help="small sizes, two pairs: does it run?")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # pairs of a random model hardly agree
    width, blocks, new, pairs = (64, 2, 4, 2) if given.quick else (512, 8, 24, given.pairs)
    if given.only != "fit":
        for kind, build in (("Llama", llama), ("GPT-2", gpt2)):
            tokens(kind, build, width, blocks, new, pairs)
    if given.only != "tokens":
        fits(width, blocks // 2, *((8, 2, 2, 2) if given.quick else (32, 4, 4, max(2, pairs // 3))))


if __name__ == "__main__":
    main()
