"""Log-probabilities of given answers, with a model as it is or steered, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import InputError, MethodError, ModelError

from .apply import Scale
from .blocks import Layers
from .pairs import Answer, EncodedPair, Pair, encode_pairs, in_batches, padded_inputs, token_ids_of
from .scope import Scope
from .vector import SteeringVector

__all__ = ["Answered", "Question", "Questions", "Setting", "answered"]


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt with answers that are right and answers that are not; the first right one is the one to prefer.

    ``prompt``, the answers and ``image`` as in ``Pair``. ``group``: what items share that must not be split, such as
    a category; "" for nothing.

    >>> Question([5, 6], (7,), (8, 9)).correct
    (7,)
    """

    prompt: Any
    correct: tuple[Answer, ...]
    incorrect: tuple[Answer, ...]
    image: Any = None
    group: str = ""


@dataclass(frozen=True)
class Setting:
    """Where and how strongly a vector is applied, as ``SteeringVector.apply`` takes it."""

    strength: float = 0.4
    layers: Layers | None = None
    scale: Scale = "relative"
    scope: Scope = "all"
    preserve_norm: bool = True

    def __str__(self) -> str:
        where = "all blocks" if self.layers is None else f"blocks {self.layers}"
        return f"strength {self.strength:g} at {where}"


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions as token ids. ``answers``: one entry per answer, its prompt among the ids that come before it.

    ``numbers``: (answers,) the question of each answer. ``right``: (answers,) bool. ``first``: (questions,) the answer
    to prefer. ``prompts``: the prompts' ids.
    """

    answers: Sequence[EncodedPair]
    numbers: Tensor
    right: Tensor
    first: Tensor
    prompts: Sequence[tuple[int, ...]]

    @classmethod
    def encoded(cls, model: nn.Module, tokenizer: Any, items: Sequence[Any]) -> Questions:
        """From questions, pairs or tuples of a pair. Raises InputError for none, or for one without a wrong answer."""
        if isinstance(items, Pair | Question | str) or not isinstance(items, Sequence) or not items:
            what = "empty" if isinstance(items, Sequence) and not items else type(items).__name__
            raise InputError(f"items is {what}; expected a list of Question(...) or Pair(...), at least one.")
        answers: list[EncodedPair] = []
        numbers, right, first, prompts = [], [], [], []
        for number, item in enumerate(items):
            asked = _question(number, item)
            first.append(len(answers))
            ids = {
                side: _answers(number, getattr(asked, side), side, tokenizer)
                for side in ("correct", "incorrect")
            }
            if both := set(ids["correct"]) & set(ids["incorrect"]):
                raise InputError(
                    f"question {number} has an answer that is right and wrong (tokens {list(both.pop())}); leave it "
                    "out on one side."
                )
            pairs = [
                (asked.prompt, list(answer), list(ids["incorrect"][0]), asked.image)
                for answer in ids["correct"]
            ]
            pairs += [
                (asked.prompt, list(answer), list(ids["correct"][0]), asked.image)
                for answer in ids["incorrect"]
            ]
            encoded = encode_pairs(model, tokenizer, pairs)
            answers += [replace(each, number=len(answers) + place) for place, each in enumerate(encoded)]
            numbers += [number] * len(encoded)
            right += [True] * len(ids["correct"]) + [False] * len(ids["incorrect"])
            prompts.append(tuple(encoded[0].ids.tolist()))
        return cls(answers, torch.tensor(numbers), torch.tensor(right), torch.tensor(first), prompts)

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True, eq=False)
class Answered:
    """What a model gives the answers of questions.

    ``log_probs``: (answers,) float64, summed over an answer's tokens. ``lengths``: (answers,) tokens.
    """

    questions: Questions
    log_probs: Tensor
    lengths: Tensor

    def preferred(self) -> Tensor:
        """log p of the answer to prefer, (questions,)."""
        return self.log_probs[self.questions.first]

    def margins(self) -> Tensor:
        """log p of the answer to prefer minus that of the likeliest wrong one, (questions,)."""
        return self.preferred() - self._over(self.log_probs, ~self.questions.right, "amax")

    def mc1(self, per_token: bool = False) -> Tensor:
        """1 where the answer to prefer is likelier than every wrong one, (questions,)."""
        scores = self._scores(per_token)
        wrong = self._over(scores, ~self.questions.right, "amax")
        return (scores[self.questions.first] > wrong).double()

    def mc2(self, per_token: bool = False) -> Tensor:
        """``Σ_right p / Σ p`` over the answers of a question, (questions,)."""
        scores = self._scores(per_token)
        largest = self._over(scores, torch.ones_like(self.questions.right), "amax")
        mass = (scores - largest[self.questions.numbers]).exp()
        total = torch.zeros_like(largest).index_add(0, self.questions.numbers, mass)
        right = torch.zeros_like(largest).index_add(0, self.questions.numbers, mass * self.questions.right)
        return right / total

    def mass(self) -> Tensor:
        """Σ p over all answers of a question, (questions,)."""
        total = self.log_probs.new_zeros(len(self.questions))
        return total.index_add(0, self.questions.numbers, self.log_probs.exp())

    def _scores(self, per_token: bool) -> Tensor:
        return self.log_probs / self.lengths if per_token else self.log_probs

    def _over(self, values: Tensor, chosen: Tensor, reduce: Any) -> Tensor:
        start = values.new_full((len(self.questions),), -torch.inf)
        return start.scatter_reduce(0, self.questions.numbers[chosen], values[chosen], reduce)


@torch.no_grad()
def answered(
    model: nn.Module,
    tokenizer: Any,
    questions: Questions,
    vector: SteeringVector | None = None,
    setting: Setting | None = None,
    *,
    batch_size: int = 16,
    blocks: str | None = None,
) -> Answered:
    """Log-probabilities of every answer after its prompt.

    In ``setting.scope`` "prompt" is the prompt and "generated" the answer, which is not generated here. Results do not
    depend on ``batch_size``. Raises ModelError where the model is in train mode.
    """
    if model.training:
        raise ModelError(
            "the model is in train mode, so that it drops units at random; call model.eval() first."
        )
    found = torch.zeros(len(questions.answers), dtype=torch.float64)
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for rows in _batches(model, questions.answers, batch_size, encoder_decoder):
        inputs = padded_inputs(model, tokenizer, [row.given for row in rows])
        if encoder_decoder:
            inputs["decoder_input_ids"] = _decoder_inputs(model, rows, inputs["input_ids"].device)
        with _steered(model, rows, vector, setting, blocks):
            logits = model(**inputs).logits
        places = [(row, place) for row, each in enumerate(rows) for place in each.places(logits.shape[1])]
        index = torch.tensor(places, device=logits.device)
        chosen = logits[index[:, 0], index[:, 1]]
        targets = torch.tensor([token for each in rows for token in each.answer], device=logits.device)
        wide = chosen.float() if chosen.dtype in (torch.float16, torch.bfloat16) else chosen
        log_probs = wide.log_softmax(-1).gather(1, targets[:, None])[:, 0].double().cpu()
        owners = torch.tensor([each.number for each in rows for _ in each.answer])
        found.index_add_(0, owners, log_probs)
    lengths = torch.tensor([len(each.preferred) for each in questions.answers], dtype=torch.float64)
    return Answered(questions, found, lengths)


@dataclass(frozen=True, eq=False)
class _Row:
    """One answer in a forward pass: what the model is given, and where in it the answer's tokens are predicted."""

    number: int
    given: EncodedPair
    answer: tuple[int, ...]
    start: int  # tokens before the answer, where the blocks run

    def places(self, length: int) -> range:
        """Positions of the logits of the answer's tokens; logits may be of the text after the image's tokens only."""
        return range(self.start - 1, self.start - 1 + len(self.answer))


