"""Text continuations: the prompt with the tokens of an answer appended, so that one forward scores the whole string."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import TargetError
from .inputs import ModelInputs
from .posed import Variant

__all__ = ["extend"]


def extend(inputs: ModelInputs, ids: Sequence[Sequence[int]], last: Tensor | None) -> Variant:
    """The inputs with each example's token ids, except the final one, appended after its last real token.

    Right padding moves behind the continuation; positions of the prompt stay where they are.

    Raises:
        TargetError: the inputs hold no token ids, or other tensors run along the sequence.
    """
    tokens = inputs.tokens
    if tokens is None or last is None or inputs.token_leaf is None or tokens.dim() != 2:
        raise TargetError(
            "a target of several tokens needs token ids as input: pass the tokenizer's output to the model."
        )
    appended = [list(each)[:-1] for each in ids]
    extra = max(len(each) for each in appended)
    batch = len(tokens)
    if extra == 0:
        return Variant(inputs)
    along = [
        name
        for name, leaf in inputs.leaf.items()
        if leaf.dim() >= 2
        and leaf.shape[:2] == tokens.shape
        and name not in (inputs.token_leaf, "attention_mask", "token_type_ids", "mm_token_type_ids")
    ]
    if along:
        raise TargetError(
            f"a target of several tokens cannot lengthen {', '.join(along)}; leave them out or use one token."
        )
    longer = torch.cat([tokens, tokens.new_zeros(batch, extra)], 1)
    given = inputs.leaf.get("attention_mask")
    if given is not None and (
        given.shape != tokens.shape or (given.is_floating_point() and bool((given <= 0).all()))
    ):
        raise TargetError(
            "a target of several tokens cannot lengthen this attention_mask: give (B, T) values 0 and 1."
        )
    mask = torch.cat([torch.ones_like(tokens) if given is None else given, tokens.new_zeros(batch, extra)], 1)
    kept = torch.cat(
        [
            torch.ones_like(tokens, dtype=torch.bool),
            torch.zeros(batch, extra, dtype=torch.bool, device=tokens.device),
        ],
        1,
    )
    for row, addition in enumerate(appended):
        start = int(last[row]) + 1
        stop = start + len(addition)
        longer[row, start:stop] = torch.tensor(addition, dtype=tokens.dtype, device=tokens.device)
        mask[row, start:stop] = 1
        kept[row, start:] = False
    leaf = {inputs.token_leaf: longer}
    if "token_type_ids" in inputs.leaf:
        types = inputs.leaf["token_type_ids"]
        leaf["token_type_ids"] = torch.cat([types, types[:, -1:].expand(batch, extra)], 1)
    if "mm_token_type_ids" in inputs.leaf:  # 0 is text, also at padding
        kinds = inputs.leaf["mm_token_type_ids"]
        leaf["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(batch, extra)], 1)
    if given is not None:
        leaf["attention_mask"] = mask.to(given.dtype)
    elif any(len(each) != extra for each in appended):
        raise TargetError("continuations of different lengths need an attention_mask among the inputs.")
    return Variant(inputs.with_leaves(leaf), kept)
