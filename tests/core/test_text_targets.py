"""Token and string targets against a slow loop over log-softmax, with left and right padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback.core.errors import TargetError
from pullback.core.targets import (
    Contrast,
    Logit,
    LogProb,
    Margin,
    TargetContext,
    TokenAt,
    continuations,
    resolve,
)

VOCABULARY = "abcdefgh?"
ROWS = torch.tensor([1, 2, 0, 0, 2])
EVERY = torch.arange(3)
MASKS = {
    "right": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]),
    "left": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]),
    "none": None,
}
LAST = {"right": [2, 3, 1], "left": [3, 3, 3], "none": [3, 3, 3]}


class Characters:
    """One token per character."""

    mask_token_id: int | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([8] if add_special_tokens else []) + [VOCABULARY.index(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(VOCABULARY[i] for i in ids)


class Called:
    """A tokenizer that is only called, with dict results of tensors."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([Characters().encode(text, add_special_tokens)])}

    decode = Characters.decode


TOKENIZER = Characters()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(padding: str = "right", **known: Any) -> TargetContext:
    ids = torch.arange(12).reshape(3, 4) % 8
    return TargetContext(batch=3, **{"attention_mask": MASKS[padding], "input_ids": ids, **known})


def slow(logits: Tensor, last: list[int], texts: list[str]) -> Tensor:
    """sum_j log p(y_j | prompt, y_<j), written out."""
    totals = []
    for row, start, text in zip(logits, last, texts, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for j, character in enumerate(text):
            z = row[start + j]
            total = total + z[VOCABULARY.index(character)] - z.exp().sum().log()
        totals.append(total)
    return torch.stack(totals)


def close(actual: Tensor, expected: Tensor) -> None:
    # float64 sums of at most 9 exponentials and 3 tokens
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", MASKS)
def test_last_is_the_last_real_token(padding: str) -> None:
    last = context(padding).last
    assert last is not None
    assert last.tolist() == LAST[padding]


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("texts", ["bad", ["bad", "c", "fe"]], ids=["one text", "a text each"])
def test_a_string_is_the_sum_of_its_tokens(padding: str, texts: Any) -> None:
    target = LogProb(texts, tokenizer=TOKENIZER)
    each = [texts] * 3 if isinstance(texts, str) else texts
    assert continuations(target, 3) == [[TOKENIZER.encode(text, False) for text in each]]
    clean = draw(3, 6, 9)
    resolved = resolve(target, (clean,), context(padding))
    changed = draw(3, 6, 9, seed=5)
    expected = slow(changed, LAST[padding], each)
    close(resolved.score((changed,), EVERY), expected)
    close(resolved.score((changed[ROWS],), ROWS), expected[ROWS])
    assert resolved.labels[0] == "log-probability of 'bad'"
    assert resolved.index is None


@pytest.mark.parametrize("padding", MASKS)
def test_contrast_of_strings_is_the_difference_of_their_log_probabilities(padding: str) -> None:
    target = Contrast("bad", ["a", "gh", "c"], tokenizer=TOKENIZER)
    assert continuations(target, 3) == [[[1, 0, 3]] * 3, [[0], [6, 7], [2]]]
    outputs = (draw(3, 6, 9), draw(3, 5, 9, seed=1))
    resolved = resolve(target, outputs, context(padding))
    expected = slow(outputs[0], LAST[padding], ["bad"] * 3) - slow(
        outputs[1], LAST[padding], ["a", "gh", "c"]
    )
    close(resolved.score(outputs, EVERY), expected)
    close(resolved.score(tuple(output[ROWS] for output in outputs), ROWS), expected[ROWS])
    assert resolved.labels[1] == "log-probability of 'bad' minus 'gh'"


@pytest.mark.parametrize("padding", MASKS)
def test_single_tokens_read_the_last_real_position(padding: str) -> None:
    logits = draw(3, 4, 9)
    last = [row[at] for row, at in zip(logits, LAST[padding], strict=True)]
    one = resolve(LogProb("c", tokenizer=TOKENIZER), logits, context(padding))
    close(one.score(logits[ROWS], ROWS), slow(logits, LAST[padding], ["c"] * 3)[ROWS])
    assert one.labels[0] == f"log-probability of token 'c' at {LAST[padding][0]}"
    pair = resolve(Contrast("c", "e", tokenizer=Called()), logits, context(padding))
    close(pair.score(logits, EVERY), torch.stack([z[2] - z[4] for z in last]))
    close(
        pair.score(logits, EVERY),
        slow(logits, LAST[padding], ["c"] * 3) - slow(logits, LAST[padding], ["e"] * 3),
    )
    assert pair.index is not None
    assert pair.index.tolist() == [2, 2, 2]
    assert continuations(Contrast("c", "e", tokenizer=Called()), 3) is None
    ids = resolve(Contrast(torch.tensor([1, 2, 3]), 0), logits, context(padding))
    close(ids.score(logits, EVERY), torch.stack([z[1 + b] - z[0] for b, z in enumerate(last)]))
    margin = resolve(Margin(3, 5), logits, context(padding))
    close(margin.score(logits, EVERY), torch.stack([z[3] - z[5] for z in last]))


@pytest.mark.parametrize("padding", MASKS)
def test_none_is_the_predicted_next_token_and_stays_it(padding: str) -> None:
    logits = draw(3, 4, 9)
    resolved = resolve(None, {"logits": logits}, context(padding))
    predicted = [int(row[at].argmax()) for row, at in zip(logits, LAST[padding], strict=True)]
    pairs = zip(predicted, LAST[padding], strict=True)
    assert resolved.labels == tuple(f"token {k} at {at}" for k, at in pairs)
    values = [-float(row[at, k]) for row, at, k in zip(logits, LAST[padding], predicted, strict=True)]
    assert resolved.score({"logits": -logits}, EVERY).tolist() == values


def test_none_without_any_knowledge_of_tokens_needs_the_name_logits() -> None:
    logits = draw(3, 4, 9)
    bare = TargetContext(batch=3)
    named = {"logits": logits}
    close(resolve(0, named, bare).score(named, EVERY), logits[:, 3, 0])
    close(resolve(Logit(0, position=1), logits, bare).score(logits, EVERY), logits[:, 1, 0])
    with pytest.raises(TargetError, match="not known to be over tokens"):
        resolve(None, logits, bare)


def test_a_masked_model_is_read_at_its_mask_token() -> None:
    logits = draw(3, 4, 9)
    ids = torch.tensor([[1, 8, 2, 0], [8, 8, 1, 1], [1, 1, 0, 0]])
    # the first mask; the last real token if there is none
    expected = torch.stack([logits[0, 1, 5], logits[1, 0, 5], logits[2, 1, 5]])
    known = context(input_ids=ids, config=SimpleNamespace(mask_token_id=8))
    close(resolve(5, logits, known).score(logits, EVERY), expected)
    tokenizer = Characters()
    tokenizer.mask_token_id = 8
    resolved = resolve(LogProb("f", tokenizer=tokenizer), logits, context(input_ids=ids))
    close(resolved.score(logits, EVERY), slow(logits, [1, 0, 1], ["f"] * 3))


def test_positions_count_columns_or_back_from_the_last_real_token() -> None:
    logits = draw(3, 4, 9)
    at = resolve(Logit(2, position=[0, 3, 1]), logits, context())
    close(at.score(logits, EVERY), logits[EVERY, [0, 3, 1], 2])
    back = resolve(Logit(2, position=-2), logits, context())
    close(back.score(logits, EVERY), logits[EVERY, [1, 2, 0], 2])
    with pytest.raises(TargetError, match="position 3 of example 0 is padding"):
        resolve(Logit(2, position=3), logits, context())
    with pytest.raises(TargetError, match=r"position 4 of example 0 is outside the output's 4 columns"):
        resolve(Logit(2, position=4), logits, context())


def test_longer_and_shorter_outputs_meet_the_tokens_at_the_end() -> None:
    longer, only_last = draw(3, 6, 9), draw(3, 1, 9)  # two soft tokens in front; logits_to_keep=1
    soft = resolve(1, longer, context())
    close(soft.score(longer, EVERY), longer[EVERY, torch.tensor(LAST["right"]) + 2, 1])
    kept = resolve(1, only_last, context("left"))
    assert kept.score(only_last, EVERY).tolist() == only_last[:, 0, 1].tolist()
    with pytest.raises(TargetError, match="outside the output's 1 columns"):
        resolve(1, only_last, context("right"))


@pytest.mark.parametrize("padding", MASKS)
def test_token_at_reads_the_logits_one_column_earlier(padding: str) -> None:
    logits = draw(3, 4, 9)
    given = context(padding)
    resolved = resolve(TokenAt(-1), logits, given)
    expected = []
    for row, last, ids in zip(logits, LAST[padding], given.input_ids, strict=True):
        z = row[last - 1]
        expected.append(z[ids[last]] - z.exp().sum().log())
    close(resolved.score(logits[ROWS], ROWS), torch.stack(expected)[ROWS])
    named = resolve(TokenAt([3, 3, 3], "b", TOKENIZER), logits, context("none"))
    close(named.score(logits, EVERY), slow(logits, [2, 2, 2], ["b"] * 3))
    assert named.labels[0] == "log-probability of token 'b' at 3"


def test_an_encoder_decoder_is_read_at_the_decoder() -> None:
    logits = draw(3, 2, 9)  # two decoder tokens, four encoder tokens
    seq2seq = context(config=SimpleNamespace(is_encoder_decoder=True))
    assert resolve(4, logits, seq2seq).score(logits, EVERY).tolist() == logits[:, 1, 4].tolist()
    close(resolve(TokenAt(-1, 4), logits, seq2seq).score(logits, EVERY), slow(logits, [0] * 3, ["e"] * 3))
    with pytest.raises(TargetError, match="no input token at the position"):
        resolve(TokenAt(1), logits, seq2seq)
    with pytest.raises(TargetError, match="decoder_input_ids"):
        resolve(LogProb("bad", TOKENIZER), (logits,), seq2seq)


def test_classifiers_take_log_probabilities_and_contrasts_of_labels() -> None:
    logits = draw(3, 3)
    animals = TargetContext(batch=3, config=SimpleNamespace(id2label={0: "cat", 1: "dog", 2: "cow"}))
    difference = resolve(Contrast("Cat", ["dog", "cow", "dog"]), logits, animals)
    close(difference.score(logits, EVERY), logits[:, 0] - logits[EVERY, [1, 2, 1]])
    assert difference.labels[1] == "class 0 (cat) minus class 2 (cow)"
    dog = resolve(LogProb("dog"), logits, animals)
    close(dog.score(logits, EVERY), logits[:, 1] - logits.exp().sum(1).log())


@pytest.mark.parametrize(
    "target",
    [LogProb("bad", TOKENIZER), Contrast("bad", "g", TOKENIZER), Contrast("b", "g", TOKENIZER), TokenAt(1)],
)
def test_the_gradient_is_the_score_s_own(target: Any) -> None:
    several = continuations(target, 3)
    resolved = resolve(
        target, draw(3, 6, 9) if several is None else (draw(3, 6, 9),) * len(several), context("none")
    )
    point = draw(3, 6, 9, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: resolved.score(z if several is None else (z, z * z)[: len(several)], EVERY), (point,)
    )


def test_half_precision_strings_are_summed_in_float32() -> None:
    logits = torch.zeros(3, 6, 9, dtype=torch.bfloat16)
    value = resolve(LogProb("bad", TOKENIZER), (logits,), context()).score((logits,), EVERY)
    assert value.dtype == torch.float32
    # log 9 rounded to bfloat16 would be 2.203125: an error of 0.018 over three tokens
    assert value.tolist() == pytest.approx([-3 * 2.1972246] * 3, abs=1e-5)


LOGITS = draw(3, 4, 9)


@pytest.mark.parametrize(
    ("target", "output", "text"),
    [
        (LogProb("bad"), LOGITS, r'LogProb\("bad", tokenizer=tokenizer\)'),
        (LogProb("", TOKENIZER), LOGITS, "the text '' has no tokens"),
        (LogProb(["a", "b"], TOKENIZER), LOGITS, "2 texts for a batch of 3"),
        (LogProb("bad", TOKENIZER, position=1), (LOGITS,), "several tokens, which continue the prompt"),
        (LogProb("bad", TOKENIZER), LOGITS, r"explained from 1 output\(s\).*got Tensor"),
        (LogProb("bad", TOKENIZER), (LOGITS,), "the output's 4 columns are too few"),
        (
            LogProb("b?", TOKENIZER),
            (draw(3, 5, 5),),
            "token 8 is outside the model's 5 tokens.*this model's tokenizer",
        ),
        (LogProb("bad", TOKENIZER), (draw(3, 9),), r"needs \(B, T, V\) logits"),
        (
            LogProb(9),
            LOGITS,
            r"target 9 is outside the model's 9 classes \(0..8\); output shape is \(3, 4, 9\)\.",
        ),
        (LogProb(0), draw(3, 1), "always 0"),
        (Contrast("a", "a", TOKENIZER), LOGITS, "both sides of example 0 are token 'a'"),
        (Contrast(1, None), LOGITS, "Contrast needs both sides"),
        (TokenAt(0), LOGITS, "use a position from 1 on"),
        (TokenAt(1, "bad", TOKENIZER), LOGITS, "is several tokens"),
        (1, torch.full((3, 4, 9), float("inf")), "clean score of example 0 is inf"),
    ],
)
def test_errors_say_what_was_given_and_what_to_type(target: Any, output: Any, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        resolve(target, output, context("right"))


def test_an_example_without_real_tokens_is_named_and_reprs_leave_the_tokenizer_out() -> None:
    with pytest.raises(TargetError, match="example 1 has no real token"):
        _ = TargetContext(batch=2, attention_mask=torch.tensor([[1], [0]])).last
    assert repr(Contrast(" a", "b", tokenizer=TOKENIZER)) == "Contrast(preferred=' a', dispreferred='b')"
