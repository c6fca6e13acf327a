"""Questions with true and false answers, as token ids; what keeps fitted and tested ones apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError

from .pairs import (
    Answer,
    EncodedPair,
    Pair,
    along_tokens,
    encode_answer,
    encode_prompt,
    prompt_digest,
    require_fitting,
)

__all__ = ["EncodedQuestion", "Question", "encode_questions", "require_disjoint"]


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt with its true and its false answers, for multiple choice.

    Attributes:
        prompt, image: as in ``Pair``.
        true, false: the answers, each text or token ids; at least one of either.
        best: which of ``true`` stands for all in MC1; None lets the likeliest.

    >>> Question([5, 6], true=[8, [9, 10]], false=[11]).best is None
    True
    """

    prompt: Any
    true: Sequence[Answer]
    false: Sequence[Answer]
    best: int | None = None
    image: Any = None


@dataclass(frozen=True, eq=False)
class EncodedQuestion:
    """A question as token ids: the prompt's in ``prompt``, and the answers', the true ones first."""

    prompt: EncodedPair
    answers: tuple[tuple[int, ...], ...]
    true: int
    best: int | None

    @property
    def digest(self) -> str:
        """Of the prompt, images included."""
        return prompt_digest(self.prompt.ids, self.prompt.others)

    def row(self, number: int, after: Sequence[int]) -> EncodedPair:
        """The prompt continued by tokens, as a row of a batch."""
        ids = torch.cat([self.prompt.ids, torch.tensor(list(after), dtype=torch.long)])
        others = {
            name: _extended(leaf, len(after)) if along_tokens(name, leaf, self.prompt) else leaf
            for name, leaf in self.prompt.others.items()
        }
        return EncodedPair(number, ids, (), (), others)


def encode_questions(model: nn.Module, tokenizer: Any, questions: Sequence[Any]) -> list[EncodedQuestion]:
    """Token ids of every question; a pair is a question with one true and one false answer.

    Raises InputError for questions without answers of both kinds, or that do not fit into the model.
    """
    if isinstance(questions, Question | Pair | str) or not isinstance(questions, Sequence) or not questions:
        given = (
            "empty" if isinstance(questions, Sequence) and not len(questions) else type(questions).__name__
        )
        raise InputError(
            f"questions is {given}; expected a list of Question(prompt, true, false) or of "
            "Pair(prompt, preferred, dispreferred)."
        )
    found = []
    for number, each in enumerate(questions):
        name = f"question {number}"
        question = _question(name, each)
        ids, others = encode_prompt(name, question.prompt, question.image, tokenizer)
        true = [encode_answer(name, "true", answer, tokenizer) for answer in question.true]
        false = [encode_answer(name, "false", answer, tokenizer) for answer in question.false]
        both = [answer for answer in true if answer in false]
        if both:
            raise InputError(
                f"{name} has an answer that is both true and false, tokens {list(both[0])}; expected answers that "
                "differ. Leave it out."
            )
        require_fitting(name, ids, [*true, *false], model)
        prompt = EncodedPair(number, ids, (), (), others)
        found.append(EncodedQuestion(prompt, (*true, *false), len(true), question.best))
    return found


def require_disjoint(tested: Sequence[EncodedQuestion], seen: Sequence[str], what: str) -> None:
    """Raise InputError where a prompt of the test was seen before; ``seen`` holds digests of prompts."""
    known = set(seen)
    both = [question.prompt.number for question in tested if question.digest in known]
    if both:
        raise InputError(
            f"{len(both)} of the {len(tested)} questions, number {both[0]} first, {what}; a test on them shows what "
            "was memorised. Leave them out of one of the two: pullback.datasets.split_questions keeps them apart."
        )


def _question(name: str, given: Any) -> Question:
    if isinstance(given, tuple) and len(given) in (3, 4):
        given = Pair(*given)
    if isinstance(given, Pair):
        return Question(given.prompt, [given.preferred], [given.dispreferred], image=given.image)
    if not isinstance(given, Question):
        raise InputError(
            f"{name} is a {type(given).__name__}; expected Question(prompt, true, false) or "
            "Pair(prompt, preferred, dispreferred)."
        )
    for side, answers in (("true", given.true), ("false", given.false)):
        if isinstance(answers, str) or not isinstance(answers, Sequence) or not len(answers):
            raise InputError(
                f"the {side} answers of {name} are {answers!r}; expected a list of at least one answer."
            )
    if given.best is not None and not 0 <= given.best < len(given.true):
        raise InputError(
            f"best={given.best} of {name} is none of its {len(given.true)} true answers; expected 0 to "
            f"{len(given.true) - 1}, or None."
        )
    return given


def _extended(leaf: Tensor, length: int) -> Tensor:
    return torch.cat([leaf, leaf.new_zeros((1, length, *leaf.shape[2:]))], 1)
