"""Log-probabilities of answers: against a loop of one forward a token, however they are batched, cached and steered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback import InputError, MethodError, ModelError
from pullback.steering import Pair, Question, Setting
from pullback.steering.measures import answer_measures
from pullback.steering.questions import encode_questions
from pullback.steering.scoring import answer_log_probs
from tests.steering.models import built, random_vector
from tests.steering.tiny import llama, questions

# sums of a few log-probabilities in float64, by kernels that add in other orders
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def slowly(
    model: nn.Module, asked: Sequence[Question], vector: Any = None, setting: Setting | None = None
) -> Tensor:
    """The prompt, then one token at a time on the cache, as ``generate`` does it."""
    found = []
    for question in asked:
        for answer in [*question.true, *question.false]:
            tokens = [answer] if isinstance(answer, int) else list(answer)
            found.append(_one(model, list(question.prompt), tokens, vector, setting))
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def _one(
    model: nn.Module, prompt: list[int], answer: list[int], vector: Any, setting: Setting | None
) -> float:
    def run() -> float:
        total, ids, cache = 0.0, prompt, None
        for token in answer:
            out = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            total += float(out.logits[0, -1].double().log_softmax(-1)[token])
            ids, cache = [token], out.past_key_values
        return total

    if vector is None or setting is None:
        return run()
    settings = dataclasses.asdict(setting)
    settings["layers"] = None if settings["layers"] is None else list(settings["layers"])
    with vector.apply(model, **settings):
        return run()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("reuse", [False, True])
def test_equals_one_token_at_a_time(batch_size: int, reuse: bool) -> None:
    model, asked = llama(), questions()
    encoded = encode_questions(model, None, asked)
    found = answer_log_probs(model, None, encoded, batch_size=batch_size, reuse_prompt=reuse)
    torch.testing.assert_close(found, slowly(model, asked), **CLOSE)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("scale", ["relative", "absolute"])
def test_steers_the_tokens_that_generate_would(scope: Any, reuse: bool, scale: Any) -> None:
    model, asked = llama(), questions()
    vector = random_vector(model, [0, 2], width=16)
    setting = Setting(0.7, (0, 2), scale, scope, preserve_norm=scale == "relative")
    encoded = encode_questions(model, None, asked)
    found = answer_log_probs(model, None, encoded, vector, setting, reuse_prompt=reuse)
    torch.testing.assert_close(found, slowly(model, asked, vector, setting), **CLOSE)
    plain = answer_log_probs(model, None, encoded)
    moved = (found - plain).abs() > 1e-4
    lengths = torch.tensor([len(answer) for question in encoded for answer in question.answers])
    # the first token of an answer is predicted from the prompt
    assert torch.equal(moved, lengths > 1) if scope == "generated" else bool(moved.all())


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gemma3", "mamba"])
def test_batches_equal_single_forwards_in_other_architectures(name: str) -> None:
    """Learned positions, alibi, windows, states."""
    model, _ = built(name, double=True)
    asked = questions()
    vector = random_vector(model, [1])
    encoded = encode_questions(model, None, asked)
    for steering in (None, vector):
        found = answer_log_probs(model, None, encoded, steering, Setting(0.5))
        with torch.no_grad():
            singly = []
            for question in encoded:
                for answer in question.answers:
                    ids = torch.tensor([[*question.prompt.ids.tolist(), *answer]])
                    first = len(question.prompt.ids) - 1
                    if steering is None:
                        logits = model(input_ids=ids).logits
                    else:
                        with steering.apply(model, 0.5):
                            logits = model(input_ids=ids).logits
                    log_probs = logits[0, first:-1].double().log_softmax(-1)
                    singly.append(sum(float(log_probs[at, token]) for at, token in enumerate(answer)))
        torch.testing.assert_close(found, torch.tensor(singly, dtype=torch.float64), rtol=0.0, atol=1e-8)


def test_an_encoder_decoder_answers_in_its_decoder() -> None:
    model, _ = built("t5", double=True)
    encoded = encode_questions(model, None, questions())
    found = answer_log_probs(model, None, encoded)
    start = model.config.decoder_start_token_id
    singly = []
    with torch.no_grad():
        for question in encoded:
            for answer in question.answers:
                logits = model(
                    input_ids=question.prompt.ids[None],
                    decoder_input_ids=torch.tensor([[start, *answer[:-1]]]),
                ).logits
                log_probs = logits[0].double().log_softmax(-1)
                singly.append(sum(float(log_probs[at, token]) for at, token in enumerate(answer)))
    torch.testing.assert_close(found, torch.tensor(singly, dtype=torch.float64), rtol=0.0, atol=1e-8)


class Bigrams(nn.Module):
    """p(next | token) from a table, whatever came before: log-probabilities are sums of its entries."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


