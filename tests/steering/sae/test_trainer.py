"""Training steps against the same step written out densely, with Adam by its formula, in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from pullback.core.errors import FormatError, InputError, MethodError
from pullback.steering.sae import SparseAutoencoder, SparseAutoencoderConfig, Trainer, TrainingConfig
from pullback.steering.sae.processes import Processes

WIDTH, LATENTS, K, TOKENS = 6, 20, 3, 16
SHAPE = SparseAutoencoderConfig(WIDTH, LATENTS, K, "gradient", beta=4.0, dead_after=20, auxiliary_k=2)
CONFIG = TrainingConfig(
    SHAPE, tokens=10 * TOKENS, batch_tokens=TOKENS, learning_rate=0.01, warmup=0.2, dtype="float64"
)


def pairs(count: int = 10, tokens: int = TOKENS, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, 2, tokens, WIDTH, generator=generator, dtype=torch.float64)
    # three directions are loud, so that some latents fall silent
    made[:, 0] = made[:, 0] * torch.tensor([3.0, 3.0, 3.0, 0.1, 0.1, 0.1]) + 0.5
    return [(x, g) for x, g in made]


def by_definition(
    config: TrainingConfig, steps: list[tuple[Tensor, Tensor]]
) -> tuple[list[Tensor], list[float], float]:
    """Parameters, losses and the gradient's scale after plain dense steps."""
    of = SparseAutoencoder(config.autoencoder, seed=config.seed, dtype=torch.float64)
    weights = [value.detach().clone().requires_grad_() for value in of.parameters()]
    first = [torch.zeros_like(value) for value in weights]
    second = [torch.zeros_like(value) for value in weights]
    silent = torch.zeros(LATENTS, dtype=torch.int64)
    scale, seen, losses = 1.0, 0, []
    for step, (x, g) in enumerate(steps):
        encoder, bias, decoder, middle = weights
        z = (x - middle) @ encoder.t() + bias
        score = z
        if step >= 3:  # the warm-up of beta: 0.3 of ten steps
            seen += 1
            scale += (float(g.norm(dim=1).mean()) - scale) / seen
            score = z * (1 + 4.0 * (g / scale @ decoder.t()).abs())
        chosen = torch.zeros_like(z).scatter(1, score.topk(K).indices, 1.0)
        values = z.relu() * chosen
        output = values @ decoder + middle
        loss = ((output - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        dead = silent >= 20
        if dead.any():
            rest = (x - output).detach()
            alive = torch.where(dead, (x - middle).detach() @ encoder.t() + bias, -torch.inf)
            extra = torch.zeros_like(z).scatter(1, alive.topk(2).indices, 1.0) * dead
            decoded = ((((x - middle.detach()) @ encoder.t() + bias).relu()) * extra) @ decoder
            loss = loss + ((decoded - rest) ** 2).sum() / ((rest - rest.mean(0)) ** 2).sum() / 32
        losses.append(float(loss.detach()))
        found = list(torch.autograd.grad(loss, weights))
        found[2] = found[2] - (found[2] * decoder).sum(1, keepdim=True) * decoder
        rate = 0.01 * min(1, (step + 1) / 2, (10 - step) / 2)
        with torch.no_grad():
            for weight, part, one, two in zip(weights, found, first, second, strict=True):
                one.mul_(0.9).add_(0.1 * part)
                two.mul_(0.999).add_(0.001 * part**2)
                corrected = one / (1 - 0.9 ** (step + 1)), two / (1 - 0.999 ** (step + 1))
                weight -= rate * corrected[0] / (corrected[1].sqrt() + 6.25e-10)
            decoder /= decoder.norm(dim=1, keepdim=True)
        silent = torch.where((values > 1e-3).any(0), 0, silent + TOKENS)
    return [value.detach() for value in weights], losses, scale


def test_ten_steps_are_the_definitions() -> None:
    trainer = Trainer(CONFIG)
    given = pairs()
    losses = []
    dead = 0
    for x, g in given:
        dead += int(trainer.autoencoder.dead_latents().sum())
        losses.append(float(trainer.step(x, g).total.detach()))
    weights, expected, scale = by_definition(CONFIG, given)
    assert dead > 0  # AuxK took part
    assert losses == pytest.approx(expected, rel=1e-9)
    for found, value in zip(trainer.autoencoder.parameters(), weights, strict=True):
        torch.testing.assert_close(found.detach(), value, rtol=0, atol=1e-8)  # Adam divides by tiny roots
    assert float(trainer.autoencoder.gradient_scale) == pytest.approx(scale, rel=1e-12)
    assert trainer.tokens == 160
    assert trainer.finished


def test_without_beta_the_gradient_is_not_looked_at() -> None:
    """Golden check 1: bit for bit TopK, also where the gradient is infinite."""
    results = []
    for settings in ({"selection": "topk"}, {"beta": 0.0}):
        trainer = Trainer(replace(CONFIG, autoencoder=replace(SHAPE, **settings)))
        for x, g in pairs():
            assert not trainer.needs_gradient
            trainer.step(x, None if settings.get("selection") else torch.full_like(g, torch.inf))
        results.append([value.detach().clone() for value in trainer.autoencoder.parameters()])
    assert all(one.equal(two) for one, two in zip(*results, strict=True))
    trainer = Trainer(CONFIG)
    needed = []
    for x, g in pairs():
        needed.append(trainer.needs_gradient)
        trainer.step(x, g if trainer.needs_gradient else None)
    assert needed == [False] * 3 + [True] * 7


def test_state_goes_on_bit_for_bit() -> None:
    """Golden check 8, in one process."""
    given = pairs()
    whole, halves = Trainer(CONFIG), Trainer(CONFIG)
    for x, g in given:
        whole.step(x, g)
    for x, g in given[:5]:
        halves.step(x, g)
    tensors, numbers = halves.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    other = Trainer(replace(CONFIG, seed=0))
    other.load_state(tensors, numbers)
    for x, g in given[5:]:
        other.step(x, g)
    mine, theirs = whole.state()[0], other.state()[0]
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.equal(theirs[name]), name
    with pytest.raises(
        FormatError, match=r"^the saved autoencoder\.encoder is \(20, 6\) torch\.float64; expected \(8, 6\)"
    ):
        Trainer(replace(CONFIG, autoencoder=replace(SHAPE, latents=8))).load_state(tensors, numbers)


def test_start_is_centred_and_better_than_the_mean() -> None:
    x = torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:50] += 100  # outliers move the mean by 10, the geometric median by little
    trainer = Trainer(replace(CONFIG, autoencoder=replace(SHAPE, normalization="mean_norm", k=12)))
    trainer.start_(x)
    of = trainer.autoencoder
    median = of.decoder_bias / of.input_scale
    distances = [float((x - at).norm(dim=1).sum().detach()) for at in (median, median + 0.01, median - 0.01)]
    assert distances[0] < min(distances[1:])
    assert float((x * of.input_scale).norm(dim=1).mean()) == pytest.approx(WIDTH**0.5, rel=1e-12)
    about = (x - median).detach()
    assert (
        float((of(x, selection="topk") - x).square().sum() / about.square().sum()) < 1
    )  # k = 12 of tied rows overshoots


def run(trainer: Trainer) -> None:
    for x, g in pairs():
        trainer.step(x, g)


def test_worse_than_the_mean_warns() -> None:
    trainer = Trainer(replace(CONFIG, tokens=20 * TOKENS))
    with torch.no_grad():
        trainer.autoencoder.decoder_bias.fill_(30.0)
    with pytest.warns(
        UserWarning, match=r"^FVU is .* over the first 10 batches: .* Check that the site is the one meant"
    ):
        run(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = Trainer(replace(CONFIG, tokens=20 * TOKENS))
        good.start_(pairs()[0][0])
        run(good)


def test_gradients_of_zero_select_by_size() -> None:
    trainer = Trainer(replace(CONFIG, beta_warmup=0.0))
    x, g = pairs()[0]
    plain = trainer.autoencoder.encode(x, selection="topk").indices
    assert trainer.step(x, torch.zeros_like(g)).latents.indices.equal(plain)


def test_errors_of_steps() -> None:
    trainer = Trainer(CONFIG)
    x, g = pairs()[0]
    with pytest.raises(InputError, match="x has NaN"):
        trainer.step(torch.full_like(x, torch.nan))
    with pytest.raises(InputError, match=r"^x is \(16, 5\) torch.float64; expected activations \(..., 6\)"):
        trainer.step(x[:, :5])
    for _ in range(3):
        trainer.step(x)
    with pytest.raises(InputError, match=r"^step 3 selects by gradient and none was given"):
        trainer.step(x)
    for _ in range(7):
        trainer.step(x, g)
    with pytest.raises(MethodError, match=r"^the run of 10 steps has ended"):
        trainer.step(x, g)
    trainer._measured.fill_(torch.nan)  # as it is on a GPU, where steps do not look
    with pytest.raises(InputError, match=r"^the loss is nan in the 10 steps before step 10"):
        trainer.measured(10)
    with pytest.raises(MethodError, match=r"^the autoencoder is SparseAutoencoderConfig"):
        Trainer(CONFIG, SparseAutoencoder(replace(SHAPE, k=2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, r"^tokens is 0; expected a whole number of at least 1\.$"),
        ({"decay": 1.5}, r"^decay is 1\.5; expected a share from 0 to 1\.$"),
        ({"learning_rate": 0.0}, r"^learning_rate is 0\.0; expected a positive number\.$"),
        ({"dtype": "half"}, r"^dtype is 'half'; expected one of 'float32', 'float64'\.$"),
        (
            {"buffer_tokens": 20},
            r"^buffer_tokens is 20 for batches of 16; expected at least two batches, better 16\.$",
        ),
    ],
)
def test_configurations_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        replace(CONFIG, **settings)


# --- several processes ---


def _train_half(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=number, world_size=2)
    trainer = Trainer(CONFIG, processes=Processes.here())
    chosen = []
    for x, g in pairs():
        rows = slice(number * TOKENS // 2, (number + 1) * TOKENS // 2)
        chosen.append(trainer.step(x[rows], g[rows]).latents.indices)
    state = {**trainer.state()[0], "chosen": torch.stack(chosen)}
    torch.save(state, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_on_the_joined_batch(tmp_path: Path) -> None:
    """With dead latents and the gradient's scale shared: equal to 1e-10 in float64, and the same selections."""
    multiprocessing.start_processes(_train_half, (str(tmp_path),), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    parts = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)]
    trainer = Trainer(CONFIG)
    chosen = torch.stack([trainer.step(x, g).latents.indices for x, g in pairs()])
    assert torch.cat([part["chosen"] for part in parts], 1).equal(chosen)
    for name, value in trainer.state()[0].items():
        if name.startswith("autoencoder"):
            assert parts[0][name].equal(parts[1][name])
            torch.testing.assert_close(parts[0][name], value, rtol=0, atol=1e-10)
    assert bool((trainer.autoencoder.tokens_since_fired >= 20).any())
