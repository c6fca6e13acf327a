"""What fits of steering vectors keep to: batches, signs, seeds, protected tokens, files, and errors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pullback.core.errors import InputError, MethodError, SiteError
from pullback.steering import Pair, SteeringVector, fit, load
from tests.steering.models import built, hooks

METHODS = ("grains", "mean_grad", "mean_diff", "random_tokens", "random")
PAIRS = [
    ([5, 6, 7, 8], 9, 10),
    ([1, 6, 9, 11, 12, 3], [9, 4], [10]),
    ([5, 6, 2, 8, 13], [3], [10, 11, 4]),
    ([7, 14, 5, 9, 4, 4, 6], 9, 10),
]


class Words:
    """A tokenizer of words w4, w5, ... with a beginning of text and a mask."""

    bos_token_id, eos_token_id, pad_token_id, mask_token_id = 1, 2, 0, 31
    all_special_ids = (0, 1, 2, 31)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [int(word[1:]) for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages: Any, **settings: Any) -> dict[str, list[int]]:
        assert settings["add_generation_prompt"]
        return {
            "input_ids": [1, *(int(word[1:]) for each in messages for word in each["content"].split()), 2]
        }


def fitted(
    model: Any, pairs: Any, method: Any = "grains", tokenizer: Any = None, **settings: Any
) -> SteeringVector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pairs of a random model hardly agree
        return fit(model, tokenizer, pairs, method, **{"k": 2, "steps": 4, **settings})


def apart(first: SteeringVector, second: SteeringVector) -> float:
    assert first.layers == second.layers
    return max(
        float((first.scales[layer] * one - second.scales[layer] * second.directions[layer]).abs().max())
        for layer, one in first.directions.items()
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batches_give_what_single_pairs_give_and_leave_the_model_alone(name: str, method: Any) -> None:
    model, _ = built(name, double=True)
    before, count = {key: value.clone() for key, value in model.state_dict().items()}, hooks(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    together = fitted(model, PAIRS, method, batch_size=4)
    # one to three pairs share a forward, with other padding; answers are shorter and longer than their mates'
    for size in (1, 3):
        assert apart(together, fitted(model, PAIRS, method, batch_size=size)) < 1e-6
    assert torch.equal(
        together.directions[1], fitted(model, PAIRS, method, batch_size=4).directions[1]
    )  # deterministic
    assert together.layers == (0, 1)
    assert all(abs(float(one.norm()) - 1.0) < 1e-6 for one in together.directions.values())
    assert hooks(model) == count
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["grains", "mean_grad", "mean_diff"])
@pytest.mark.parametrize("attribution", ["ig", "relp"])
def test_swapping_the_answers_turns_the_vector_round(method: Any, attribution: Any) -> None:
    model, _ = built("llama", double=True)
    vector = fitted(model, PAIRS, method, attribution=attribution)
    swapped = [(prompt, no, yes) for prompt, yes, no in PAIRS]
    assert apart(-vector, fitted(model, swapped, method, attribution=attribution)) < 1e-6
    assert apart(vector, fitted(model, swapped, method, attribution=attribution)) > 1e-3


def test_steering_by_the_mean_gradient_raises_the_contrast_and_the_other_way_lowers_it() -> None:
    model: Any = built("llama", double=True)[0]
    ids = torch.tensor([PAIRS[0][0]])

    def contrast(strength: float, vector: SteeringVector) -> float:
        with torch.no_grad(), vector.apply(model, strength):
            logits = model(ids).logits[0, -1]
        return float(logits[9] - logits[10])

    for method in ("grains", "mean_grad"):
        vector = fitted(model, PAIRS[:1], method)
        assert contrast(0.05, vector) > contrast(0.0, vector) > contrast(-0.05, vector)


def test_random_controls_depend_on_their_seed_only() -> None:
    model, _ = built("llama", double=True)
    for method in ("random", "random_tokens"):
        first = fitted(model, PAIRS, method, seed=1)
        assert apart(first, fitted(model, PAIRS, method, seed=1)) == 0.0
        assert apart(first, fitted(model, PAIRS, method, seed=2)) > 1e-3
    swapped = [(prompt, no, yes) for prompt, yes, no in PAIRS]
    assert (
        apart(fitted(model, PAIRS, "random_tokens"), fitted(model, swapped, "random_tokens")) == 0.0
    )  # answers do not count
    several = [fitted(model, PAIRS, "random", seed=seed).directions[0] for seed in range(8)]
    assert float((torch.stack(several) @ torch.stack(several).T - torch.eye(8)).abs().max()) < 0.75


def places(vector: SteeringVector, pair: int) -> set[int]:
    chosen = vector.provenance["chosen"][pair]
    return {place for sign in ("positive", "negative") for place, _, _ in chosen[sign]}


@pytest.mark.parametrize("method", ["grains", "random_tokens"])
def test_special_protected_and_last_tokens_are_never_chosen(method: Any) -> None:
    model, _ = built("llama", double=True)
    vector = fitted(model, PAIRS, method, k=99)
    assert places(vector, 0) <= {0, 1, 2}
    assert places(vector, 1) <= {1, 2, 3, 4}  # 1 begins a text
    assert places(vector, 2) <= {0, 1, 3}  # 2 ends one
    assert len(places(vector, 1)) >= 3
    assert not places(fitted(model, PAIRS, method, k=99, protect=[6, 9]), 1) & {1, 2}
    counted = fitted(model, PAIRS, method, k=0.4).provenance["chosen"][3]
    assert all(len(counted[sign]) <= 3 for sign in ("positive", "negative"))  # 0.4 of 6
    for chosen in fitted(model, PAIRS, k=99).provenance["chosen"]:
        assert all(score > 0 for _, score, _ in chosen["positive"])
        assert all(score < 0 for _, score, _ in chosen["negative"])


def test_text_chats_tokens_and_prepared_inputs_are_one() -> None:
    model, _ = built("llama", double=True)
    words = Words()
    as_text = fitted(model, [Pair("w5 w6 w7 w2", "w9 w4", "w10")], tokenizer=words)
    prepared = {
        "input_ids": torch.tensor([[0, 1, 5, 6, 7, 2]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]),
    }
    chat = [{"role": "user", "content": "w5 w6"}, {"role": "user", "content": "w7"}]
    for prompt in (torch.tensor([1, 5, 6, 7, 2]), prepared, chat):
        assert apart(as_text, fitted(model, [(prompt, [9, 4], torch.tensor([10]))], tokenizer=words)) == 0.0
    # the tokenizer's mask is the baseline, also by its id and by its embedding
    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    for baseline in ("mask", 31, table[31]):
        assert (
            apart(as_text, fitted(model, [([1, 5, 6, 7, 2], [9, 4], 10)], tokenizer=words, baseline=baseline))
            == 0.0
        )
    assert (
        apart(as_text, fitted(model, [([1, 5, 6, 7, 2], [9, 4], 10)], tokenizer=words, baseline="mean"))
        > 1e-4
    )


def test_an_encoder_decoder_is_read_in_its_decoder() -> None:
    model, _ = built("t5", double=True)
    vector = fitted(model, [([5, 6, 7, 8], 9, 10), ([4, 6, 9], 9, 10)])
    assert vector.layers == (0, 1)
    assert apart(vector, fitted(model, [([5, 6, 7, 8], 9, 10), ([4, 6, 9], 9, 10)], batch_size=1)) < 1e-6
    # a start of the decoder as long as the prompt is not the prompt
    begun = [({"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[0, 7, 5]])}, 9, 10) for ids in
             ([5, 6, 7, 8], [4, 6, 9])]  # fmt: skip
    assert apart(fitted(model, begun), fitted(model, begun, batch_size=1)) < 1e-6
    assert apart(fitted(model, begun), vector) > 1e-6
    with pytest.raises(MethodError, match='Use method="mean_grad" or "grains"'):
        fit(model, None, PAIRS, "mean_diff")


def test_provenance_is_kept_in_files(tmp_path: Path) -> None:
    model, _ = built("llama", double=True)
    vector = fitted(model, PAIRS, layers=[-1], baseline=torch.zeros(32))
    assert vector.layers == (1,)
    vector.save(tmp_path / "grains.safetensors")
    read = load(tmp_path / "grains.safetensors", model=model)
    assert dict(read.provenance) == dict(vector.provenance)
    assert torch.equal(read.directions[1], vector.directions[1])
    known = read.provenance
    assert known["method"] == "grains"
    assert known["settings"]["baseline"].startswith("Given(")
    assert known["pairs"] == 4
    gaps = [(abs(each["gap"]), abs(each["change"])) for each in known["chosen"]]
    assert known["completeness"]["relative_gap"] == pytest.approx(
        sum(a for a, _ in gaps) / sum(b for _, b in gaps)
    )
    (agreement,) = known["agreement"]
    assert agreement["block"] == 1
    assert agreement["length"] == pytest.approx(vector.scales[1])


def test_warnings_of_incompleteness_and_of_disagreement() -> None:
    model, _ = built("llama", double=True)
    with pytest.warns(UserWarning, match="completeness gap"):
        fit(model, None, PAIRS, baseline="zero", steps=4)
    with pytest.warns(UserWarning, match="hardly agree") as caught:
        fit(
            model,
            None,
            [(prompt, *answers) for prompt, *both in PAIRS for answers in (both, both[::-1])],
            "mean_grad",
        )
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, None, PAIRS[:1])


@pytest.mark.parametrize(
    ("pairs", "settings", "error", "text"),
    [
        ([], {}, InputError, "pairs is empty"),
        (PAIRS[0][0], {}, InputError, "pair 0 is a int; expected Pair"),
        ([([5, 6], 9)], {}, InputError, "pair 0 is a tuple of 2"),
        ([([5, 6], 9, [9])], {}, InputError, r"same tokens \[9\].*Leave the pair out"),
        ([([5, 6], 9, [])], {}, InputError, "dispreferred answer of pair 0 has no tokens"),
        ([([], 9, 8)], {}, InputError, "prompt of pair 0 has no tokens"),
        ([([5, 6.5], 9, 8)], {}, InputError, "holds no list of token ids"),
        ([("five six", 9, 8)], {}, InputError, "give the model's tokenizer"),
        ([([5, 6, 999], 9, 8)], {}, InputError, r"token 999.*Is it this model's tokenizer"),
        ([([5] * 5000, 9, 8)], {}, InputError, "5001 tokens with its longer answer, and the model takes"),
        ([({"input_ids": [5]}, 9, 8)], {}, InputError, r'"input_ids" list; expected a \(1, length\)'),
        ([Pair([5, 6], 9, 8, image=object())], {}, InputError, "expected text and the model's processor"),
        ([([5], 9, 8)], {}, MethodError, "no token was chosen"),
        (PAIRS, {"method": "gradient"}, MethodError, "method='gradient'; expected one of 'grains'"),
        (PAIRS, {"attribution": "lime"}, MethodError, "attribution='lime'; expected one of 'ig'"),
        (PAIRS, {"aggregate": "median"}, MethodError, "expected one of 'pca', 'mean'"),
        (PAIRS, {"combine": "pos"}, MethodError, "expected one of 'both', 'positive'"),
        (PAIRS, {"baseline": "eos"}, MethodError, "baseline='eos'; expected None, one of"),
        (PAIRS, {"baseline": torch.zeros(3)}, MethodError, r"shape \(3,\); expected one embedding, \(32,\)"),
        (PAIRS, {"image_baseline": "blur"}, MethodError, "expected \"mean\" or \"zero\""),
        (PAIRS, {"quadrature": "simpson"}, MethodError, "quadrature='simpson'"),
        (PAIRS, {"k": 0}, MethodError, "k=0; expected a number of tokens from 1"),
        (PAIRS, {"k": {"audio": 3}}, MethodError, "expected the modalities"),
        (PAIRS, {"batch_size": 0}, MethodError, "batch_size is a whole number"),
        (PAIRS, {"layers": 7}, SiteError, "there is no block 7"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(pairs: Any, settings: Any, error: type[Exception], text: str) -> None:
    model, _ = built("llama")
    with pytest.raises(error, match=text):
        fit(model, None, pairs, **{"steps": 2, **settings})
