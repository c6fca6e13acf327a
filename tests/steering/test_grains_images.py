"""Fits of steering vectors to pairs with images: seen once, counted by modality, merged before anything is scored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pullback.steering import Pair
from tests.steering.models import built
from tests.steering.test_grains_fit import Words, apart, fitted


def test_images_are_seen_once_and_count_by_modality() -> None:
    model: Any
    model, inputs = built("llava", double=True)
    pairs = [({name: leaf[row : row + 1] for name, leaf in inputs.items()}, 5, 6) for row in (0, 1)]
    seen: list[int] = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda module, args, output: seen.append(len(output[0]))
    )
    vector = fitted(model, pairs, k={"text": 1, "image": 2})
    handle.remove()
    assert sum(seen) == 2
    assert vector.provenance["vision_once"] is True
    for chosen in vector.provenance["chosen"]:
        for sign in ("positive", "negative"):
            kinds = [kind for _, _, kind in chosen[sign]]
            assert kinds.count("text") <= 1
            assert kinds.count("image") <= 2
            assert all((kind == "image") == (place < 4) for place, _, kind in chosen[sign])
    assert any(kind == "image" for _, _, kind in chosen["positive"] + chosen["negative"])
    # the pixels are in it: others give other scores, and the model itself gives the change of the contrast
    other = [({**prompt, "pixel_values": -prompt["pixel_values"]}, 5, 6) for prompt, _, _ in pairs]
    assert apart(vector, fitted(model, other, k={"text": 1, "image": 2})) > 1e-6
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        table = model.get_input_embeddings().weight
        merged: Tensor = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        start = table.mean(0).expand(2, inputs["input_ids"].shape[1], -1).clone()
        start[:, :4] = torch.stack([features.mean(0) for features in merged])[:, None]
        base = model(inputs_embeds=start).logits[:, -1]
    change = (logits[:, 5] - logits[:, 6]) - (base[:, 5] - base[:, 6])
    found = [chosen["change"] for chosen in vector.provenance["chosen"]]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), change, rtol=1e-6, atol=1e-9)
    assert apart(vector, fitted(model, pairs, k={"text": 1, "image": 2}, batch_size=1)) < 1e-6
    assert apart(vector, fitted(model, pairs, k={"text": 1, "image": 2}, image_baseline="zero")) > 1e-6


def test_a_processor_makes_inputs_and_a_model_that_needs_its_pixels_gets_them() -> None:
    model: Any
    model, inputs = built("llava", double=True)
    one = {name: leaf[:1] for name, leaf in inputs.items()}
    seen: list[Any] = []

    class Processor:
        tokenizer = Words()

        def __call__(self, text: str, images: Any, return_tensors: str) -> dict[str, Tensor]:
            seen.append((text, images, return_tensors))
            return one

    vector = fitted(model, [(one, 5, [6, 7])], baseline=31)
    made = fitted(model, [Pair("look", "w5", "w6 w7", image="a picture")], tokenizer=Processor())
    assert seen == [("look", "a picture", "pt")]
    assert apart(vector, made) == 0.0

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values") is None:
            raise ValueError("no pixels")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    slow = fitted(model, [(one, 5, [6, 7])], baseline=31)
    assert vector.provenance["vision_once"]
    assert not slow.provenance["vision_once"]
    assert apart(vector, slow) < 1e-6
