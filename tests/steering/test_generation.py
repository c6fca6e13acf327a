"""Generation by every architecture, greedy, sampled and in beams: against a model whose block itself moves."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.steering import SteeringVector, find_blocks
from tests.steering.models import (
    DECODERS,
    OTHERS,
    built,
    generated,
    hooks,
    logits_of_generation,
    random_vector,
)

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "beams": {"num_beams": 3},
}
STRENGTH = 1.5
# the states of the others run through padding, steered or not
PADDED = ("llama", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "gemma3", "qwen3", "mixtral")


def prompts(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in inputs.items() if not name.startswith("decoder")}


def drawn(model: nn.Module, inputs: dict[str, Any], **settings: Any) -> Tensor:
    """The new tokens from a fixed seed of the global generator, which is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return generated(model, inputs, **settings)


def moved_by_hand(model: nn.Module, vector: SteeringVector) -> list[Any]:
    """Block 1 moves every token by itself, whatever the cache holds: h + s ||h|| v, back to the length of h."""

    def move(module: nn.Module, args: Any, output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        norm = h.norm(dim=-1, keepdim=True)
        moved = torch.nn.functional.normalize(h + STRENGTH * norm * vector.directions[1].to(h), dim=-1) * norm
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    return [find_blocks(model).modules[1].register_forward_hook(move)]


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_generation_is_that_of_a_model_whose_block_moves(name: str) -> None:
    """In float64, where a draw or a beam is not decided by rounding; afterwards the model gives the same bits."""
    model, inputs = built(name, double=True)
    inputs = prompts(inputs)
    vector = random_vector(model, [1])
    plain_logits = logits_of_generation(model, inputs)
    before = hooks(model)  # transformers keeps hooks of its own in vision towers that have run
    state = {key: leaf.clone() for key, leaf in model.state_dict().items()}
    turned = False
    for settings in WAYS.values():
        plain = drawn(model, inputs, **settings)
        handles = moved_by_hand(model, vector)
        expected = drawn(model, inputs, **settings)
        for handle in handles:
            handle.remove()
        with vector.apply(model, STRENGTH) as steering:
            found = drawn(model, inputs, **settings)
        assert torch.equal(found, expected)
        assert steering.statistics.layers[1].mean_angle > 20
        assert torch.equal(drawn(model, inputs, **settings), plain)
        turned |= not torch.equal(found, plain)
    assert turned
    assert hooks(model) == before
    assert torch.equal(logits_of_generation(model, inputs), plain_logits)
    for key, leaf in model.state_dict().items():
        assert torch.equal(leaf, state[key]), key


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_without_a_cache_the_same_tokens_are_generated(name: str) -> None:
    model, inputs = built(name, double=True)
    inputs = prompts(inputs)
    vector = random_vector(model)
    for scope in ("all", "prompt", "generated"):
        for settings in (WAYS["greedy"], WAYS["beams"]):
            with vector.apply(model, STRENGTH, scope=scope):
                cached = drawn(model, inputs, **settings)
            with vector.apply(model, STRENGTH, scope=scope):
                assert torch.equal(drawn(model, inputs, use_cache=False, **settings), cached)


@pytest.mark.parametrize("name", PADDED)
def test_rows_padded_on_the_left_generate_what_they_generate_alone(name: str) -> None:
    model, inputs = built(name, double=name != "bloom")  # whose mask overflows in float64
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    vector = random_vector(model)
    for settings in (WAYS["greedy"], WAYS["beams"]):
        with vector.apply(model, STRENGTH):
            together = drawn(
                model, {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, **settings
            )
        for row, start in ((0, 3), (1, 0)):
            with vector.apply(model, STRENGTH):
                alone = drawn(model, {"input_ids": ids[row : row + 1, start:]}, **settings)
            assert torch.equal(together[row : row + 1], alone), (settings, row)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "t5", "llava", "qwen2_5_vl"])
def test_an_exception_while_generating_leaves_nothing_behind(name: str) -> None:
    model, inputs = built(name)
    inputs = prompts(inputs)
    plain = logits_of_generation(model, inputs)
    before = hooks(model)

    def stop(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if ids.shape[1] >= 3:
            raise RuntimeError("enough")
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(RuntimeError, match="enough"), random_vector(model).apply(model, STRENGTH):
        generated(model, inputs, stopping_criteria=[stop])
    assert hooks(model) == before
    assert torch.equal(logits_of_generation(model, inputs), plain)


def test_threads_generate_in_their_own_ways() -> None:
    """Two vectors and none on one model at once, prompt and cache of each its own."""
    model, inputs = built("llama")
    vectors = [random_vector(model, seed=seed) for seed in range(2)]
    alone: list[Tensor] = []
    for vector in vectors:
        with vector.apply(model, STRENGTH, scope="generated"):
            alone.append(logits_of_generation(model, inputs))
    alone.append(logits_of_generation(model, inputs))
    found: list[list[Tensor]] = [[], [], []]
    barrier = threading.Barrier(3)

    def work(number: int) -> None:
        barrier.wait()
        for _ in range(4):
            if number == 2:
                found[2].append(logits_of_generation(model, inputs))
                continue
            with vectors[number].apply(model, STRENGTH, scope="generated"):
                found[number].append(logits_of_generation(model, inputs))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        assert len(found[number]) == 4
        assert all(torch.equal(each, alone[number]) for each in found[number]), number
    assert not torch.equal(alone[0], alone[1])
    assert hooks(model) == 0
