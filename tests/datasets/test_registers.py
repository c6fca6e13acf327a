"""Documents in registers: what the answers are, which tokens are cues, and how often they agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pullback import InputError
from pullback.datasets import coloured_patches, register_documents
from pullback.datasets.coloured_patches import COLOURS
from pullback.datasets.registers import FIRST_ANSWER, FIRST_KEY, vocabulary_size


@pytest.mark.parametrize("shared", [False, True])
def test_answers_follow_from_key_and_register(shared: bool) -> None:
    data = register_documents(400, shared_answers=shared, seed=1)
    keys, given = data.x[:, 9::2] - FIRST_KEY, data.x[:, 10::2] - FIRST_ANSWER
    second = (keys + 5) % 24 if shared else keys + 24
    assert torch.equal(given, torch.where(data.y[:, None] == 0, keys, second))
    assert torch.equal(data.answers - FIRST_ANSWER, torch.stack([keys, second], -1))
    assert int(data.x.max()) < vocabulary_size(shared)
    assert torch.equal(data.prompts, data.x[:, :10])


def test_cues_are_the_tokens_of_a_register_and_agree_as_often_as_asked() -> None:
    data = register_documents(2000, agreement=0.7, seed=2)
    header, cues = data.x[:, 1:9], data.cues[:, 1:9]
    assert torch.equal(cues == 1, (header >= 12) & (header < 16))
    assert torch.equal(cues == -1, (header >= 16) & (header < 20))
    assert not bool(data.cues[:, [0, *range(9, 17)]].any())
    agree = (cues * (1 - 2 * data.y[:, None]))[cues != 0]
    # 8000 draws of a coin: four standard errors
    assert float((agree > 0).double().mean()) == pytest.approx(0.7, abs=4 * (0.21 / 8000) ** 0.5)
    assert float((cues != 0).double().mean()) == pytest.approx(0.5, abs=4 * (0.25 / 16000) ** 0.5)
    assert torch.equal(
        register_documents(5, register=1, keys=[3], seed=0).x[:, 9::2] - FIRST_KEY, torch.full((5, 4), 3)
    )
    assert torch.equal(data.x, register_documents(2000, agreement=0.7, seed=2).x)
    assert torch.equal(data[:7].answers, data.answers[:7])


def test_questions_about_images_and_words_are_answered_from_them() -> None:
    data = coloured_patches(500, agreement=1.0, seed=3)
    sources, keys, given = (
        data.x[:, 23::3] - 92 - 1,
        data.x[:, 24::3] - FIRST_KEY,
        data.x[:, 25::3] - FIRST_ANSWER,
    )
    assert torch.equal(sources, data.sources)
    asked = data.registers.gather(1, sources)
    assert torch.equal(given, keys + 24 * asked)
    assert torch.equal(data.y, asked[:, 0])
    # the middle of each patch tells its colour
    middle = data.pixels[:, :, 3::6, 3::6].flatten(2).transpose(1, 2)
    colour = torch.cdist(middle, COLOURS.expand(500, 8, 3)).argmin(-1)
    sign = torch.where(colour < 2, 1, torch.where(colour < 4, -1, 0))
    assert float((sign == data.cues[:, 1:17]).double().mean()) > 0.99
    for side, cues in ((0, data.cues[:, 1:17]), (1, data.cues[:, 17:23])):
        assert bool(((cues == 0) | (cues == 1 - 2 * data.registers[:, side : side + 1])).all())
    fixed = coloured_patches(50, register=1, source=0, seed=4)
    assert bool((fixed.registers[:, 0] == 1).all())
    assert 0 < int(fixed.registers[:, 1].sum()) < 50


@pytest.mark.parametrize(
    "settings", [{"n": 0}, {"agreement": 1.5}, {"register": 2}, {"keys": [24]}, {"keys": []}]
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    for make in (register_documents, coloured_patches):
        with pytest.raises(InputError, match=r"was given\. Expected"):
            make(**{"n": 3, **settings})
