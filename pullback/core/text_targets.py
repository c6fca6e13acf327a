"""Text targets: log-probabilities of tokens and whole strings, their contrasts, generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pullback.core.class_targets import ClassScores, Index, pick
from pullback.core.errors import TargetError
from pullback.core.target_outputs import Resolved, TargetContext, check_rows, main_tensor, per_example, real

__all__ = ["Contrast", "LogProb", "TokenAt"]


def _encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids by ``encode`` or, without one, by calling; any of the usual results."""
    ids = getattr(tokenizer, "encode", tokenizer)(text, add_special_tokens=False)
    if not isinstance(ids, list | tuple | Tensor):
        ids = ids["input_ids"] if hasattr(ids, "__getitem__") and "input_ids" in ids else ids.ids
    tokens = [int(token) for token in torch.as_tensor(ids).flatten()]
    if not tokens:
        raise TargetError(f"the text {text!r} has no tokens: pass a text that the tokenizer keeps.")
    return tokens


def _tokens(value: Any, tokenizer: Any, batch: int) -> list[list[int]] | None:
    """Each example's token ids; None where the value is to be read as a class index or label."""
    if isinstance(value, str):
        return None if tokenizer is None else [_encode(value, tokenizer)] * batch
    if isinstance(value, list | tuple) and value and all(isinstance(entry, str) for entry in value):
        if len(value) != batch:
            raise TargetError(
                f"{len(value)} texts for a batch of {batch}: pass one text, or one per example."
            )
        return None if tokenizer is None else [_encode(text, tokenizer) for text in value]
    return [[token] for token in per_example(value, batch, "token").tolist()] if value is not None else None


def _several(*sides: list[list[int]] | None) -> list[list[list[int]]] | None:
    known = [side for side in sides if side is not None]
    return known if any(len(tokens) > 1 for side in known for tokens in side) else None


def _single(value: Any, tokens: list[list[int]] | None) -> Index:
    return value if tokens is None else [entry[0] for entry in tokens]


def _quoted(tokens: list[list[int]], tokenizer: Any) -> list[str]:
    return [repr(tokenizer.decode(entry)) if tokenizer is not None else str(entry) for entry in tokens]


class _StringLogProb:
    """(R,) log-probability of each example's tokens, read from one continuation's output."""

    def __init__(self, tokens: list[list[int]], clean: Any, context: TargetContext) -> None:
        logits, last = main_tensor(clean), context.last
        check_rows(logits, context.batch)
        if logits.ndim != 3 or last is None:
            raise TargetError(
                f"a text of several tokens needs (B, T, V) logits of a language model and its input_ids or "
                f"attention_mask; output shape is {tuple(logits.shape)}. For a classifier pass a class index."
            )
        if getattr(context.config, "is_encoder_decoder", False):
            raise TargetError(
                "a text of several tokens cannot be appended to an encoder's prompt: give it as "
                "decoder_input_ids and explain its tokens one by one with TokenAt(position)."
            )
        lengths = torch.tensor([len(entry) for entry in tokens])
        steps = torch.arange(int(lengths.max()))
        self.shape = logits.shape
        self.present = (steps < lengths[:, None]).to(logits.device)
        self.tokens = torch.zeros(len(tokens), len(steps), dtype=torch.long)
        for example, entry in enumerate(tokens):
            self.tokens[example, : len(entry)] = torch.tensor(entry)
        self.tokens = self.tokens.to(logits.device)
        # Column last + j predicts token j; a shorter text's spare columns are read anywhere and dropped.
        self.columns = last.to(logits.device)[:, None] + steps.to(logits.device)
        if bool((self.columns[self.present] >= self.shape[1]).any()):
            raise TargetError(f"the output's {self.shape[1]} columns are too few for prompt and text.")
        if bool(((self.tokens < 0) | (self.tokens >= self.shape[2])).any()):
            raise TargetError(
                f"token {int(self.tokens.max())} is outside the model's {self.shape[2]} tokens; output shape "
                f"is {tuple(self.shape)}. Is it this model's tokenizer?"
            )

    def __call__(self, output: Any, examples: Tensor) -> Tensor:
        logits = check_rows(main_tensor(output), examples.numel(), self.shape[1:])
        examples = examples.to(logits.device)
        columns = self.columns.to(logits.device)[examples].clamp(max=self.shape[1] - 1)
        rows = torch.arange(len(examples), device=logits.device)[:, None]
        logarithms = real(logits[rows, columns]).log_softmax(2)
        tokens = self.tokens.to(logits.device)[examples]
        values = logarithms.gather(2, tokens[:, :, None])[:, :, 0]
        return torch.where(self.present.to(logits.device)[examples], values, 0.0).sum(1)


