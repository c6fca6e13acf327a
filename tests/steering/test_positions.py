"""Which tokens are steered: with and without a cache, padded, in beams, in a scope, behind a gate."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from pullback import InputError, MethodError
from pullback.steering import find_blocks
from tests.steering.models import block_outputs, built, generated, logits_of_generation, random_vector

PROMPT = 7


def scopes() -> list[Any]:
    mask = torch.zeros(PROMPT + 6, dtype=torch.bool)
    mask[[0, 1, 4, PROMPT + 1]] = True
    return ["all", "prompt", "generated", mask]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bloom", "mamba", "gemma3", "t5", "bart", "llava", "qwen2_vl"]
)
def test_cached_and_uncached_generation_agree(name: str) -> None:
    model, inputs = built(name)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    plain = logits_of_generation(model, inputs)
    vector = random_vector(model)
    for scope in scopes():
        found = []
        for cache in (True, False):
            with vector.apply(model, 1.5, scope=scope) as steering:
                found.append((logits_of_generation(model, inputs, use_cache=cache), steering.statistics))
        (cached, once), (uncached, again) = found
        torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-5)
        assert torch.equal(cached[0], plain[0]) == (isinstance(scope, str) and scope == "generated")
        assert (cached[-1] - plain[-1]).abs().max() > 1e-4, scope
        assert (
            again.layers[0].tokens >= once.layers[0].tokens
        )  # the uncached run steers a position at every pass
    rows, prompt = inputs["input_ids"].shape if name not in ("t5", "bart") else (2, 1)
    with vector.apply(model, 1.5) as steering:
        generated(model, inputs)
    assert steering.statistics.layers[1].tokens == rows * (prompt + 5)  # the last token is not run


def test_a_second_prompt_in_one_context_is_one_again() -> None:
    model, inputs = built("llama")
    with random_vector(model).apply(model, 1.5, scope="generated"):
        first = generated(model, inputs)
        assert torch.equal(generated(model, inputs), first)
        longer = {"input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, :2]], 1)}
        second = generated(model, longer)
    with random_vector(model).apply(model, 1.5, scope="generated"):
        assert torch.equal(generated(model, longer), second)


def test_scopes_leave_the_other_tokens_bit_for_bit() -> None:
    model, inputs = built("llama")
    ids = inputs["input_ids"]
    vector = random_vector(model, [0])
    with torch.no_grad():
        plain = model(ids, use_cache=True).past_key_values
        with vector.apply(model, 0.8, scope="generated") as steering:
            cache = model(ids, use_cache=True).past_key_values
            assert steering.statistics.layers == {}
            for kept, wanted in zip(cache.layers, plain.layers, strict=True):
                assert torch.equal(kept.keys, wanted.keys)
            model(ids[:, :1], past_key_values=cache)
            assert steering.statistics.layers[0].tokens == 2
        with vector.apply(model, 0.8, scope="prompt") as steering:
            cache = model(ids, use_cache=True).past_key_values
            assert not torch.equal(cache.layers[1].keys, plain.layers[1].keys)
            model(ids[:, :1], past_key_values=cache)
            assert steering.statistics.layers[0].tokens == ids.numel()


def test_masks_name_rows_and_absolute_positions() -> None:
    model, inputs = built("llama")
    mask = torch.zeros(2, PROMPT, dtype=torch.bool)
    mask[0, 2] = mask[1, 5] = True
    plain = block_outputs(model, **inputs)[0]
    vector = random_vector(model, [0])
    with vector.apply(model, 0.8, scope=mask) as steering:
        steered = block_outputs(model, **inputs)[0]
    assert torch.equal((plain != steered).any(-1), mask)
    assert steering.statistics.layers[0].tokens == 2
    with vector.apply(model, 0.8, scope=mask[:, :3]):  # nothing beyond the mask
        steered = block_outputs(model, **inputs)[0]
    assert torch.equal((plain != steered).any(-1), mask & (torch.arange(PROMPT) < 3))
    with (
        vector.apply(model, scope=torch.ones(3, PROMPT, dtype=torch.bool)),
        pytest.raises(InputError, match="the scope is for 3 examples, and the model runs 2"),
    ):
        model(**inputs)


def test_what_is_steered_later_does_not_change_what_came_before() -> None:
    model, inputs = built("llama")
    other = inputs["input_ids"].clone()
    other[:, 4] = (other[:, 4] + 1) % 40
    with torch.no_grad(), random_vector(model).apply(model, 0.9):
        first, second = model(**inputs).logits, model(other).logits
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=1e-6, atol=1e-6)
    assert (first[:, 4:] - second[:, 4:]).abs().max() > 1e-3


def padded(ids: Tensor, by: int) -> dict[str, Tensor]:
    """Rows alone, and the first with padding on its left."""
    mask = torch.ones_like(ids)
    mask[0, :by] = 0
    return {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
def test_left_padded_rows_are_steered_like_single_ones(name: str, scope: Any) -> None:
    model, inputs = built(name)
    ids = inputs["input_ids"]
    vector = random_vector(model)
    batch = padded(ids, 3)
    with vector.apply(model, 1.5, scope=scope) as steering:
        together = generated(model, batch)
    total = {"all": 4 + 7 + 2 * 5, "prompt": 4 + 7, "generated": 2 * 5}[scope]
    assert steering.statistics.layers[0].tokens == total
    for row, start in ((0, 3), (1, 0)):
        with vector.apply(model, 1.5, scope=scope):
            alone = generated(model, {"input_ids": ids[row : row + 1, start:]})
        assert torch.equal(together[row : row + 1], alone)
    with torch.no_grad(), vector.apply(model, 1.5):
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        extra = {} if name == "opt" else {"position_ids": positions}
        left = model(**batch, **extra).logits[0, 3:]
        torch.testing.assert_close(left, model(ids[:1, 3:]).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "temperature": 0.02}],
)
def test_beams_and_sampling_with_rows_of_a_mask_and_a_gate(settings: dict[str, Any]) -> None:
    """A batch of which one row is steered is the steered one and the plain one."""
    model, inputs = built("llama")
    vector = random_vector(model)
    torch.manual_seed(0)
    plain = generated(model, inputs, **settings)
    torch.manual_seed(0)
    with vector.apply(model, 1.5):
        steered = generated(model, inputs, **settings)
    half = len(plain) // 2
    rows = torch.tensor([False, True])
    for chosen in ({"gate": rows}, {"gate": lambda hidden, real: rows.repeat_interleave(len(hidden) // 2)}):
        torch.manual_seed(0)
        with vector.apply(model, 1.5, **chosen):
            found = generated(model, inputs, **settings)
        assert torch.equal(found[:half], plain[:half])
        assert torch.equal(found[half:], steered[half:])
    mask = torch.zeros(2, PROMPT + 6, dtype=torch.bool)
    mask[1] = True
    torch.manual_seed(0)
    with vector.apply(model, 1.5, scope=mask):
        assert torch.equal(generated(model, inputs, **settings), found)
    assert not torch.equal(steered[half:], plain[half:])


def test_the_gate_is_asked_once_per_prompt_about_real_tokens() -> None:
    model, inputs = built("llama")
    batch = padded(inputs["input_ids"], 3)
    asked: list[tuple[Tensor, Tensor]] = []

    def gate(hidden: Tensor, real: Tensor) -> Tensor:
        asked.append((hidden, real))
        return real.all(1)

    plain = block_outputs(model, **batch)[1]
    vector = random_vector(model, [1])
    for cache in (True, False):
        asked.clear()
        with vector.apply(model, 1.5, gate=gate) as steering:
            generated(model, batch, use_cache=cache)
            assert len(asked) == 1
            generated(model, batch, use_cache=cache)
        assert len(asked) == 2
        hidden, real = asked[0]
        assert torch.equal(real, batch["attention_mask"].bool())
        torch.testing.assert_close(hidden[real], plain[real], rtol=1e-4, atol=1e-5)
        answer = steering.statistics.gate
        assert answer is not None
        assert answer.tolist() == [False, True]
    with (
        vector.apply(model, gate=lambda hidden, real: hidden.mean()),
        pytest.raises(InputError, match=r"the gate gave torch.float32 \(\); expected a bool tensor \(2,\)"),
    ):
        model(**inputs)


def test_several_tokens_after_a_cached_prompt_are_no_prompt_and_not_generated() -> None:
    model, inputs = built("llama")
    ids = inputs["input_ids"]
    with torch.no_grad(), random_vector(model, [0]).apply(model, 0.8, scope="prompt") as steering:
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(MethodError, match=r"3 tokens come after 7 cached ones.*steering\.reset\(\)"):
            model(ids[:, :3], past_key_values=cache)
        cache = model(ids, use_cache=True).past_key_values
        steering.reset()
        before = steering.statistics.layers[0].tokens
        model(ids[:, :3], past_key_values=cache)
        assert steering.statistics.layers[0].tokens == before + 6


def test_the_static_cache_counts_positions_too() -> None:
    model, inputs = built("llama")
    for scope in scopes():
        found = []
        for cache in ("dynamic", "static"):
            with random_vector(model).apply(model, 1.5, scope=scope):
                found.append(generated(model, inputs, cache_implementation=cache, disable_compile=True))
        assert torch.equal(found[0], found[1])


def test_adapters_are_steered_through_their_wrapper() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = built("llama")
    vector = random_vector(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    ).eval()
    assert find_blocks(adapted).path == "model.layers"
    batch = padded(inputs["input_ids"], 2)
    with vector.apply(adapted, 1.5, scope="generated") as steering:
        generated(adapted, batch)
    assert steering.statistics.layers[0].tokens == 2 * 5


def test_padding_is_read_at_the_chunks_own_positions() -> None:
    model, inputs = built("llama")
    ids, batch = inputs["input_ids"], padded(inputs["input_ids"], 3)
    whole = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, :3])], 1)
    with torch.no_grad(), random_vector(model, [0]).apply(model, 0.8) as steering:
        cache = model(**batch, use_cache=True).past_key_values
        assert steering.statistics.layers[0].tokens == 4 + 7
        model(ids[:, :3], attention_mask=whole, past_key_values=cache)
        assert steering.statistics.layers[0].tokens == 4 + 7 + 2 * 3


def test_the_encoders_padding_is_not_the_decoders() -> None:
    model, inputs = built("t5")
    ids = inputs["decoder_input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad(), random_vector(model, [0]).apply(model, 0.8) as steering:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    assert steering.statistics.layers[0].tokens == ids.numel()


def test_another_threads_prompt_does_not_move_ours() -> None:
    model, inputs = built("llama")
    ids = inputs["input_ids"]
    with torch.no_grad(), random_vector(model, [0]).apply(model, 0.8, scope="generated") as steering:
        cache = model(ids, use_cache=True).past_key_values
        thread = threading.Thread(target=lambda: model(torch.cat([ids.flip(1), ids], 1)))
        thread.start()
        thread.join()
        model(ids[:, :1], past_key_values=cache)
    assert steering.statistics.layers[0].tokens == 2