def test_a_model_of_bigrams_in_closed_form() -> None:
    model = Bigrams().eval()
    asked = [Question([1, 2], [[3, 4], 5], [[6, 7, 8]]), Question([9], [10], [[3, 4, 5, 6], 7])]
    p = model.table.detach().softmax(-1)
    wanted = [
        p[2, 3] * p[3, 4], p[2, 5], p[2, 6] * p[6, 7] * p[7, 8],
        p[9, 10], p[9, 3] * p[3, 4] * p[4, 5] * p[5, 6], p[9, 7],
    ]  # fmt: skip
    encoded = encode_questions(model, None, asked)
    found = answer_log_probs(model, None, encoded)
    torch.testing.assert_close(found, torch.stack(wanted).log(), **CLOSE)
    measures = answer_measures(encoded, found)
    mass = [float(sum(wanted[:2]) / sum(wanted[:3])), float(wanted[3] / sum(wanted[3:]))]
    assert measures.mc2.tolist() == pytest.approx(mass, rel=1e-12)
    assert measures.mc1.tolist() == [float(max(wanted[:2]) > wanted[2]), float(wanted[3] > max(wanted[4:]))]


def test_images_go_along_with_their_question() -> None:
    model, inputs = built("llava", double=True)
    prompt = {name: leaf[:1] for name, leaf in inputs.items()}
    other = {**prompt, "pixel_values": prompt["pixel_values"].flip(-1) + 0.5}
    asked = [Question(each, [[5, 6], 7], [[8]]) for each in (prompt, other)]
    encoded = encode_questions(model, None, asked)
    found = answer_log_probs(model, None, encoded)
    singly = []
    with torch.no_grad():
        for each in (prompt, other):
            for answer in ([5, 6], [7], [8]):
                ids = torch.cat([each["input_ids"], torch.tensor([answer])], 1)
                logits = model(input_ids=ids, pixel_values=each["pixel_values"]).logits
                log_probs = logits[0, -len(answer) - 1 : -1].double().log_softmax(-1)
                singly.append(sum(float(log_probs[at, token]) for at, token in enumerate(answer)))
    torch.testing.assert_close(found, torch.tensor(singly, dtype=torch.float64), rtol=0.0, atol=1e-8)
    assert (found[:3] - found[3:]).abs().min() > 1e-6


def test_answers_that_differ_in_their_last_token_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    rows = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", counted)
    encoded = encode_questions(model, None, [Question([5, 6], [7, [3, 4], [3, 5]], [8, [3, 6]])])
    answer_log_probs(model, None, encoded)
    assert rows == [2]
    rows.clear()
    answer_log_probs(model, None, encoded, reuse_prompt=True)
    assert rows == [1, 1]  # the prompt once, and what follows it
    rows.clear()
    answers = [[token, 3] for token in range(5, 17)]
    long = encode_questions(model, None, [Question([5] * 50, answers[:6], answers[6:])])
    found = answer_log_probs(model, None, long)
    assert rows == [1, 12]  # 550 tokens are saved
    torch.testing.assert_close(found, answer_log_probs(model, None, long, reuse_prompt=False), **CLOSE)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "questions is empty"),
        ("text", "questions is str"),
        ([5], "question 0 is a int; expected Question"),
        ([Question([5], [], [6])], "true answers of question 0 are []"),
        ([Question([5], [7], "no")], "false answers of question 0 are 'no'"),
        ([Question([5], [7], [6, 7])], "both true and false, tokens [7]"),
        ([Question([5], [7], [6], best=1)], "best=1 of question 0 is none of its 1 true answers"),
        ([Question([], [7], [6])], "the prompt of question 0 has no tokens"),
        ([Question([5], [70], [6])], "question 0 has the token 70, which is outside the model's 30 tokens"),
        (
            [Question([5] * 64, [7], [6])],
            "question 0 has 65 tokens with its longer answer, and the model takes 64",
        ),
        ([Question("five", [7], [6])], "question 0 is text; give the model's tokenizer"),
        ([Pair([5], 7, 8), Pair([5], 7, 7)], "question 1 has an answer that is both true and false"),
    ],
)
def test_what_is_no_question(asked: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        encode_questions(llama(), None, asked)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"strength": float("nan")}, {"strength": "a"}, {"scale": "x"}, {"scope": "answer"}]
)
def test_what_is_no_setting(settings: Any) -> None:
    with pytest.raises(MethodError, match=f"{next(iter(settings))}=.*; expected"):
        Setting(**settings)


def test_a_model_without_logits_is_refused() -> None:
    model = llama()
    encoded = encode_questions(model, None, questions())
    with pytest.raises(ModelError, match="without logits"):
        answer_log_probs(model.model, None, encoded)