def _strings(sides: list[list[list[int]]], output: Any, context: TargetContext) -> list[_StringLogProb]:
    if not isinstance(output, tuple | list) or len(output) != len(sides):
        raise TargetError(
            f"a text of several tokens is explained from {len(sides)} output(s), one for each continuation, "
            f"got {type(output).__name__}. Is the model's input made of token ids?"
        )
    return [_StringLogProb(tokens, part, context) for tokens, part in zip(sides, output, strict=True)]


@dataclass(frozen=True)
class LogProb:
    """Log-probability of a class, token or text: log p(y | prompt) = sum_j log p(y_j | prompt, y_<j).

    ``text_or_index``: a text or (B,) texts, encoded by ``tokenizer`` without special tokens (without a
    tokenizer, a label of the model), or token ids or classes, one or (B,). ``position``: the column read for
    a single token; None is the mask token where there is one, else the last real token.

    >>> target = LogProb(1)
    >>> target.resolve(torch.zeros(1, 4), TargetContext(batch=1)).score(torch.zeros(1, 4), torch.arange(1))
    tensor([-1.3863])
    """

    text_or_index: Index
    tokenizer: Any = field(default=None, repr=False)
    position: Any = None

    def continuations(self, batch: int) -> list[list[list[int]]] | None:
        several = _several(_tokens(self.text_or_index, self.tokenizer, batch))
        if several is not None and self.position is not None:
            raise TargetError(
                f"LogProb: {self.text_or_index!r} is several tokens, which continue the prompt: leave "
                "position out, or explain one token at a time with TokenAt(position, token)."
            )
        return several

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        several = self.continuations(context.batch)
        if several is not None:
            (string,) = _strings(several, output, context)
            labels = tuple(f"log-probability of {text}" for text in _quoted(several[0], self.tokenizer))
            return Resolved(labels, None, lambda output, rows: string(output[0], rows))
        tokens = _tokens(self.text_or_index, self.tokenizer, context.batch)
        scores = ClassScores.of(
            output, context, self.position, getattr(self.tokenizer, "mask_token_id", None)
        )
        return _log_probability(
            scores, _single(self.text_or_index, tokens), self.tokenizer, output, scores.places()
        )


def _log_probability(
    scores: ClassScores, token: Index, tokenizer: Any, output: Any, places: list[str]
) -> Resolved:
    if scores.classes < 2:
        raise TargetError(
            f"the log-probability of a single class is always 0; output shape is {tuple(scores.shape)}. "
            "Use target=None for the value, or Probability() for its sigmoid."
        )
    index = scores.index(token, output)
    named = zip(scores.names(index, tokenizer), places, strict=True)
    return Resolved(
        tuple(f"log-probability of {name}{at}" for name, at in named),
        index,
        lambda output, rows: pick(scores(output, rows).log_softmax(1), index, rows),
    )


