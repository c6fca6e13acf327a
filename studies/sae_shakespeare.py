"""TopK and gradient selection at equal k on a small Llama that reads Shakespeare, character by character.

A Llama of three layers is trained on Tiny Shakespeare (the full text where it is found, else the embedded excerpt).
At the output of its second layer autoencoders are trained, for every k and three seeds, with TopK and with gradient
selection (next-character loss). On held-out text each is measured in every way that it can be used:

- "TopK"; "TopK, gradient at evaluation": the same weights, latents chosen with a fresh label's gradient;
- "g-SAE, fresh label", "g-SAE, data label" (its choice peeks at the label it is then judged by), "g-SAE,
  gradient-free"; the same with a tenth of the weight of the gradient, "beta 1".

Intervals are Student's t over the autoencoders' seeds; the language model is one.

    python -m studies.sae_shakespeare [--quick] [--out DIR] [--seeds N]

Finished runs are read back from DIR/results.jsonl, whose key is a hash of settings, text and version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pullback as pb
from pullback.datasets import Characters, shakespeare
from pullback.steering.sae import (
    ActivationGradientStream,
    Evaluation,
    SparseAutoencoder,
    SparseAutoencoderConfig,
    TrainingConfig,
    evaluate_sae,
    latent_statistics,
    steering_effects,
    train_sae,
)
from studies.records import append, finished
from studies.sae_report import pareto_figure, table, write_table

SITE = "model.layers.1"
# kind -> selection and beta, None for the settings' own
KINDS: dict[str, tuple[Any, float | None]] = {
    "topk": ("topk", None),
    "gradient": ("gradient", None),
    "gradient, beta 1": ("gradient", 1.0),
}
SHOWN = ("CE score, mean ablation", "added CE", "FVU")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers."""

    width: int = 64
    layers: int = 3
    length: int = 64
    batch: int = 32
    model_steps: int = 2500
    model_learning_rate: float = 3e-3
    latents: int = 512
    ks: tuple[int, ...] = (2, 4, 8, 16, 32)
    tokens: int = 400_000
    batch_tokens: int = 1024
    learning_rate: float = 2e-3
    beta: float = 10.0
    test_examples: int = 128


FULL = Settings()
QUICK = Settings(
    width=32, model_steps=60, latents=96, ks=(4, 8), tokens=8_000, batch_tokens=256, test_examples=16
)


def text() -> tuple[str, str]:
    """The full text where it is found (PULLBACK_DATA or ../shared/data), else the excerpt; and which it is."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    if os.environ.get("PULLBACK_DATA"):
        return shakespeare("env"), "full text"
    if (beside / "tinyshakespeare" / "input.txt").is_file():
        return shakespeare(beside), "full text"
    return shakespeare(), "excerpt"


def examples(ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    """Pieces of a text from random places, (count, length)."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (count,), generator=draw)
    return ids[starts[:, None] + torch.arange(length)]


