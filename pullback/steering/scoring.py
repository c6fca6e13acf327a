"""Log-probabilities of answers, steered or not: many in one forward, the prompt once where that pays."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from pullback.core.errors import MethodError, ModelError

from .apply import Scale
from .pairs import EncodedPair, in_batches, padded_inputs, takes
from .questions import EncodedQuestion
from .vector import SteeringVector

__all__ = ["Setting", "answer_log_probs", "logits_of", "require_eval", "steered"]

Positions = Literal["all", "prompt", "generated"]
# below this many tokens saved per question, fewer and larger forwards are quicker than a cache
_WORTH_A_CACHE = 512


@dataclass(frozen=True)
class Setting:
    """Where and how strongly a vector is applied; the fields mean what they do in ``SteeringVector.apply``.

    Attributes:
        strength: 0 steers nothing.
        layers: block numbers; None is all that the vector has.
        scale, scope, preserve_norm: as in ``SteeringVector.apply``, the scope by name. Answers count as generated.

    >>> Setting(0.4, layers=(2,)).scale
    'relative'
    """

    strength: float = 0.4
    layers: tuple[int, ...] | None = None
    scale: Scale = "relative"
    scope: Positions = "all"
    preserve_norm: bool = True

    def __post_init__(self) -> None:
        number = self.strength
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise MethodError(f"strength={number!r}; expected a finite number such as 0.4.")
        for name, value, known in (("scale", self.scale, Scale), ("scope", self.scope, Positions)):
            if value not in get_args(known):
                raise MethodError(
                    f"{name}={value!r}; expected one of {', '.join(map(repr, get_args(known)))}."
                )


def steered(
    model: nn.Module,
    vector: SteeringVector | None,
    setting: Setting,
    scope: Any = "all",
    blocks: str | None = None,
) -> AbstractContextManager[Any]:
    """The context of a vector at a setting; one that does nothing for None or strength 0."""
    if vector is None or setting.strength == 0:
        return nullcontext()
    layers = None if setting.layers is None else list(setting.layers)
    return vector.apply(
        model, setting.strength, scale=setting.scale, scope=scope, preserve_norm=setting.preserve_norm,
        layers=layers, blocks=blocks,
    )  # fmt: skip


def require_eval(model: nn.Module) -> None:
    """Raise ModelError for a model in train mode, whose dropout would be taken for an effect."""
    if isinstance(model, nn.Module) and model.training:
        raise ModelError(
            "the model is in train mode, so that dropout would be taken for an effect of steering; call model.eval()."
        )


@torch.no_grad()
def answer_log_probs(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[EncodedQuestion],
    vector: SteeringVector | None = None,
    setting: Setting | None = None,
    *,
    batch_size: int = 16,
    reuse_prompt: bool | None = None,
    blocks: str | None = None,
) -> Tensor:
    """log p(answer | prompt) = Σ_t log p(y_t | x, y_<t) of every answer: (answers,) float64, in the questions' order.

    Args:
        questions: as ``encode_questions`` gives them.
        vector, setting: None is the model as it is.
        batch_size: rows per forward; answers that differ in their last token only share a row.
        reuse_prompt: whether each prompt is run once and its answers on its cache, where the model has a plain cache;
            None does so where it saves much. Results agree to float rounding.
        blocks: dotted path of the list of blocks, where it is not found.

    Cost: a forward per ``batch_size`` rows; with ``reuse_prompt`` two per question.
    """
    setting = setting or Setting()
    result: list[list[float]] = [[math.nan] * len(question.answers) for question in questions]
    rest: list[EncodedQuestion] = []
    places: list[int] = []
    for place, question in enumerate(questions):
        saved = len(question.prompt.ids) * (len({answer[:-1] for answer in question.answers}) - 1)
        wanted = saved >= _WORTH_A_CACHE if reuse_prompt is None else reuse_prompt
        found = _on_cache(model, tokenizer, question, vector, setting, blocks) if wanted else None
        if found is None:
            rest.append(question)
            places.append(place)
        else:
            result[place] = found
    for place, values in zip(
        places, _in_rows(model, tokenizer, rest, vector, setting, batch_size, blocks), strict=True
    ):
        result[place] = values
    return torch.tensor([value for each in result for value in each], dtype=torch.float64)


def logits_of(output: Any) -> Tensor:
    """(batch, length, vocabulary) of what a language model returned."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise ModelError(
            f"the model returned a {type(output).__name__} without logits (batch, length, vocabulary); expected a "
            "language model such as AutoModelForCausalLM."
        )
    return found


