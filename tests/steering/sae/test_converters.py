"""Files of other programs, made here from their documentation: the same reconstruction by each program's own steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pullback.core.errors import FormatError, InputError
from pullback.steering.sae import (
    from_dictionary_learning,
    from_openai,
    from_sparsify,
    load,
    save,
    to_sparsify,
)

from .test_model import CONFIG, LATENTS, WIDTH, G, K, X, autoencoder, random

ENCODER, BIAS = random(LATENTS, WIDTH, seed=11), random(LATENTS, seed=12)
DECODER = torch.nn.functional.normalize(random(LATENTS, WIDTH, seed=13))
CENTRE = random(WIDTH, seed=14)


def sparsify(folder: Path, decoder: Tensor = DECODER, **changed: Any) -> Path:
    folder.mkdir()
    weights = {"encoder.weight": ENCODER, "encoder.bias": BIAS, "W_dec": decoder, "b_dec": CENTRE}
    save_file(weights, folder / "sae.safetensors")
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": LATENTS, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": WIDTH,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**config, **changed}))
    return folder


def sparsify_computes(x: Tensor, decoder: Tensor) -> Tensor:
    """ReLU first, then the k largest; a gather and a sum."""
    top = torch.relu(torch.nn.functional.linear(x - CENTRE, ENCODER, BIAS)).topk(K)
    return (decoder[top.indices] * top.values.unsqueeze(2)).sum(1) + CENTRE


def dictionary_learning(folder: Path, kind: str = "AutoEncoderTopK", **changed: Any) -> Path:
    folder.mkdir()
    state = {
        "encoder.weight": ENCODER, "encoder.bias": BIAS, "decoder.weight": DECODER.t().contiguous(), "b_dec": CENTRE,
        "k": torch.tensor(K), "threshold": torch.tensor(-1.0),
    }  # fmt: skip
    torch.save({**state, **changed}, folder / "ae.pt")
    trainer = {
        "trainer_class": "TopKTrainer",
        "dict_class": kind,
        "activation_dim": WIDTH,
        "dict_size": LATENTS,
        "k": K,
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


def openai(path: Path, **changed: Any) -> Path:
    state = {
        "pre_bias": CENTRE, "latent_bias": BIAS, "encoder.weight": ENCODER, "decoder.weight": DECODER.t().contiguous(),
        "stats_last_nonzero": torch.zeros(LATENTS, dtype=torch.int64),
        "activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }  # fmt: skip
    torch.save({**state, **changed}, path)
    return path


def openai_computes(x: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    deviation = (x - mean).std(dim=-1, keepdim=True)
    top = ((((x - mean) / (deviation + 1e-5)) - CENTRE) @ ENCODER.t() + BIAS).topk(K)
    latents = torch.zeros(len(x), LATENTS, dtype=x.dtype).scatter(1, top.indices, top.values.relu())
    return (latents @ DECODER + CENTRE) * (deviation + 1e-5) + mean


# --- numbers ---


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sparsify(scale: float, tmp_path: Path) -> None:
    made = from_sparsify(sparsify(tmp_path / "a", scale * DECODER))
    torch.testing.assert_close(made(X), sparsify_computes(X, scale * DECODER), rtol=0, atol=1e-12)
    assert made.config.unit_decoder == (scale == 1.0)
    save(made, tmp_path / "b")
    torch.testing.assert_close(load(tmp_path / "b")(X), made(X), rtol=0, atol=1e-12)


def test_dictionary_learning(tmp_path: Path) -> None:
    made = from_dictionary_learning(dictionary_learning(tmp_path / "a"))
    torch.testing.assert_close(
        made(X), sparsify_computes(X, DECODER), rtol=0, atol=1e-12
    )  # the same function
    assert made.config.k == K


def test_openai(tmp_path: Path) -> None:
    made = from_openai(openai(tmp_path / "a.pt"))
    shifted = 30 * X + 7
    torch.testing.assert_close(made(shifted), openai_computes(shifted), rtol=0, atol=1e-11)
    save(made, tmp_path / "b")
    torch.testing.assert_close(load(tmp_path / "b")(shifted), made(shifted), rtol=0, atol=1e-11)


def test_to_sparsify_and_back(tmp_path: Path) -> None:
    from dataclasses import replace

    made = autoencoder(replace(CONFIG, normalization="mean_norm"))
    made.fit_normalization_(10 * X)
    to_sparsify(made, tmp_path / "a")
    back = from_sparsify(tmp_path / "a")
    torch.testing.assert_close(back(10 * X), made(10 * X, selection="topk"), rtol=0, atol=1e-11)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["cfg.json", "sae.safetensors"]
    for changed in ({"normalization": "row"}, {"subtract_decoder_bias": False}):
        with pytest.raises(
            InputError, match=r"^sparsify has no autoencoder with .*; expected 'none' and True\."
        ):
            to_sparsify(autoencoder(replace(CONFIG, **changed)), tmp_path / "b")


def test_a_converted_autoencoder_selects_by_the_gradient_on_request(tmp_path: Path) -> None:
    made = from_sparsify(sparsify(tmp_path / "a"))
    z = (X - CENTRE) @ ENCODER.t() + BIAS
    expected = (z * (1 + 9.0 * (G @ DECODER.t()).abs())).topk(K).indices
    assert made.encode(X, G, selection="gradient", beta=9.0).indices.equal(expected)


# --- what is refused ---


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit",))


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"a\.pt cannot be read without running code \(.*\); expected a file of openai"
    ):
        from_openai(openai(tmp_path / "a.pt", harmful=Harmful()))
    with pytest.raises(FormatError, match=r"ae\.pt cannot be read without running code"):
        from_dictionary_learning(dictionary_learning(tmp_path / "b", harmful=Harmful()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "groupmax"}, r"has activation 'groupmax'; this pullback reads TopK autoencoders"),
        ({"transcode": True}, r"has transcode True; .* with transcode False\.$"),
        ({"skip_connection": True}, r"has skip_connection True"),
        ({"k": None}, r"does not describe an autoencoder: k is None"),
        ({"k": 99}, r"k is 99 for 20 latents"),
    ],
)
def test_other_folders_of_sparsify(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        from_sparsify(sparsify(tmp_path / "a", **changed))


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"says dict_class 'BatchTopKSAE'; this pullback reads 'AutoEncoderTopK'\.$"
    ):
        from_dictionary_learning(dictionary_learning(tmp_path / "a", "BatchTopKSAE"))
    with pytest.raises(FormatError, match=r"not \['W_skip'\]\.$"):
        from_dictionary_learning(dictionary_learning(tmp_path / "b", W_skip=CENTRE))
    with pytest.raises(FormatError, match=r"has k of shape \(2,\); expected one number\.$"):
        from_dictionary_learning(dictionary_learning(tmp_path / "c", k=torch.tensor([1, 2])))
    with pytest.raises(
        FormatError, match=r"^there is no .*config\.json; expected a folder written by dictionary"
    ):
        from_dictionary_learning(tmp_path)
    with pytest.raises(FormatError, match=r"has activation 'ReLU'; this pullback reads 'TopK'\.$"):
        from_openai(openai(tmp_path / "d.pt", activation="ReLU"))
    with pytest.raises(FormatError, match=r"encoder has shape \(6, 20\); expected \(20, 6\)"):
        from_openai(openai(tmp_path / "e.pt", **{"encoder.weight": ENCODER.t().contiguous()}))
    with pytest.raises(FormatError, match=r"decoder of shape \(6,\); expected a matrix"):
        from_openai(openai(tmp_path / "f.pt", **{"decoder.weight": CENTRE}))
    with pytest.raises(FormatError, match=r"'pre_bias' that is no tensor"):
        from_openai(openai(tmp_path / "g.pt", pre_bias="0"))
    torch.save([1], tmp_path / "h.pt")
    with pytest.raises(FormatError, match=r"holds a list, not a dict; expected a file of openai"):
        from_openai(tmp_path / "h.pt")
    (tmp_path / "i.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(FormatError, match=r"cannot be read without running code"):
        from_openai(tmp_path / "i.pt")
    with pytest.raises(FormatError, match=r"^there is no .*nowhere\.pt"):
        from_openai(tmp_path / "nowhere.pt")