def language_model(ids: Tensor, vocabulary: int, settings: Settings) -> nn.Module:
    """A small Llama, trained with AdamW and a cosine schedule."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=settings.width,
                intermediate_size=4 * settings.width,
                num_hidden_layers=settings.layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=settings.length,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), settings.model_learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.model_steps)
    for step in range(settings.model_steps):
        batch = examples(ids, settings.length, settings.batch, step)
        logits = model(input_ids=batch).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def trained(model: nn.Module, ids: Tensor, kind: str, k: int, seed: int, settings: Settings) -> Any:
    """One autoencoder, and the share of selections that the gradient changed in the last row of its metrics."""
    selection, beta = KINDS[kind]
    shape = SparseAutoencoderConfig(
        settings.width,
        settings.latents,
        k,
        selection=selection,
        beta=settings.beta if beta is None else beta,
        dead_after=50_000,
    )
    count = -(-settings.tokens // (settings.batch * (settings.length - 1))) + 20
    batches = [
        examples(ids, settings.length, settings.batch, 100_000 * (seed + 1) + number)
        for number in range(count)
    ]
    config = TrainingConfig(
        shape,
        tokens=settings.tokens,
        batch_tokens=settings.batch_tokens,
        learning_rate=settings.learning_rate,
        seed=seed,
        log_every=10**6,
        tensorboard=False,
    )
    result = train_sae(model, SITE, batches, config)
    return result.sae, result.metrics[-1].get("selection_changed")


def numbers(found: Evaluation, name: str) -> dict[str, float]:
    each = found.selections[name]
    return {
        "CE score, mean ablation": each.ce_score_mean,
        "CE score, zero ablation": each.ce_score_zero,
        "added CE": each.added_ce,
        "KL score, mean ablation": each.kl_score_mean,
        "FVU": each.fvu,
        "L0": each.l0,
        "dead share": each.dead_share,
    }


def measured(
    model: nn.Module, train: Tensor, test: list[Tensor], kind: str, k: int, seed: int, settings: Settings
) -> Any:
    """All measures of one autoencoder, by the way it is used."""
    began = time.perf_counter()
    autoencoder, changed = trained(model, train, kind, k, seed, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate_sae(model, SITE, test, autoencoder, seed=seed)
        values = {}
        if kind == "topk":
            values["TopK"] = numbers(found, "gradient-free")
            later = evaluate_sae(
                model, SITE, test, with_gradient(autoencoder, model, test, settings), seed=seed
            )
            values["TopK, gradient at evaluation"] = numbers(later, "fresh label")
        else:
            for name in ("fresh label", "data label", "gradient-free"):
                values[f"g-SAE{kind.removeprefix('gradient')}, {name}"] = numbers(found, name)
    values[next(iter(values))] |= steering(model, test, autoencoder)
    return {
        "kind": kind,
        "k": k,
        "seed": seed,
        "ce": round(found.ce, 5),
        "ce_mean": round(found.ce_mean, 5),
        "selection_changed": changed,
        "values": {way: {name: round(v, 5) for name, v in each.items()} for way, each in values.items()},
        "cautions": list(found.warnings),
        "seconds": round(time.perf_counter() - began, 1),
    }


def with_gradient(
    autoencoder: SparseAutoencoder, model: nn.Module, test: list[Tensor], settings: Settings
) -> SparseAutoencoder:
    """The same weights, selecting by gradient, whose scale is measured."""
    config = replace(autoencoder.config, selection="gradient", beta=settings.beta)
    made = SparseAutoencoder.from_parameters(
        config,
        encoder=autoencoder.encoder,
        encoder_bias=autoencoder.encoder_bias,
        decoder=autoencoder.decoder,
        decoder_bias=autoencoder.decoder_bias,
    ).requires_grad_(False)
    gradient = ActivationGradientStream(model, SITE, test, loss="ce_sampled").of(test[0]).gradient
    assert gradient is not None
    made.gradient_scale.copy_(gradient.norm(dim=1).mean())
    return made


def steering(model: nn.Module, test: list[Tensor], autoencoder: SparseAutoencoder) -> dict[str, float]:
    """Effect of the 32 most frequent latents at one norm: a third of the activations' mean."""
    few = [test[0][:8]]
    statistics = latent_statistics(model, SITE, test[:1], autoencoder)
    latents = statistics.frequency.argsort(descending=True, stable=True)[:32].tolist()
    stream = ActivationGradientStream(model, SITE, few)
    norm = float(stream.of(few[0], gradient=False).x.norm(dim=1).mean()) / 3
    found = steering_effects(model, SITE, few, autoencoder, latents, norm=norm)
    return {
        "steering, largest logit change": float(found.largest_change.mean()),
        "steering, KL": float(found.kl.mean()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the table, write it and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model on the excerpt, two k, two seeds")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of the results; else studies/results/sae_shakespeare, or runs/sae_shakespeare-quick",
    )
    parser.add_argument("--seeds", type=int, default=None, help="3 (2 with --quick)")
    given = parser.parse_args(arguments)
    settings = QUICK if given.quick else FULL
    seeds = given.seeds if given.seeds is not None else 2 if given.quick else 3
    kept = Path(__file__).parent / "results" / "sae_shakespeare"
    folder = given.out or (Path("runs") / "sae_shakespeare-quick" if given.quick else kept)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    whole, which = (shakespeare(), "excerpt") if given.quick else text()
    characters = Characters(whole)
    ids = characters.encode(whole)
    edge = len(ids) - len(ids) // 10
    base = [asdict(settings), pb.__version__, hashlib.sha256(whole.encode()).hexdigest()]
    file = folder / "results.jsonl"
    known = finished(file)
    wanted = {}
    for seed in range(seeds):
        for k in settings.ks:
            for kind in KINDS:
                text_key = json.dumps([*base, kind, k, seed], sort_keys=True)
                wanted[hashlib.sha256(text_key.encode()).hexdigest()[:16]] = (kind, k, seed)
    if any(key not in known for key in wanted):
        model = language_model(ids[:edge], len(characters), settings)
        test = list(examples(ids[edge:], settings.length, settings.test_examples, 5).split(32))
        for key, (kind, k, seed) in wanted.items():
            if key not in known:
                known[key] = {
                    "key": key,
                    "text": which,
                    **measured(model, ids[:edge], test, kind, k, seed, settings),
                }
                append(file, known[key])
    records = [
        {"kind": way, "k": known[key]["k"], "values": values}
        for key in wanted
        for way, values in known[key]["values"].items()
    ]
    rows = table(records, ("kind", "k"))
    write_table(folder / "table.csv", rows)
    pareto_figure(folder / "pareto.png", rows, SHOWN)
    first = known[next(iter(wanted))]
    print(
        f"{which}; cross-entropy of the model {first['ce']:.3f}, with the mean in place {first['ce_mean']:.3f} nats"
    )
    for row in rows:
        if row["measure"] in (*SHOWN, "dead share", "steering, largest logit change"):
            interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{row['kind']:30} k={row['k']:<3} {row['measure']:32}{row['mean']:9.3f}  {interval}")


if __name__ == "__main__":
    main()
