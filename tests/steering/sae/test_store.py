"""Saved autoencoders: what SAELens would compute from them, what survives, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pullback.core.errors import FormatError, InputError
from pullback.steering.sae import SparseAutoencoder, SparseAutoencoderConfig, load, load_extra, save

from .test_model import CONFIG, LATENTS, WIDTH, G, K, X, autoencoder, random


def saelens(folder: Path, x: Tensor) -> Tensor:
    """What SAELens' TopK autoencoder computes from the files, by its documentation; its loading is strict."""
    config = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    assert set(weights) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert weights["W_enc"].shape == (config["d_in"], config["d_sae"])
    assert weights["W_dec"].shape == (config["d_sae"], config["d_in"])
    assert (config["architecture"], config["reshape_activations"]) == ("topk", "none")
    mean, deviation = 0.0, 1.0
    if config["normalize_activations"] == "layer_norm":
        mean, deviation = (
            x.mean(-1, keepdim=True),
            (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True) + 1e-5,
        )
    seen = (x - mean) / deviation
    z = (seen - weights["b_dec"] * config["apply_b_dec_to_input"]) @ weights["W_enc"] + weights["b_enc"]
    norms = (
        weights["W_dec"].norm(dim=1)
        if config["rescale_acts_by_decoder_norm"]
        else torch.ones(config["d_sae"])
    )
    top = (z * norms).topk(config["k"])
    a = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
    return ((a / norms) @ weights["W_dec"] + weights["b_dec"]) * deviation + mean


@pytest.mark.parametrize("normalization", ["none", "mean_norm", "row"])
@pytest.mark.parametrize("subtract", [True, False])
def test_files_are_valid_on_raw_activations(normalization: Any, subtract: bool, tmp_path: Path) -> None:
    a = autoencoder(replace(CONFIG, normalization=normalization, subtract_decoder_bias=subtract))
    a.fit_normalization_(10 * X)
    a.gradient_scale.fill_(0.25)
    a.count_(a.encode(X, G))
    save(a, tmp_path / "sae", metadata={"hook_name": "blocks.7"}, extra={"mean_activation": random(LATENTS)})
    torch.testing.assert_close(
        saelens(tmp_path / "sae", 10 * X), a(10 * X, selection="topk"), rtol=0, atol=1e-11
    )
    loaded = load(tmp_path / "sae")
    assert loaded.encode(10 * X, G).indices.equal(a.encode(10 * X, G).indices)
    torch.testing.assert_close(loaded(10 * X, G), a(10 * X, G), rtol=0, atol=1e-11)
    assert loaded.config == a.folded().config
    assert float(loaded.gradient_scale) == 0.25
    assert loaded.tokens_since_fired.equal(a.tokens_since_fired)
    assert load_extra(tmp_path / "sae")["mean_activation"].equal(random(LATENTS))
    assert set(load_extra(tmp_path / "sae")) == {"mean_activation"}
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.7"
    assert os.listdir(tmp_path) == ["sae"]


