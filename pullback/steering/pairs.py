"""Pairs of answers to one prompt, as token ids and in batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError

__all__ = [
    "Answer",
    "EncodedPair",
    "Pair",
    "along_tokens",
    "digest",
    "encode_answer",
    "encode_pairs",
    "encode_prompt",
    "in_batches",
    "most_tokens",
    "padded_inputs",
    "prompt_digest",
    "require_fitting",
    "require_known",
    "takes",
]

Answer: TypeAlias = "str | int | Sequence[int] | Tensor"


@dataclass(frozen=True, eq=False)
class Pair:
    """A prompt with the answer to steer towards and the one to steer away from.

    Attributes:
        prompt: text; chat messages, set with the tokenizer's template; token ids; or a mapping with the model's inputs
            for this example, "input_ids" (1, length) among them, as a processor returns it.
        preferred, dispreferred: text, encoded without special tokens, or token ids. They follow the prompt directly, so
            a space between is theirs.
        image: for a processor, which puts it into the prompt.

    >>> Pair([5, 6, 7], 8, 9).preferred
    8
    """

    prompt: Any
    preferred: Answer
    dispreferred: Answer
    image: Any = None


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """A pair as token ids: the prompt's (length,), each answer's, and the model's other inputs for this example."""

    number: int
    ids: Tensor
    preferred: tuple[int, ...]
    dispreferred: tuple[int, ...]
    others: Mapping[str, Tensor]


def encode_pairs(model: nn.Module, tokenizer: Any, pairs: Sequence[Any]) -> list[EncodedPair]:
    """Token ids of every pair. Raises InputError for pairs that are no contrast or do not fit into the model."""
    if isinstance(pairs, Pair | str) or not isinstance(pairs, Sequence) or not len(pairs):
        raise InputError(
            f"pairs is {'empty' if isinstance(pairs, Sequence) and not len(pairs) else type(pairs).__name__}; "
            "expected a list of Pair(prompt, preferred, dispreferred) or of such tuples."
        )
    encoded = [_encoded(number, _pair(number, pair), tokenizer) for number, pair in enumerate(pairs)]
    for pair in encoded:
        require_fitting(f"pair {pair.number}", pair.ids, (pair.preferred, pair.dispreferred), model)
    return encoded


def in_batches(model: nn.Module, pairs: Sequence[EncodedPair], size: int) -> Iterator[list[EncodedPair]]:
    """Pairs that can share a forward: padded where the model takes a mask, else of equal lengths."""
    masked = takes(model, "attention_mask")
    groups: dict[Any, list[EncodedPair]] = {}
    for pair in pairs:
        key: tuple[Any, ...] = tuple(
            (name, leaf.dtype) if along_tokens(name, leaf, pair) else (name, leaf.dtype, *leaf.shape[1:])
            for name, leaf in sorted(pair.others.items())
        )
        if any(not leaf.dim() or len(leaf) != 1 for leaf in pair.others.values()):
            key = (*key, pair.number)  # a row per patch, which belongs to no example of a batch
        if not masked:
            key = (*key, len(pair.ids), len(pair.preferred), len(pair.dispreferred))
        groups.setdefault(key, []).append(pair)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def padded_inputs(model: nn.Module, tokenizer: Any, batch: Sequence[EncodedPair]) -> dict[str, Tensor]:
    """The model's inputs for the prompts of a batch, padded on the right."""
    config = getattr(model, "config", None)
    named = (getattr(source, "pad_token_id", None) for source in (tokenizer, config))
    # any id will do under a mask
    pad = next((token for token in named if isinstance(token, int) and token >= 0), 0)
    length = max(len(pair.ids) for pair in batch)

    def filled(row: Tensor, value: int) -> Tensor:
        return torch.cat([row, row.new_full((length - len(row), *row.shape[1:]), value)])

    inputs = {"input_ids": torch.stack([filled(pair.ids, pad) for pair in batch])}
    if takes(model, "attention_mask"):
        inputs["attention_mask"] = torch.stack([filled(torch.ones_like(pair.ids), 0) for pair in batch])
    for name in batch[0].others:
        leaves = [
            filled(pair.others[name][0], 0)[None]
            if along_tokens(name, pair.others[name], pair)
            else pair.others[name]
            for pair in batch
        ]
        inputs[name] = torch.cat(leaves) if len(leaves) > 1 else leaves[0]
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        start = getattr(config, "decoder_start_token_id", None)
        if not isinstance(start, int):
            raise InputError(
                "the model is an encoder-decoder whose config has no decoder_start_token_id: set it, or give prompts "
                "as mappings with decoder_input_ids."
            )
        inputs["decoder_input_ids"] = torch.full((len(batch), 1), start)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {name: leaf.to(device) for name, leaf in inputs.items()}


def digest(pairs: Sequence[EncodedPair]) -> str:
    """A short hash of the prompts' and answers' token ids."""
    content = repr([(pair.ids.tolist(), pair.preferred, pair.dispreferred) for pair in pairs])
    return blake2b(content.encode(), digest_size=6).hexdigest()


def prompt_digest(ids: Tensor, others: Mapping[str, Tensor]) -> str:
    """A short hash of one prompt, images included: what no two splits may share."""
    found = blake2b(repr(ids.tolist()).encode(), digest_size=8)
    for name, leaf in sorted(others.items()):
        found.update(f"{name}{tuple(leaf.shape)}".encode())
        found.update(leaf.detach().cpu().double().numpy().tobytes())
    return found.hexdigest()


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes a keyword."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(each.name == name or each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)


