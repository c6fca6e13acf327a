"""Does selecting latents by gradient keep features that are small but matter, and where does it lose?

A world of 28 loud directions, four of them in every token, and four whispers, each on in a quarter of the tokens. A
model reads the whispers only. An autoencoder with four latents per token has no room for whispers by size.

"whisper": the model's neurons open only where a whisper is on. "linear": loud features come and go, so that there is
room, and the model reads the whispers linearly, so that its gradient points at them also where they are off.

    python -m studies.sae_whisper [--quick] [--out DIRECTORY]

Results are appended seed by seed to ``results.jsonl``; what is there is not done again.
"""

from __future__ import annotations

import argparse
import csv
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.steering.sae import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    Trainer,
    TrainingConfig,
    evaluate_sae,
)
from studies.records import append, finished
from studies.steering_protocol import interval

RESULTS = Path(__file__).parent / "results" / "sae_whisper"
WIDTH, LOUD, WHISPERS, K, LATENTS, BATCH = 32, 28, 4, 4, 64, 256
WORLDS = ("whisper", "linear")
ARMS: dict[str, dict[str, Any]] = {
    "TopK": {"selection": "topk"},
    "TopK + AuxK": {"selection": "topk", "auxiliary_weight": 1 / 32},
    "g-SAE": {"selection": "gradient"},
    "g-SAE, beta from the start": {"selection": "gradient", "beta_warmup": 0.0},
}
MEASURES = (
    "ce_score_mean",
    "recall",
    "cosine",
    "recovered",
    "fvu",
    "dead_share",
    "without gradient",
    "data label",
)


