"""Whisper features: quiet directions that alone matter to a model, seen by TopK autoencoders and by gradient selection.

Activations are sums of exactly four loud directions and of quiet "whispers"; with four latents per token, selection by
size has no room for whispers. Two cases with the truth known:

- "gated": logits read the whispers through a gate. Gradient selection finds them, at the price of reconstruction, and
  loses them again where it is used without gradients.
- "linear": four loud directions on average only, so that slots stay free, and a linear readout, whose gradient is along
  the whispers on every token, also where they are off. Here gradient selection is worse than TopK.

Each autoencoder is measured on fresh tokens: loss recovered against mean ablation (a g-SAE with fresh labels, with the
data's and without gradient), FVU, dead share, recall of whispers that are on, and cosine of the best direction.

    python -m studies.sae_whisper [--quick] [--out DIR] [--seeds N]

Finished runs are read back from DIR/results.jsonl, whose key is a hash of settings and version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pullback as pb
from pullback.steering.sae import (
    ActivationGradientStream,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    TrainingConfig,
    evaluate_sae,
    train_sae,
)
from studies.records import append, finished
from studies.sae_report import table, whisper_figure, write_table

WIDTH, LOUD, WHISPERS, K = 32, 28, 4, 4
CASES = {"gated": ("topk", "gradient"), "linear": ("topk", "gradient")}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of one run."""

    steps: int = 3000
    batch: int = 256
    latents: int = 64
    learning_rate: float = 3e-3
    beta: float = 10.0
    beta_linear: float = 30.0
    beta_warmup: float = 0.3
    test_tokens: int = 16384


FULL = Settings()
QUICK = Settings(steps=300, test_tokens=2048)


