"""The shuffle buffer, and batches that can be read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pullback.core.errors import InputError, MethodError
from pullback.steering.sae import ShuffleBuffer
from pullback.steering.sae.token_batches import TokenBatches


class Counting:
    """Produces 0, 1, 2, ... in batches of seven, with gradient -x where asked."""

    def __init__(self) -> None:
        self.next = 0
        self.asked: list[bool] = []

    def __call__(self, gradient: bool) -> tuple[Tensor, Tensor | None]:
        x = torch.arange(self.next, self.next + 7.0).unsqueeze(1)
        self.next += 7
        self.asked.append(gradient)
        return x, -x if gradient else None


def numbers(x: Tensor) -> list[int]:
    return x.flatten().int().tolist()


def test_every_token_is_drawn_once_and_slots_are_reused() -> None:
    source = Counting()
    buffer = ShuffleBuffer(source, 20, 1)
    drawn: list[int] = []
    for _ in range(30):
        before = buffer._x.clone()
        free = set(buffer._order[: buffer._drawn].tolist())
        refilled = buffer._drawn + 4 > 10
        drawn += numbers(buffer.draw(4)[0])
        changed = set((buffer._x != before).nonzero()[:, 0].tolist())
        assert changed <= free  # only what was consumed is overwritten
        assert len(free - changed) <= (1 if refilled else 20)  # all of it (0 in slot of 0 does not show)
    assert len(set(drawn)) == len(drawn) == 120
    assert drawn != sorted(drawn)
    # what was produced is drawn, held or waiting
    rest = numbers(buffer._x[buffer._order[buffer._drawn :]]) + numbers(buffer._waiting[0])
    assert sorted(drawn + rest) == list(range(source.next))
    assert source.asked == [False] * len(source.asked)


def test_gradients_stay_with_their_tokens() -> None:
    buffer = ShuffleBuffer(Counting(), 20, 1)
    for _ in range(3):
        assert buffer.draw(4)[1] is None
    for _ in range(12):  # what had no gradient is given up
        x, g = buffer.draw(4, gradient=True)
        assert g is not None
        assert g.equal(-x)


@pytest.mark.parametrize("gradient", [False, True])
def test_state_goes_on_with_the_same_draws(gradient: bool) -> None:
    sources = Counting(), Counting()
    buffer, other = (ShuffleBuffer(source, 20, 1, seed=3) for source in sources)
    for _ in range(7):
        buffer.draw(4, gradient)
    other.load_state({name: value.clone() for name, value in buffer.state().items()})
    sources[1].next = sources[0].next
    for _ in range(9):
        one, two = buffer.draw(4, True), other.draw(4, True)
        assert one[0].equal(two[0])
        assert one[1] is not None
        assert two[1] is not None
        assert one[1].equal(two[1])
    with pytest.raises(
        InputError, match=r"^the saved buffer is \(20, 1\) torch\.float32; expected \(10, 1\)"
    ):
        ShuffleBuffer(Counting(), 10, 1).load_state(buffer.state())


def test_buffer_errors() -> None:
    with pytest.raises(MethodError, match=r"^6 tokens drawn from 10 slots; expected at most half of them\.$"):
        ShuffleBuffer(Counting(), 10, 1).draw(6)
    with pytest.raises(InputError, match=r"^1000 batches without a token"):
        ShuffleBuffer(lambda gradient: (torch.ones(0, 1), None), 10, 1).draw(2)


# --- batches ---


class Skipping:
    """An iterable that says where reading began."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __iter__(self) -> Any:
        return iter([(self.first, number) for number in range(self.first, 5)])

    def skip(self, count: int) -> Skipping:
        return Skipping(self.first + count)


def test_a_place_can_be_returned_to() -> None:
    for source in (list("abcde"), DataLoader(list("abcde"), batch_size=2, shuffle=True)):
        batches = TokenBatches(source, seed=1)  # type: ignore[arg-type]
        for _ in range(7):
            next(batches)
        place = batches.epoch, batches.number
        following = [next(batches) for _ in range(9)]
        other = TokenBatches(source, seed=1)  # type: ignore[arg-type]
        other.seek(*place)
        assert [next(other) for _ in range(9)] == following
    skipping = TokenBatches(Skipping())
    skipping.seek(0, 3)
    assert [next(skipping) for _ in range(3)] == [(3, 3), (3, 4), (0, 0)]


def test_shuffled_loaders_draw_nothing_from_the_caller() -> None:
    state = torch.get_rng_state()
    loader = DataLoader(torch.arange(8), shuffle=True)
    batches = TokenBatches(loader, seed=5)
    passes = [[int(next(batches)) for _ in range(8)] for _ in range(2)]
    assert torch.get_rng_state().equal(state)
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(8))


def test_processes_share_the_batches() -> None:
    found = []
    for process in range(2):
        batches = TokenBatches(list(range(5)), process=process, processes=2)
        found.append([next(batches) for _ in range(5)])
    assert found == [[0, 2, 4, 0, 2], [1, 3, 1, 3, 1]]
    with pytest.raises(
        InputError, match=r"^token_batches has 1 batches; expected at least one for each of the 2"
    ):
        next(TokenBatches([0], process=1, processes=2))


def test_what_is_read_only_once_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"^token_batches is a generator, which can be read only once; .* Try list"
    ):
        TokenBatches(number for number in range(3))
    with pytest.raises(InputError, match=r"^token_batches has 0 batches"):
        next(TokenBatches([]))