@dataclass(frozen=True)
class Contrast:
    """Why this rather than that: log p(preferred) - log p(dispreferred), a logit difference if single tokens.

    Each side: a class, token id, label or text, or (B,) of them. Texts of several tokens are compared by the
    log-probabilities of the whole texts, each continuing the prompt. (Yin and Neubig 2022, arXiv:2202.10419)

    >>> target = Contrast(0, 2)
    >>> target.resolve(torch.tensor([[3.0, 0.0, 1.0]]), TargetContext(batch=1)).labels
    ('class 0 minus class 2',)
    """

    preferred: Index
    dispreferred: Index
    tokenizer: Any = field(default=None, repr=False)

    def _sides(self, batch: int) -> tuple[list[list[int]] | None, list[list[int]] | None]:
        if self.preferred is None or self.dispreferred is None:
            raise TargetError("Contrast needs both sides; for the best other class use Margin(index).")
        return _tokens(self.preferred, self.tokenizer, batch), _tokens(
            self.dispreferred, self.tokenizer, batch
        )

    def continuations(self, batch: int) -> list[list[list[int]]] | None:
        return _several(*self._sides(batch))

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        sides = self._sides(context.batch)
        several = _several(*sides)
        if several is not None:
            preferred, dispreferred = _strings(several, output, context)
            texts = zip(*(_quoted(side, self.tokenizer) for side in several), strict=True)
            return Resolved(
                tuple(f"log-probability of {text} minus {rival}" for text, rival in texts),
                None,
                lambda output, rows: preferred(output[0], rows) - dispreferred(output[1], rows),
            )
        scores = ClassScores.of(output, context, None, getattr(self.tokenizer, "mask_token_id", None))
        index = scores.index(_single(self.preferred, sides[0]), output)
        other = scores.index(_single(self.dispreferred, sides[1]), output)
        same = index == other
        if bool(same.any()):
            example = int(same.nonzero()[0])
            named = scores.names(index, self.tokenizer)[example]
            raise TargetError(f"Contrast: both sides of example {example} are {named}: they differ by 0.")

        def score(output: Any, rows: Tensor) -> Tensor:
            values = scores(output, rows)
            return pick(values, index, rows) - pick(values, other, rows)

        names = (scores.names(index, self.tokenizer), scores.names(other, self.tokenizer), scores.places())
        labels = tuple(f"{name} minus {rival}{at}" for name, rival, at in zip(*names, strict=True))
        return Resolved(labels, index, score)


@dataclass(frozen=True)
class TokenAt:
    """Log-probability of the token at a position of given text: log p(token | tokens before position).

    It is read from the logits one column earlier. ``position``: column, one or (B,); negative ones count back
    from the last real token, which is -1. ``token``: id, one-token text, (B,), or None: the one there.

    >>> context = TargetContext(batch=1, input_ids=torch.tensor([[2, 0, 1]]))
    >>> TokenAt(-1).resolve(torch.zeros(1, 3, 4), context).labels
    ('log-probability of token 1 at 2',)
    """

    position: int | Sequence[int] | Tensor
    token: Index = None
    tokenizer: Any = field(default=None, repr=False)

    def resolve(self, output: Any, context: TargetContext) -> Resolved:
        batch, ids, last = context.batch, context.input_ids, context.last
        position = per_example(self.position, batch, "position").cpu()
        if getattr(context.config, "is_encoder_decoder", False):
            # The token ids known are the encoder's; the positions are the decoder's.
            ids, last = None, torch.full((batch,), main_tensor(output).shape[1] - 1)
        if last is not None:
            position = torch.where(position < 0, last.cpu() + 1 + position, position)
        if bool((position < 1).any()):
            raise TargetError("TokenAt: no token comes before the first one; use a position from 1 on.")
        token = self.token
        if token is None:
            if ids is None or bool((position >= ids.shape[1]).any()):
                raise TargetError("TokenAt: there is no input token at the position, pass token=.")
            token = ids.cpu().gather(1, position[:, None])[:, 0]
        tokens = _tokens(token, self.tokenizer, batch)
        if _several(tokens) is not None:
            raise TargetError(
                f"TokenAt: {token!r} is several tokens. Use LogProb(text, tokenizer=tokenizer)."
            )
        scores = ClassScores.of(output, context, position - 1)
        places = [f" at {place}" for place in position.tolist()]
        return _log_probability(scores, _single(token, tokens), self.tokenizer, output, places)