def _pair(number: int, pair: Any) -> Pair:
    if isinstance(pair, Pair):
        return pair
    if isinstance(pair, tuple) and len(pair) in (3, 4):
        return Pair(*pair)
    given = f"a tuple of {len(pair)}" if isinstance(pair, tuple) else f"a {type(pair).__name__}"
    raise InputError(
        f"pair {number} is {given}; expected Pair(prompt, preferred, dispreferred, image=None) or such a tuple."
    )


def _encoded(number: int, pair: Pair, tokenizer: Any) -> EncodedPair:
    name = f"pair {number}"
    ids, others = encode_prompt(name, pair.prompt, pair.image, tokenizer)
    preferred = encode_answer(name, "preferred", pair.preferred, tokenizer)
    dispreferred = encode_answer(name, "dispreferred", pair.dispreferred, tokenizer)
    if preferred == dispreferred:
        raise InputError(
            f"pair {number} prefers {pair.preferred!r} to {pair.dispreferred!r}, which are the same tokens "
            f"{list(preferred)}; expected answers that differ. Leave the pair out."
        )
    return EncodedPair(number, ids, preferred, dispreferred, others)


def encode_prompt(name: str, prompt: Any, image: Any, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A prompt's token ids (length,) and the model's other inputs; ``name`` is "pair 3" or "question 3" in errors."""
    ids, others = _prompt(name, prompt, image, tokenizer)
    if not len(ids):
        raise InputError(f"the prompt of {name} has no tokens; expected at least one.")
    return ids, others


def _prompt(name: str, prompt: Any, image: Any, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    if image is not None:
        if not isinstance(prompt, str) or not callable(tokenizer):
            raise InputError(
                f"{name} has an image with a prompt of type {type(prompt).__name__}; expected text and the "
                "model's processor, or a prompt that is a mapping of prepared inputs and no image."
            )
        prompt = tokenizer(text=prompt, images=image, return_tensors="pt")
    if isinstance(prompt, Mapping):
        return _prepared(name, prompt)
    chat = (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and isinstance(next(iter(prompt), 0), Mapping)
    )
    if isinstance(prompt, str) or chat:
        call = _text_tokenizer(tokenizer)
        if call is None:
            raise InputError(f"{name} is text; give the model's tokenizer, or token ids.")
        found: Any = (
            call.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            if chat
            else call(prompt)
        )
        prompt = found["input_ids"]
    return _token_ids(name, "prompt", prompt), {}


def _prepared(name: str, prompt: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    ids = prompt.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f'{name} has "input_ids" {shape}; expected a (1, length) tensor of one example.')
    others = {str(name): leaf for name, leaf in prompt.items() if isinstance(leaf, Tensor)}
    mask = others.pop("attention_mask", None)
    real = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0].bool()
    del others["input_ids"]
    others = {name: leaf[:, real] if leaf.shape[:2] == ids.shape else leaf for name, leaf in others.items()}
    return ids[0][real], others


def encode_answer(name: str, side: str, answer: Answer, tokenizer: Any) -> tuple[int, ...]:
    """An answer's token ids; ``side`` is "preferred", "true", ... in errors."""
    if isinstance(answer, str):
        call = _text_tokenizer(tokenizer)
        if call is None:
            raise InputError(f"{name} is text; give the model's tokenizer, or token ids.")
        answer = call(answer, add_special_tokens=False)["input_ids"]
    found = tuple(
        _token_ids(name, f"{side} answer", [answer] if isinstance(answer, int) else answer).tolist()
    )
    if not found:
        raise InputError(f"the {side} answer of {name} has no tokens; expected at least one.")
    return found


def _token_ids(name: str, what: str, ids: Any) -> Tensor:
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0, 0, 0)
    if found.dim() == 2 and len(found) == 1:
        found = found[0]
    whole = not found.is_floating_point() and found.dtype != torch.bool
    if found.dim() > 1 or (found.numel() and not whole):
        raise InputError(
            f"the {what} of {name} is a {type(ids).__name__} that holds no list of token ids; expected text, "
            "ids such as [5, 6, 7], or a (length,) tensor of them."
        )
    return found.flatten().detach().cpu().long()


def _text_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", None) or tokenizer


def along_tokens(name: str, leaf: Tensor, pair: EncodedPair) -> bool:
    """Whether an input has an entry per token of the prompt."""
    if name.startswith("decoder_") or leaf.is_floating_point():
        return False
    return leaf.dim() >= 2 and leaf.shape[:2] == (1, len(pair.ids))


def require_fitting(name: str, ids: Tensor, answers: Sequence[Sequence[int]], model: nn.Module) -> None:
    """Raise InputError where a prompt with its longest answer is too long, or has tokens that the model has not."""
    most = most_tokens(model)
    length = len(ids)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        length += max(len(answer) for answer in answers)
    if most is not None and length > most:
        raise InputError(
            f"{name} has {length} tokens with its longer answer, and the model takes {most}; shorten the "
            "prompt or leave the pair out."
        )
    require_known(
        name, torch.tensor([*ids.tolist(), *(token for answer in answers for token in answer)]), model
    )


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens the model takes at once; None where its config does not say."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def require_known(name: str, ids: Tensor, model: nn.Module) -> None:
    """Raise InputError for tokens that the model has no embedding of."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(getattr(embedding, "weight", None), "shape", (0,))[0]
    wrong = ids[(ids < 0) | (ids >= rows)] if rows else ids[ids < 0]
    if len(wrong):
        raise InputError(
            f"{name} has the token {int(wrong[0])}, which is outside the model's {rows} tokens. Is it this "
            "model's tokenizer?"
        )