def _batches(
    model: nn.Module, answers: Sequence[EncodedPair], size: int, encoder_decoder: bool
) -> Iterator[list[_Row]]:
    made = []
    for each in answers:
        start = 1 if encoder_decoder else len(each.ids)
        given = each if encoder_decoder else _with_answer(each)
        made.append(_Row(each.number, given, each.preferred, start))
    by_number = {row.number: row for row in made}
    for batch in in_batches(model, [row.given for row in made], size):
        yield [by_number[each.number] for each in batch]


def _with_answer(each: EncodedPair) -> EncodedPair:
    """The prompt with all tokens of the answer but the last, which is only predicted."""
    extra = torch.tensor(each.preferred[:-1], dtype=torch.long)
    others = {
        name: torch.cat([leaf, leaf.new_zeros(1, len(extra), *leaf.shape[2:])], 1)
        if leaf.dim() > 1 and leaf.shape[:2] == (1, len(each.ids))
        else leaf
        for name, leaf in each.others.items()
    }
    return replace(each, ids=torch.cat([each.ids, extra]), others=others)


def _decoder_inputs(model: nn.Module, rows: Sequence[_Row], device: torch.device) -> Tensor:
    start = int(model.config.decoder_start_token_id)  # type: ignore[union-attr, arg-type]
    longest = max(len(row.answer) for row in rows)
    ids = [[start, *row.answer[:-1]] + [start] * (longest - len(row.answer)) for row in rows]
    return torch.tensor(ids, device=device)


