"""The page of ``pullback sae evaluate``: measures side by side, training curves, and what latents fire on and do."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pullback.steering.sae import Evaluation, latent_statistics, steering_effects

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

    from pullback.commands.sae import RunFolder

__all__ = ["LatentEntry", "LatentPage", "write_sae_report"]

_CURVES = (
    ("fvu", "FVU"),
    ("l0", "L0"),
    ("dead_share", "dead share"),
    ("selection_changed", "choices changed"),
)
_TOP = 5
_STEERED = 8  # examples that logit effects are measured on

_HOW_TO_READ = """\
FVU is the share of the activations' variance that the reconstruction misses: 0 is perfect, the mean alone has 1. \
L0 counts active latents per token. "added CE" is what the model's cross-entropy rises, in nats per token, when the \
reconstruction takes the activations' place; the CE scores say which share of the loss between an ablation (to zero, \
to the mean) and the untouched model is kept, the KL score the same for all predictions.

A gradient selection looks at the loss. With the data's own label it peeks at the answer it is then judged by, and may \
even score above 1; "fresh label" draws the label from the model instead and is the fair number. "gradient-free" \
selects by size, as one must where no backward pass is wanted. Compare autoencoders at equal k and by several seeds: \
one point is no frontier."""


@dataclass(frozen=True)
class LatentEntry:
    """What one latent fires on and does: ``contexts`` are (value, text with the token in brackets)."""

    latent: int
    frequency: float
    mean: float
    largest: float
    promoted: str
    suppressed: str
    contexts: list[tuple[float, str]]


@dataclass(frozen=True)
class LatentPage:
    """Entries of some latents of one autoencoder."""

    name: str
    entries: list[LatentEntry]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Sequence[Tensor],
        run: RunFolder,
        words: Any,
        latents: Sequence[int] | None,
        count: int,
        contexts: int,
    ) -> LatentPage:
        """Entries of the given latents, or of the ``count`` with the largest values among those that are selective."""
        autoencoder, site = run.autoencoder, str(run.site)
        for latent in latents or ():
            autoencoder.latent_direction(latent)
        found = latent_statistics(model, site, batches, autoencoder, contexts=contexts)
        if not latents:
            fires = found.frequency * found.count
            # what fires on every other token is no feature to read, nor is what fired once
            rank = found.largest.double() * ((fires >= 2) & (found.frequency < 0.5))
            latents = [i for i in rank.argsort(descending=True)[:count].tolist() if rank[i] > 0]
        if not latents:
            return cls(run.name, [])
        effects = steering_effects(
            model, site, [batches[0][:_STEERED]], autoencoder, latents, statistics=found
        )
        entries = []
        for number, latent in enumerate(latents):
            logits = effects.logits[number]
            best, worst = logits.topk(min(_TOP, len(logits))), (-logits).topk(min(_TOP, len(logits)))
            entries.append(
                LatentEntry(
                    latent,
                    float(found.frequency[latent]),
                    float(found.mean[latent]),
                    float(found.largest[latent]),
                    _listed(words, best.indices, best.values),
                    _listed(words, worst.indices, -worst.values),
                    [
                        (each.value, _marked(words, each.tokens, each.place))
                        for each in found.contexts(latent)
                    ],
                )
            )
        return cls(run.name, entries)


def write_sae_report(
    path: Path,
    model: nn.Module,
    batches: Sequence[Tensor],
    found: Sequence[tuple[RunFolder, Evaluation]],
    words: Any,
    latents: int,
) -> None:
    """Write one self-contained page."""
    from pullback.viz import Figure, Prose, Table, write_report

    sections: list[Any] = []
    cautions = [f"Beware, {run.name}: {text}" for run, each in found for text in each.warnings]
    if cautions:
        sections.append(Prose("\n\n".join(cautions)))
    first = found[0][1]
    columns = [
        "autoencoder", "k", "latents", "selection", "FVU", "L0", "dead share", "CE", "added CE", "CE score (zero)",
        "CE score (mean)", "KL", "KL score (zero)", "KL score (mean)",
    ]  # fmt: skip
    rows: list[list[object]] = []
    for run, each in found:
        config = run.autoencoder.config
        rows += [
            [run.name, config.k, config.latents, name, *vars(measures).values()]
            for name, measures in each.selections.items()
        ]
    note = (
        f"{first.tokens} tokens; cross-entropy of the model {first.ce:.4g} nats per token, with activations at zero "
        f"{first.ce_zero:.4g}, at their mean {first.ce_mean:.4g}."
    )
    sections += [Table("Every way to use each autoencoder", columns, rows, note), Prose(_HOW_TO_READ)]
    curves = [(run.name, read_metrics(run.metrics)) for run, _ in found if run.metrics is not None]
    if curves:
        sections.append(
            Figure("Training, over tokens; a gap where a value was not measured.", _curves(curves))
        )
    for run, _ in found:
        page = LatentPage.of(model, batches, run, words, None, latents, 6)
        sections.append(_summary(page))
        sections += [
            Table(
                f"{run.name}, latent {entry.latent}: strongest contexts",
                ["value", "context"],
                [list(row) for row in entry.contexts],
                "The token where it fires is in brackets.",
            )
            for entry in page.entries
        ]
    write_report(path, sections, title="Sparse autoencoders, side by side")


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Columns of a metrics.csv; NaN where a cell is empty."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else {}
    return {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in names}


def _summary(page: LatentPage) -> Any:
    from pullback.viz import Table

    rows = [
        [each.latent, each.frequency, each.mean, each.largest, each.promoted, each.suppressed]
        for each in page.entries
    ]
    columns = ["latent", "share of tokens", "mean value", "largest", "promotes", "suppresses"]
    note = (
        "Mean change of the centred logits when the latent's mean value is added at every token. Shown: those with the "
        "largest values among latents that fire on less than half of the tokens."
    )
    return Table(f"{page.name}: latents", columns, rows, note)


def _curves(runs: Sequence[tuple[str, dict[str, list[float]]]]) -> MatplotlibFigure:
    from matplotlib.figure import Figure

    shown = [
        (column, title)
        for column, title in _CURVES
        if any(value == value for _, metrics in runs for value in metrics.get(column, ()))
    ]
    figure = Figure(figsize=(3.2 * max(1, len(shown)), 2.8), layout="constrained")
    for axes, (column, title) in zip(
        figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown, strict=False
    ):
        for name, metrics in runs:
            if metrics.get(column):
                axes.plot(metrics["tokens"], metrics[column], label=name, marker=".", markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("tokens", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def _text(words: Any, ids: Sequence[int]) -> str:
    return str(words.decode(list(ids)))


def _marked(words: Any, tokens: Sequence[int], place: int) -> str:
    before, at, after = tokens[:place], tokens[place : place + 1], tokens[place + 1 :]
    parts = [_text(words, part).replace("\n", "⏎") for part in (before, at, after)]
    return f"{parts[0]} [{parts[1]}] {parts[2]}".strip()


def _listed(words: Any, ids: Tensor, values: Tensor) -> str:
    sign = (
        1 if float(values[0]) > 0 else -1
    )  # the first is the strongest: no token of the other sign beside it
    shown = [
        (token, value) for token, value in zip(ids.tolist(), values.tolist(), strict=True) if sign * value > 0
    ]
    return ", ".join(f"{_text(words, [token])!r} {value:+.2g}" for token, value in shown)