def test_a_step_off_unit_norm_is_renormalised_on_save(tmp_path: Path) -> None:
    a = autoencoder()
    with torch.no_grad():
        a.decoder.mul_(1.01)
    save(a, tmp_path / "sae")
    norms = load_file(tmp_path / "sae" / "sae_weights.safetensors")["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(LATENTS).double(), rtol=0, atol=1e-12)
    assert a.decoder.norm(dim=1)[0].item() == pytest.approx(1.01)  # the one in training is left alone


def test_saving_twice_is_the_same_bytes_and_replaces(tmp_path: Path) -> None:
    a = autoencoder().float()
    save(a, tmp_path / "sae")
    first = {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()}
    loaded = load(tmp_path / "sae")
    assert loaded.decoder.dtype == torch.float32
    save(loaded, tmp_path / "again")
    assert load(tmp_path / "again").encoder.equal(loaded.encoder)
    save(a, tmp_path / "sae")
    assert {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()} == first


def foreign(folder: Path, **changed: Any) -> Path:
    """A folder as SAELens writes it, without our metadata, with decoder rows that are not of norm 1."""
    folder.mkdir()
    decoder = random(LATENTS, WIDTH, seed=9)
    weights = {
        "W_enc": random(WIDTH, LATENTS, seed=8),
        "b_enc": random(LATENTS),
        "W_dec": decoder,
        "b_dec": random(WIDTH),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    config = {
        "architecture": "topk", "d_in": WIDTH, "d_sae": LATENTS, "k": K, "dtype": "float64", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False, "metadata": {"sae_lens_version": "6.18.0"},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps({**config, **changed}))
    return folder


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_saelens_files(rescale: bool, normalize: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path / "a", rescale_acts_by_decoder_norm=rescale, normalize_activations=normalize)
    loaded = load(folder)
    assert loaded.config.unit_decoder == rescale
    torch.testing.assert_close(loaded(X), saelens(folder, X), rtol=0, atol=1e-12)
    save(loaded, tmp_path / "b")
    torch.testing.assert_close(saelens(tmp_path / "b", X), saelens(folder, X), rtol=0, atol=1e-12)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "jumprelu"}, r"has architecture 'jumprelu'; this pullback reads 'topk'\."),
        (
            {"normalize_activations": "expected_average_only_in"},
            r"reads 'none' and 'layer_norm'\. Older SAELens",
        ),
        ({"reshape_activations": "hook_z"}, r"has reshape_activations 'hook_z'"),
        ({"k": 21}, r"is damaged \(MethodError: k is 21 for 20 latents"),
        ({"k": "4"}, r"is damaged \(MethodError: k is '4'"),
        (
            {"d_in": WIDTH + 1},
            r"does not fit its configuration: encoder has shape \(20, 6\); expected \(20, 7\)\.",
        ),
        (
            {"metadata": {"pullback": {"schema": 2}}},
            r"schema version 2; .* Try: pip install --upgrade pullback",
        ),
        ({"metadata": {"pullback": {"schema": 1, "config": {"widht": 6}}}}, r"unknown setting 'widht'"),
        (
            {"metadata": {"pullback": {"schema": 1, "config": {"width": 6, "latents": 9, "k": 4}}}},
            "contradicts itself",
        ),
        ({"metadata": {"pullback": 3}}, "is damaged"),
        ({"metadata": [3]}, "is damaged"),
    ],
)
def test_configurations_that_are_not_ours(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        load(foreign(tmp_path / "a", **changed))


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"^there is no .*cfg\.json; expected a folder written by"):
        load(tmp_path / "nowhere")
    folder = foreign(tmp_path / "a")
    path = folder / "sae_weights.safetensors"
    weights, data = load_file(path), path.read_bytes()
    path.write_bytes(data[:-9])
    with pytest.raises(FormatError, match="is not a safetensors file, or is damaged"):
        load(folder)
    save_file({**weights, "threshold": torch.ones(3)}, path)
    with pytest.raises(FormatError, match=r"expected \['W_dec', .*\], not \['threshold'\]\.$"):
        load(folder)
    save_file({name: weights[name] for name in ("W_enc", "b_enc", "W_dec")}, path)
    with pytest.raises(FormatError, match=r"missing \['b_dec'\]\.$"):
        load(folder)
    save_file({**weights, "W_dec": weights["W_dec"].t().contiguous()}, path)
    with pytest.raises(FormatError, match=r"decoder has shape \(6, 20\); expected \(20, 6\)"):
        load(folder)
    save_file({**weights, "b_enc": torch.full((LATENTS,), torch.nan)}, path)
    with pytest.raises(FormatError, match="encoder_bias has NaN or infinite entries"):
        load(folder)
    for text, reason in (
        ("{", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ("[" * 99999, "is not JSON"),
    ):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(FormatError, match=reason):
            load(folder)


def test_extra_must_fit(tmp_path: Path) -> None:
    save(autoencoder(), tmp_path / "sae")
    save_file(
        {"gradient_scale": torch.ones(()), "tokens_since_fired": torch.zeros(3)},
        tmp_path / "sae" / "extra.safetensors",
    )
    with pytest.raises(FormatError, match=r"has tokens_since_fired of shape \(3,\); expected \(20,\)\.$"):
        load(tmp_path / "sae")


def test_saving_refuses_to_remove_other_files_and_taken_names(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step")
    with pytest.raises(
        InputError, match=r"holds 'metrics\.csv', which saving would remove; choose an empty folder\.$"
    ):
        save(autoencoder(), tmp_path)
    with pytest.raises(InputError, match="which saving would remove"):
        save(autoencoder(), tmp_path / "metrics.csv")
    with pytest.raises(InputError, match=r"^the name 'gradient_scale' is pullback's own; choose another\.$"):
        save(autoencoder(), tmp_path / "a", extra={"gradient_scale": torch.ones(())})
    with pytest.raises(InputError, match="'pullback' is pullback's own"):
        save(autoencoder(), tmp_path / "a", metadata={"pullback": 1})
    for bad in ({"x": torch.ones(2)}, {"x": float("nan")}):
        with pytest.raises(InputError, match=r"^the metadata is not JSON"):
            save(autoencoder(), tmp_path / "a", metadata=bad)
    assert os.listdir(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_full_disk_loses_nothing(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = autoencoder()
    save(a, tmp_path / "sae")
    before = {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()}
    other = SparseAutoencoder(SparseAutoencoderConfig(3, 4, 1))
    plain = Path.rename

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def rename(self: Path, target: Path) -> Path:
        return full() if self.name.endswith(".part") else plain(self, target)  # type: ignore[return-value]

    with monkeypatch.context() as patched:
        if failing == "fsync":
            patched.setattr(os, "fsync", full)
        else:
            patched.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="No space left"):
            save(other, tmp_path / "sae")
    assert {path.name: path.read_bytes() for path in (tmp_path / "sae").iterdir()} == before
    assert os.listdir(tmp_path) == ["sae"]