class Reader(nn.Module):
    """Logits that depend on the whispers of a token (B, width) only."""

    def __init__(self, world: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        self.register_buffer("loud", basis[:LOUD])
        self.register_buffer("whispers", basis[LOUD:])
        self.register_buffer("readout", 6 * torch.randn(WIDTH, WHISPERS, generator=generator))
        self.site = nn.Identity()
        self.gated = world == "whisper"
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        heard = self.site(x) @ self.whispers.t()
        return ((heard - 0.175).relu() if self.gated else heard) @ self.readout.t()

    def tokens(self, count: int, generator: torch.Generator) -> Tensor:
        """Four loud features of size 1 to 2 ("linear": four on average), and whispers of about half."""
        order = torch.rand(count, LOUD, generator=generator)
        if self.gated:
            on = torch.zeros(count, LOUD).scatter(1, order.topk(4, 1).indices, 1.0)
        else:
            on = (order < 4 / LOUD).float()
        size = 1 + torch.rand(count, LOUD, generator=generator)
        heard = (torch.rand(count, WHISPERS, generator=generator) < 0.25).float()
        level = (0.5 if self.gated else 0.6) * (0.75 + 0.5 * torch.rand(count, WHISPERS, generator=generator))
        return (on * size) @ self.loud + (heard * level) @ self.whispers


def gradient_of(model: Reader, x: Tensor, generator: torch.Generator) -> Tensor:
    """Of the cross-entropy of a label drawn from the model, summed over tokens."""
    x = x.clone().requires_grad_()
    logits = model(x)
    labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def trained(model: Reader, arm: Mapping[str, Any], steps: int, seed: int) -> SparseAutoencoder:
    """The autoencoder of one arm."""
    config = TrainingConfig(
        SparseAutoencoderConfig(
            WIDTH, LATENTS, K, arm["selection"], beta=10.0, auxiliary_weight=arm.get("auxiliary_weight", 0.0),
            dead_after=20 * BATCH,
        ),
        tokens=steps * BATCH,
        batch_tokens=BATCH,
        learning_rate=3e-3,
        beta_warmup=arm.get("beta_warmup", 0.3),
        seed=seed,
    )  # fmt: skip
    trainer = Trainer(config)
    generator = torch.Generator().manual_seed(1000 + seed)
    while not trainer.finished:
        x = model.tokens(BATCH, generator)
        trainer.step(x, gradient_of(model, x, generator) if trainer.needs_gradient else None)
    return trainer.autoencoder.eval().requires_grad_(False)


def measured(world: str, seed: int, steps: int) -> dict[str, Any]:
    """Every arm on one world."""
    model = Reader(world, seed)
    generator = torch.Generator().manual_seed(2000 + seed)
    x = model.tokens(16384, generator)
    labels = torch.multinomial(model(x).softmax(1), 1, generator=generator)[:, 0]
    batches = [
        {"x": rows, "labels": each} for rows, each in zip(x.split(2048), labels.split(2048), strict=True)
    ]
    on = (x @ model.whispers.t()) > 0.175
    found = {}
    for name, arm in ARMS.items():
        sae = trained(model, arm, steps, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the collapse that the table shows
            evaluated = evaluate_sae(model, "site", sae, batches, skip_positions=(), seed=seed).measures
        by = evaluated.get("gradient, fresh label", evaluated["size"])
        gradient = gradient_of(model, x, generator) if sae.config.selection == "gradient" else None
        dense = sae.encode(x, gradient).dense()
        cosines = torch.nn.functional.normalize(sae.decoder, dim=1) @ model.whispers.t()
        best = cosines.abs().amax(0)
        active = dense[:, cosines.abs().argmax(0)] > 0
        found[name] = {
            "ce_score_mean": by.ce_score_mean,
            "recall": float(active[on].double().mean()),
            "cosine": float(best.mean()),
            "recovered": float((best > 0.9).sum()),
            "fvu": by.fvu,
            "dead_share": by.dead_share,
            "without gradient": evaluated["size"].ce_score_mean,
            "data label": evaluated.get("gradient, data label", by).ce_score_mean,
        }
        if sae.config.selection == "topk" and name == "TopK":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                late = evaluate_sae(
                    model,
                    "site",
                    sae,
                    batches,
                    skip_positions=(),
                    seed=seed,
                    ways=("gradient, fresh label", "size"),
                ).measures["gradient, fresh label"]
            found["TopK, gradient at evaluation only"] = {
                **found[name], "ce_score_mean": late.ce_score_mean, "fvu": late.fvu, "recall": None,
            }  # fmt: skip
    return {"world": world, "seed": seed, "steps": steps, "arms": found}


def key_of(world: str, seed: int, steps: int) -> str:
    return json.dumps({"world": world, "seed": seed, "steps": steps}, sort_keys=True)


def table(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for world in WORLDS:
        every = [entry for entry in entries if entry["world"] == world]
        for name in dict.fromkeys(name for entry in every for name in entry["arms"]):
            row = {"world": world, "arm": name, "seeds": str(len(every))}
            for measure in MEASURES:
                values = [entry["arms"][name][measure] for entry in every]
                row[measure] = "" if None in values else interval(values)
            rows.append(row)
    return rows


def picture(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss recovered against FVU, a point for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, world in zip(figure.subplots(1, 2), WORLDS, strict=True):
        every = [entry for entry in entries if entry["world"] == world]
        for number, name in enumerate(dict.fromkeys(name for entry in every for name in entry["arms"])):
            points = [(entry["arms"][name]["fvu"], entry["arms"][name]["ce_score_mean"]) for entry in every]
            axes.plot(
                *zip(*points, strict=True), "o", color=f"C{number}", label=name, markersize=5, alpha=0.8
            )
            if name.startswith("g-SAE"):
                free = [
                    (entry["arms"][name]["fvu"], entry["arms"][name]["without gradient"]) for entry in every
                ]
                axes.plot(
                    *zip(*free, strict=True), "o", color=f"C{number}", markerfacecolor="white", markersize=5
                )
        axes.set(title=world, xlabel="FVU (lower is better)", ylabel="loss recovered against the mean")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, title="hollow: without the gradient", title_fontsize=7)
    figure.savefig(path, dpi=110)


def write(entries: Sequence[Mapping[str, Any]], out: Path) -> str:
    rows = table(entries)
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture(entries, out / "sae_whisper.png")
    lines = []
    for row in rows:
        lines.append(f"{row['world']}: {row['arm']}, {row['seeds']} seeds")
        lines += [f"   {measure:<18}{row[measure]}" for measure in MEASURES if row[measure]]
    text = "\n".join(lines)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    return text


def main() -> None:
    """Train and measure every arm; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="hardly trained, one seed, for the tests")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds = (100, 1) if arguments.quick else (3000, 5)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "results.jsonl"
    for seed in range(seeds):
        for world in WORLDS:
            key = key_of(world, seed, steps)
            if key not in finished(log):
                append(log, {"key": key, **measured(world, seed, steps)})
    wanted = [key_of(world, seed, steps) for world in WORLDS for seed in range(seeds)]
    entries = [entry for key, entry in finished(log).items() if key in wanted]
    print(write(sorted(entries, key=lambda each: (each["world"], each["seed"])), arguments.out))


if __name__ == "__main__":
    main()