def _steered(
    model: nn.Module,
    rows: Sequence[_Row],
    vector: SteeringVector | None,
    setting: Setting | None,
    blocks: str | None,
) -> AbstractContextManager[Any]:
    if vector is None:
        return nullcontext()
    setting = Setting() if setting is None else setting
    scope: Scope = setting.scope
    if isinstance(scope, str) and scope != "all":
        # the answer is given here, not generated: say by hand which positions are its own
        longest = max(row.start - 1 + len(row.answer) for row in rows)
        starts = torch.tensor([row.start for row in rows])[:, None]
        scope = torch.arange(longest)[None] < starts
        scope = scope if setting.scope == "prompt" else ~scope
    return vector.apply(
        model,
        setting.strength,
        scale=setting.scale,
        scope=scope,
        preserve_norm=setting.preserve_norm,
        layers=setting.layers,
        blocks=blocks,
    )


def _question(number: int, item: Any) -> Question:
    if isinstance(item, tuple) and len(item) in (3, 4):
        item = Pair(*item)
    if isinstance(item, Pair):
        item = Question(item.prompt, (item.preferred,), (item.dispreferred,), item.image)
    if not isinstance(item, Question):
        raise InputError(
            f"item {number} is a {type(item).__name__}; expected Question(prompt, correct, incorrect) or "
            "Pair(prompt, preferred, dispreferred)."
        )
    return item


def _answers(number: int, answers: Any, side: str, tokenizer: Any) -> list[tuple[int, ...]]:
    if isinstance(answers, str) or not isinstance(answers, Sequence) or not answers:
        raise InputError(
            f"question {number} has {answers!r} as {side} answers; expected a tuple of at least one answer."
        )
    return list(
        dict.fromkeys(token_ids_of(number, f"{side} answer", answer, tokenizer) for answer in answers)
    )


def require_setting(setting: Setting) -> None:
    """Raise MethodError for a setting that is none."""
    if not isinstance(setting, Setting):
        raise MethodError(f"a setting is {setting!r}; expected Setting(strength=0.4, layers=None).")


def prompts_of(questions: Questions) -> Mapping[tuple[int, ...], int]:
    """The number of the first question with each prompt."""
    found: dict[tuple[int, ...], int] = {}
    for number, prompt in enumerate(questions.prompts):
        found.setdefault(prompt, number)
    return found