def _in_rows(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[EncodedQuestion],
    vector: SteeringVector | None,
    setting: Setting,
    batch_size: int,
    blocks: str | None,
) -> list[list[float]]:
    """Every answer after its prompt, in padded batches of similar length."""
    found = [[math.nan] * len(question.answers) for question in questions]
    # what an answer's last token would predict is not asked, so answers often have all that is run in common
    wanted: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for place, question in enumerate(questions):
        for number, answer in enumerate(question.answers):
            wanted.setdefault((place, answer[:-1]), []).append(number)
    keys = sorted(wanted, key=lambda key: len(questions[key[0]].prompt.ids) + len(key[1]))
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    rows = [
        questions[place].row(number, () if encoder_decoder else after)
        for number, (place, after) in enumerate(keys)
    ]
    for batch in in_batches(model, rows, batch_size):
        inputs = padded_inputs(model, tokenizer, batch)
        after = [keys[row.number][1] for row in batch]
        if encoder_decoder:
            started = inputs["decoder_input_ids"].cpu()
            starts = [started.shape[1]] * len(batch)
            longest = max(map(len, after))
            padded = [[*each, *[0] * (longest - len(each))] for each in after]
            answers = torch.tensor(padded, dtype=torch.long).reshape(len(batch), longest)
            inputs["decoder_input_ids"] = torch.cat([started, answers], 1).to(inputs["input_ids"].device)
            length = starts[0] + longest
        else:
            starts = [len(row.ids) - len(each) for row, each in zip(batch, after, strict=True)]
            length = inputs["input_ids"].shape[1]
        extra = {}
        if _keeps_logits(model) and not encoder_decoder:
            extra["logits_to_keep"] = length - min(starts) + 1
        with steered(model, vector, setting, _scope(setting, starts, length), blocks):
            logits = logits_of(model(**inputs, **extra))
        for row, each, start, values in zip(batch, after, starts, logits, strict=True):
            place, _ = keys[row.number]
            first = start - 1 - (length - len(values))
            log_probs = values[first : first + len(each) + 1].double().log_softmax(-1).cpu()
            shared = sum(float(log_probs[at, token]) for at, token in enumerate(each))
            for number in wanted[keys[row.number]]:
                last = questions[place].answers[number][-1]
                found[place][number] = shared + float(log_probs[len(each), last])
    return found


def _on_cache(
    model: nn.Module,
    tokenizer: Any,
    question: EncodedQuestion,
    vector: SteeringVector | None,
    setting: Setting,
    blocks: str | None,
) -> list[float] | None:
    """The answers on the cache of their prompt; None where the model has no plain cache."""
    if question.prompt.others or not _keeps_logits(model) or not takes(model, "attention_mask"):
        return None
    inputs = padded_inputs(model, tokenizer, [question.prompt])
    length = inputs["input_ids"].shape[1]
    after = sorted({answer[:-1] for answer in question.answers} - {()})
    longest = max(map(len, after), default=0)
    scope = _scope(setting, [length], length + longest)
    scope = scope[0] if isinstance(scope, Tensor) else scope
    with steered(model, vector, setting, scope, blocks):
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        cache = getattr(out, "past_key_values", None)
        layers = getattr(cache, "layers", ())
        if not layers or any(type(layer).__name__ != "DynamicLayer" for layer in layers):
            return None  # states and windows do not continue by several tokens
        first = logits_of(out)[0, -1].double().log_softmax(-1).cpu()
        rows: dict[tuple[int, ...], Tensor] = {(): first[None]}
        if after:
            assert cache is not None
            cache.batch_repeat_interleave(len(after))
            ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in after])
            real = torch.tensor([[1] * (length + len(each)) + [0] * (longest - len(each)) for each in after])
            device = inputs["input_ids"].device
            out = model(input_ids=ids.to(device), attention_mask=real.to(device), past_key_values=cache)
            for each, values in zip(after, logits_of(out), strict=True):
                log_probs = values[: len(each)].double().log_softmax(-1).cpu()
                rows[each] = torch.cat([first[None], log_probs])
    return [
        sum(float(rows[answer[:-1]][at, token]) for at, token in enumerate(answer))
        for answer in question.answers
    ]


def _scope(setting: Setting, starts: Sequence[int], length: int) -> Any:
    """In one pass prompt and answer are told apart by a mask (batch, length) over positions."""
    if setting.scope == "all":
        return "all"
    in_prompt = torch.arange(length) < torch.tensor(list(starts))[:, None]
    return in_prompt if setting.scope == "prompt" else ~in_prompt


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def row_of(number: int, ids: Tensor) -> EncodedPair:
    """Token ids alone as a row of a batch."""
    return EncodedPair(number, ids, (), (), {})
