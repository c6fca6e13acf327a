"""Steering vectors: their algebra, their file, the model they are for, and how blocks are found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pullback as pb
from pullback import FormatError, InputError, MethodError, ModelError, SiteError
from pullback.steering import SteeringVector, find_blocks, fingerprint, load
from tests.steering.models import built, random_vector
from tests.zoo.architectures import ARCHITECTURES


def vectors() -> tuple[SteeringVector, SteeringVector]:
    return random_vector(None, [0, 1], 1), random_vector(None, [1, 2], 2)


def test_algebra_acts_on_the_directions() -> None:
    v, w = vectors()
    total = 0.7 * v - w / 2
    assert total.layers == (0, 1, 2)
    torch.testing.assert_close(total.directions[0], 0.7 * v.directions[0])
    torch.testing.assert_close(total.directions[1], 0.7 * v.directions[1] - 0.5 * w.directions[1])
    torch.testing.assert_close(total.directions[2], -0.5 * w.directions[2])
    assert total.scales[1] == pytest.approx((0.7 * v.scales[1] + 0.5 * w.scales[1]) / 1.2)
    assert total.provenance["operation"] == "sum"
    assert [part["factor"] for part in total.provenance["of"]] == [0.7, -1.0]
    for layer, one in total.normalize().directions.items():
        assert float(one.norm()) == pytest.approx(1.0), layer
    exact = v.fitted() + w.fitted()
    expected = v.scales[1] * v.directions[1] + w.scales[1] * w.directions[1]
    torch.testing.assert_close(exact.directions[1], expected)
    assert set(exact.scales.values()) == {1.0}


def test_projections_and_cosines() -> None:
    v, w = vectors()
    along, across = v.project_onto(w), v.project_out(w)
    assert v.cosine(w)[1] == pytest.approx(float(v.directions[1] @ w.directions[1]), abs=1e-6)
    assert set(v.cosine(w)) == {1}
    assert along.cosine(w)[1] == pytest.approx(1.0 if v.cosine(w)[1] > 0 else -1.0)
    assert across.cosine(w)[1] == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close((along + across).directions[1], v.directions[1])
    assert torch.equal(across.directions[0], v.directions[0])
    assert v.cosine(-v) == {0: pytest.approx(-1.0), 1: pytest.approx(-1.0)}


def test_layers_are_chosen_by_number_depth_and_slice() -> None:
    vector = random_vector(built("llama")[0])
    choices: list[tuple[Any, tuple[int, ...]]] = [
        (0, (0,)), (-1, (1,)), (0.0, (0,)), (1.0, (1,)), (slice(1, None), (1,)), ([0, -1], (0, 1)),
    ]  # fmt: skip
    for choice, layers in choices:
        assert vector[choice].layers == layers
        assert vector[choice].scales[layers[0]] == vector.scales[layers[0]]
    with pytest.raises(SiteError, match=r"no direction at block 0; it has \[1\]"):
        vector[1:][0]
    with pytest.raises(SiteError, match=r"depth; expected a number from 0\.0"):
        vector[1.5]


def test_bad_directions_are_refused() -> None:
    for directions, scales, text in (
        ({}, {}, r"widths \[\]"),
        ({0: torch.ones(3), 1: torch.ones(4)}, {}, r"widths \[3, 4\]"),
        ({0: torch.ones(1, 3)}, {}, r"\(1, 3\); expected a \(width,\) tensor"),
        ({0: torch.tensor([float("nan")])}, {}, "NaN or infinite"),
        ({-1: torch.ones(3)}, {}, "-1 is no block number"),
        ({0: torch.ones(3)}, {0: -1.0}, "negative or not finite"),
        ({0: torch.ones(3)}, {2: 1.0}, r"scales for blocks \[2\] without"),
    ):
        with pytest.raises(InputError, match=text):
            SteeringVector(directions, scales)


def test_a_vector_owns_its_numbers() -> None:
    given = torch.ones(3)
    vector = SteeringVector({0: given})
    given.zero_()
    assert vector.directions[0].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(TypeError):
        vector.directions[1] = given  # type: ignore[index]


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model, inputs = built("llama")
    vector = random_vector(model) + 2 * random_vector(model, [1], 5)
    path = tmp_path / "v.safetensors"
    vector.save(path)
    again = pb.steering.load(path, model=model)
    assert again.layers == vector.layers
    assert all(torch.equal(again.directions[layer], vector.directions[layer]) for layer in vector.layers)
    assert (dict(again.scales), dict(again.provenance)) == (dict(vector.scales), dict(vector.provenance))
    assert again.fingerprint == vector.fingerprint
    with torch.no_grad():
        with vector.apply(model, 0.5):
            first = model(**inputs).logits
        with again.apply(model, 0.5):
            assert torch.equal(model(**inputs).logits, first)
    pb.explain(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"expected a file written by SteeringVector\.save"):
        load(tmp_path / "a.safetensors")


def test_another_model_is_refused_and_both_are_named(tmp_path: Path) -> None:
    llama, inputs = built("llama")
    other = built("qwen2")[0]
    vector = random_vector(llama)
    path = tmp_path / "v.safetensors"
    vector.save(path)
    text = (
        r"made for LlamaForCausalLM \(2 blocks of width 32, config \w{12}\); the model given is "
        r"Qwen2ForCausalLM \(2 blocks of width 32, config \w{12}\)\..*allow_other_model=True"
    )
    with pytest.raises(ModelError, match=text):
        load(path, model=other)
    with pytest.raises(ModelError, match=text):
        vector.apply(other)
    with vector.apply(other, allow_other_model=True) as steering:
        other(**inputs)
    assert steering.statistics.layers[0].tokens == 14
    with pytest.raises(ModelError, match=r"width 8 at blocks \[0\].*\. Fit a vector on this model\."):
        SteeringVector({0: torch.ones(8)}).apply(llama, allow_other_model=True)
    with pytest.raises(ModelError, match=r"width 32 at blocks \[5\]"):
        random_vector(None, [5]).apply(llama)
    with pytest.raises(ModelError, match="for different models"):
        vector + random_vector(other)


def test_the_fingerprint_is_of_the_architecture() -> None:
    model, _ = built("llama")
    known = fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.config.use_cache, model.config._name_or_path = False, "elsewhere"
    assert fingerprint(model.half()) == known
    assert fingerprint(model.model).same_architecture(known)  # the model without its head
    model.config.rms_norm_eps = 0.5
    assert not fingerprint(model).same_architecture(known)


PATHS = {
    "gpt2": "transformer.h", "llama": "model.layers", "mpt": "transformer.blocks", "opt": "model.decoder.layers",
    "t5": "decoder.block", "bart": "model.decoder.layers", "whisper": "model.decoder.layers", "rwkv": "rwkv.blocks",
    "llava": "model.language_model.layers", "qwen2_vl": "model.language_model.layers", "git": "git.encoder.layer",
    "blip": "text_decoder.bert.encoder.layer", "zamba": "model.layers", "nemotron_h": "model.layers",
}  # fmt: skip


@pytest.mark.parametrize(("name", "path"), PATHS.items())
def test_blocks_are_found(name: str, path: str) -> None:
    assert find_blocks(ARCHITECTURES[name]()[0]).path == path


def test_the_decoder_of_another_depth_than_the_encoder_is_found() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    found = find_blocks(T5ForConditionalGeneration(config))
    assert (found.path, len(found)) == ("decoder.block", 3)


def test_blocks_that_are_not_found_can_be_named() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4))

    two = nn.ModuleDict({"a": nn.ModuleList([block(), block()]), "b": nn.ModuleList([block(), block()])})
    with pytest.raises(SiteError, match=r'Lists of modules: "a" \(2\).*blocks="dotted.path"'):
        find_blocks(two)
    assert find_blocks(two, "b").modules == tuple(two["b"])
    with pytest.raises(SiteError, match=r'blocks="c" is no module of ModuleDict'):
        find_blocks(two, "c")
    shared = block()
    with pytest.raises(SiteError, match="share one module"):
        find_blocks(nn.ModuleDict({"a": nn.ModuleList([shared, shared])}))


def test_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = random_vector(None, [1, 3])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match="pip install gguf"):
            vector.to_gguf(tmp_path / "v.gguf")
    gguf = pytest.importorskip("gguf")
    with pytest.raises(MethodError, match="cannot steer block 0"):
        random_vector(None, [0, 1]).to_gguf(tmp_path / "v.gguf")
    vector.to_gguf(tmp_path / "v.gguf", strength=0.5)
    tensors = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "v.gguf").tensors}
    assert sorted(tensors) == ["direction.1", "direction.3"]
    expected = 0.5 * vector.scales[3] * vector.directions[3]
    torch.testing.assert_close(torch.from_numpy(tensors["direction.3"].copy()), expected)
