"""A steering vector on one HTML page: flags, the table, curves, what it was fitted on and what it does to text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pullback.core.errors import InputError

from .pairs import digest, encode_pairs
from .results import Evaluation
from .sweep import Sweep
from .vector import SteeringVector

if TYPE_CHECKING:
    from pullback.viz.report import Figure, Section, Tokens

__all__ = ["write_steering_report"]

MOST_STRIPS = 24


def write_steering_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    vector: SteeringVector,
    *,
    sweep: Sweep | None = None,
    pairs: Sequence[Any] | None = None,
    tokenizer: Any = None,
    model: nn.Module | None = None,
    title: str = "Steering vector",
) -> None:
    """Write one self-contained HTML page about a vector: reasons to distrust it first.

    Args:
        path: of the page.
        evaluation: of ``evaluate``.
        vector: with the provenance that ``fit`` left; reliability by block and the chosen tokens come from it.
        sweep: of strength and blocks, for the curves.
        pairs: what it was fitted on, with its ``model`` and ``tokenizer``, to show the attributions of their tokens.
        title: of the page.

    Raises InputError for pairs that the vector was not fitted on, or without the model.
    """
    from pullback.viz.report import Prose, Table, write_report

    sections: list[Section] = [Prose(_verdict(evaluation, vector))]
    if evaluation.flags:
        rows = [(flag.severity, flag.name, flag.condition, flag.text) for flag in evaluation.flags]
        sections.append(Table("Reasons to distrust it", ["severity", "flag", "vector", "why"], rows))
    columns, lines = evaluation.table()
    note = (
        "Means over questions with 95 % bootstrap intervals; random: mean over draws with the 2.5th and 97.5th "
        "percentile of the draws. Shifts are in nats, against the model as it is."
    )
    sections += [Table("All conditions", columns, lines, note), _conditions(evaluation)]
    if sweep is not None:
        sections.append(_curves(sweep))
    if vector.provenance.get("agreement"):
        sections.append(_reliability(vector))
    if pairs is not None and vector.provenance.get("chosen"):
        sections.append(_attributions(vector, pairs, tokenizer, model))
    if evaluation.generations:
        sections.append(_generations(evaluation))
    write_report(path, sections, title)


def _verdict(evaluation: Evaluation, vector: SteeringVector) -> str:
    failures = [flag for flag in evaluation.flags if flag.severity == "failure"]
    said = (
        f"Failed: {'; '.join(f'{flag.condition}, {flag.name}' for flag in failures)}."
        if failures
        else "No failure was found. That is no proof: the questions are few and of one kind."
    )
    made = f"{vector}, fitted to {vector.provenance.get('pairs', 'an unknown number of')} pairs."
    completeness = vector.provenance.get("completeness")
    if completeness:
        made += f" Completeness gap of its attributions: {completeness['relative_gap']:.1%}."
    return f"{said}\n\n{made}"


def _conditions(evaluation: Evaluation) -> Figure:
    from pullback.viz.curves import bars
    from pullback.viz.report import Figure

    rows = [
        row for row in evaluation.rows
        if row.measure == "margin_shift" and row.estimate is not None and row.condition != "none"
    ]  # fmt: skip
    names = [row.condition if row.setting == "same" else f"{row.condition} ({row.setting})" for row in rows]
    estimates = [float(row.estimate or 0.0) for row in rows]
    lows = [value if row.low is None else row.low for row, value in zip(rows, estimates, strict=True)]
    highs = [value if row.high is None else row.high for row, value in zip(rows, estimates, strict=True)]
    axes = bars(names, estimates, lows, highs)
    axes.set_xlabel("margin shift, nats", fontsize=8)
    return Figure("How far each condition moves the margin towards true answers.", _figure(axes))


def _curves(sweep: Sweep) -> Figure:
    from pullback.viz.curves import curve
    from pullback.viz.drawing import new_panels
    from pullback.viz.report import Figure

    panels = new_panels(5.4, [2.6, 2.0])
    for layers in dict.fromkeys(point.layers for point in sweep.points):
        points = sorted((p for p in sweep.points if p.layers == layers), key=lambda p: p.strength)
        strengths = [point.strength for point in points]
        curve(strengths, [point.margin_shift for point in points], ax=panels[0], label=_blocks(layers))
        curve(strengths, [point.perplexity_ratio for point in points], ax=panels[1])
    panels[1].axhline(sweep.budget, color="0.4", linewidth=0.8, linestyle="--")
    if sweep.best.strength:
        for panel in panels:
            panel.axvline(sweep.best.strength, color="0.6", linewidth=0.8, linestyle=":")
    panels[0].set_ylabel("margin shift, nats", fontsize=8)
    panels[1].set_ylabel("perplexity ratio", fontsize=8)
    panels[1].set_xlabel("strength", fontsize=8)
    chosen = (
        f"chosen: {sweep.best.strength:g} at {_blocks(sweep.best.layers or ())}"
        if sweep.best.strength
        else "no strength is within it"
    )
    return Figure(
        f"Strength on the validation questions; dashed: the budget of {sweep.budget:g}; {chosen}.",
        _figure(panels[0]),
    )


def _reliability(vector: SteeringVector) -> Figure:
    from pullback.viz.curves import curve
    from pullback.viz.drawing import new_axes
    from pullback.viz.report import Figure

    agreement = vector.provenance["agreement"]
    blocks = [each["block"] for each in agreement]
    axes = new_axes(5.4, 2.4)
    for name, label in (
        ("pairwise", "between pairs"),
        ("to_direction", "to the direction"),
        ("explained", "share explained"),
    ):
        curve(blocks, [each[name] for each in agreement], ax=axes, label=label)
    axes.set_xlabel("block", fontsize=8)
    axes.set_xticks(blocks)
    axes.axhline(0, color="0.6", linewidth=0.6)
    return Figure(
        "Reliability by block: mean cosine of the pairs' displacements to each other and to the direction, and the "
        "share of their squares along their first principal direction.",
        _figure(axes),
    )


def _attributions(
    vector: SteeringVector, pairs: Sequence[Any], tokenizer: Any, model: nn.Module | None
) -> Tokens:
    from pullback.viz.report import Tokens

    if model is None:
        raise InputError("the pairs' tokens need the model too; give model=.")
    encoded = encode_pairs(model, tokenizer, pairs)
    if vector.provenance.get("pairs_digest") != digest(encoded):
        raise InputError(
            "the vector was not fitted on these pairs; give those it was fitted on, or pairs=None."
        )
    strips = []
    for pair, chosen in zip(encoded, vector.provenance["chosen"][:MOST_STRIPS], strict=False):
        values = [0.0] * len(pair.ids)
        for place, score, _ in (*chosen["positive"], *chosen["negative"]):
            values[place] = score
        answers = f"{_text(tokenizer, pair.preferred)} rather than {_text(tokenizer, pair.dispreferred)}"
        name = f"pair {pair.number}: {answers}, contrast changes by {chosen['change']:.3g}, gap {chosen['gap']:.2g}"
        strips.append((name, [_token(tokenizer, int(token)) for token in pair.ids], values))
    left = len(encoded) - len(strips)
    note = "The tokens that were chosen, by their attribution; the others are left white." + (
        f" {left} more pairs are not shown." if left else ""
    )
    return Tokens("What speaks for and against the preferred answers", strips, note)


def _generations(evaluation: Evaluation) -> Section:
    from pullback.viz.report import Table

    conditions = list(dict.fromkeys(each.condition for each in evaluation.generations))
    by_condition = {
        name: [each for each in evaluation.generations if each.condition == name] for name in conditions
    }
    rows = [
        [each[0].prompt, *(one.text for one in each)] for each in zip(*by_condition.values(), strict=True)
    ]
    names = ["before" if name == "none" else f"after, {name}" for name in conditions]
    return Table("Greedy continuations", ["prompt", *names], rows)


def _figure(axes: Any) -> Any:
    return axes.get_figure(root=True)


def _blocks(layers: Sequence[int]) -> str:
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"blocks {layers[0]} to {layers[-1]}"
    return f"block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    from .continuations import text_of

    return text_of(tokenizer, ids).strip()


def _token(tokenizer: Any, token: int) -> str:
    words = getattr(tokenizer, "tokenizer", None) or tokenizer
    named = getattr(words, "convert_ids_to_tokens", None)
    return str(named(token)) if callable(named) else f"{token} "