class World(nn.Module):
    """The model that reads whispers, (B, 32) -> (B, 32) logits, and the tokens that it sees."""

    def __init__(self, case: str, seed: int) -> None:
        super().__init__()
        self.case = case
        draw = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)).Q.float()
        self.register_buffer("loud", basis[:LOUD])
        self.register_buffer("whispers", basis[LOUD:])
        self.register_buffer("readout", 6 * torch.randn(WIDTH, WHISPERS, generator=draw))
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        heard = self.site(x) @ self.whispers.T
        if self.case == "gated":
            heard = torch.relu(heard - 0.175)
        return heard @ self.readout.T

    @torch.no_grad()
    def tokens(self, count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Activations with labels drawn from the model, and which whispers are on, (count, 4) bool."""
        draw = torch.Generator().manual_seed(seed)
        order = torch.rand(count, LOUD, generator=draw)
        if self.case == "gated":
            active = (order.argsort(1).argsort(1) < K).float()
        else:
            active = (order < K / LOUD).float()
        size = 1 + torch.rand(count, LOUD, generator=draw)
        on = torch.rand(count, WHISPERS, generator=draw) < 0.25
        quiet = 0.5 if self.case == "gated" else 0.6
        whispered = on * quiet * (0.75 + 0.5 * torch.rand(count, WHISPERS, generator=draw))
        x = (active * size) @ self.loud + whispered @ self.whispers
        labels = torch.multinomial(self(x).softmax(-1), 1, generator=draw)[:, 0]
        return {"x": x, "labels": labels}, on


class Batches:
    """Batches of one world, drawn again from the start each time they are read."""

    def __init__(self, world: World, size: int, count: int, seed: int) -> None:
        self.world, self.size, self.count, self.seed = world, size, count, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in range(self.count):
            yield self.world.tokens(self.size, 1_000_003 * (self.seed + 1) + number)[0]


def trained(world: World, arm: str, settings: Settings, seed: int) -> SparseAutoencoder:
    """One autoencoder on a world's tokens."""
    beta = settings.beta if world.case == "gated" else settings.beta_linear
    shape = SparseAutoencoderConfig(
        WIDTH,
        settings.latents,
        K,
        selection=arm,
        beta=beta,
        auxiliary_weight=0.0,  # type: ignore[arg-type]
    )
    config = TrainingConfig(
        shape,
        tokens=settings.steps * settings.batch,
        batch_tokens=settings.batch,
        learning_rate=settings.learning_rate,
        beta_warmup=settings.beta_warmup,
        skip_positions=(),
        seed=seed,
        log_every=settings.steps,
        tensorboard=False,
    )
    size = 16 * settings.batch
    count = settings.steps // 16 + 17
    return train_sae(world, "site", Batches(world, size, count, seed), config).sae


def measured(case: str, arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Every number of one run."""
    began = time.perf_counter()
    world = World(case, seed).eval()
    autoencoder = trained(world, arm, settings, seed)
    batch, on = world.tokens(settings.test_tokens, 7_000_000 + seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate_sae(world, "site", [batch], autoencoder, skip_positions=(), seed=seed)
    selections = found.selections
    first = selections["fresh label" if arm == "gradient" else "gradient-free"]
    values: dict[str, float] = {
        "loss recovered": first.ce_score_mean,
        "loss recovered, data label": selections.get("data label", first).ce_score_mean,
        "loss recovered, gradient-free": selections["gradient-free"].ce_score_mean,
        "FVU": first.fvu,
        "L0": first.l0,
        "dead share": first.dead_share,
    }
    gradient = None
    if arm == "gradient":
        stream = ActivationGradientStream(
            world, "site", [batch], loss="ce_sampled", skip_positions=(), seed=seed
        )
        gradient = stream.of(batch, draw="recall").gradient
    with torch.no_grad():
        likeness = (world.whispers @ autoencoder.decoder.T).abs()
        best = likeness.argmax(1)
        dense = autoencoder.encode(batch["x"], gradient).dense()
        values["recall"] = float((dense[:, best] > 0)[on].double().mean())
        values["cosine"] = float(likeness.amax(1).mean())
        values["whispers found"] = float((likeness.amax(1) > 0.9).sum())
    return {
        "case": case,
        "arm": arm,
        "seed": seed,
        "values": {name: round(value, 6) for name, value in values.items()},
        "cautions": list(found.warnings),
        "seconds": round(time.perf_counter() - began, 1),
    }


def check(records: Sequence[dict[str, Any]]) -> None:
    """What the study states, on every seed; an AssertionError says which number broke it."""

    def of(case: str, arm: str, name: str) -> list[float]:
        return [each["values"][name] for each in records if (each["case"], each["arm"]) == (case, arm)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    recovered = "loss recovered"
    assert mean(of("gated", "gradient", recovered)) > 0.75, of("gated", "gradient", recovered)
    assert mean(of("gated", "topk", recovered)) < 0.1, of("gated", "topk", recovered)
    assert min(of("gated", "gradient", "recall")) > 0.7, of("gated", "gradient", "recall")
    assert max(of("gated", "topk", "recall")) < 0.1, of("gated", "topk", "recall")
    assert mean(of("gated", "gradient", "cosine")) > 0.8, of("gated", "gradient", "cosine")
    assert mean(of("gated", "gradient", "dead share")) < mean(of("gated", "topk", "dead share"))
    # the price, and the collapse without gradients
    assert min(of("gated", "gradient", "FVU")) > 2 * max(of("gated", "topk", "FVU"))
    assert max(of("gated", "gradient", f"{recovered}, gradient-free")) < 0.3
    warned = [each["cautions"] for each in records if (each["case"], each["arm"]) == ("gated", "gradient")]
    assert all(any("gradient-free inference loses" in text for text in each) for each in warned), warned
    # where gradient selection loses
    assert min(of("linear", "topk", recovered)) > max(of("linear", "gradient", recovered)), (
        of("linear", "topk", recovered),
        of("linear", "gradient", recovered),
    )


def key(case: str, arm: str, seed: int, settings: Settings) -> str:
    """What a record is about: settings, version, case, arm, seed."""
    text = json.dumps([asdict(settings), pb.__version__, case, arm, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table and write it; the full study also checks what it states."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="300 steps and one seed; nothing is asserted")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of the results; else studies/results/sae_whisper, or runs/sae_whisper-quick with --quick",
    )
    parser.add_argument("--seeds", type=int, default=None, help="3 (1 with --quick)")
    given = parser.parse_args(arguments)
    settings = QUICK if given.quick else FULL
    seeds = given.seeds if given.seeds is not None else 1 if given.quick else 3
    kept = Path(__file__).parent / "results" / "sae_whisper"
    folder = given.out or (Path("runs") / "sae_whisper-quick" if given.quick else kept)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    torch.set_num_threads(1)
    known, records = finished(file), []
    for case, arms in CASES.items():
        for arm in arms:
            for seed in range(seeds):
                name = key(case, arm, seed, settings)
                if name not in known:
                    known[name] = {"key": name, **measured(case, arm, seed, settings)}
                    append(file, known[name])
                records.append(known[name])
    rows = table(records, ("case", "arm"))
    write_table(folder / "table.csv", rows)
    whisper_figure(folder / "whisper.png", rows)
    for row in rows:
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        print(f"{row['case']:8}{row['arm']:10}{row['measure']:32}{row['mean']:9.3f}  {interval}")
    if not given.quick:
        check(records)
        print("every statement of the study holds")


if __name__ == "__main__":
    main()
