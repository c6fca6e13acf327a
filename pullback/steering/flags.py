"""When an evaluation says that a steering vector failed, and when that it is to be used with caution."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Flag, Row
from .vector import SteeringVector

__all__ = ["BASELINES", "flags_of"]

LARGEST_ANTI_STEERABLE = 0.25
LARGEST_GAP = 0.1  # of completeness, as ``fit`` warns
SMALLEST_AGREEMENT = 0.05  # as ``fit`` warns
LARGEST_DIVERGENCE = 0.5  # nats a token of neutral text
LARGEST_REPETITION = 0.2  # more than without steering
FEWEST_QUESTIONS = 20
BASELINES = ("prompt", "random_tokens", "mean_diff", "mean_grad")


def flags_of(
    name: str,
    vector: SteeringVector,
    rows: Sequence[Row],
    block_count: int,
    budget: float,
    without: Sequence[str],
    random: str = "random",
) -> list[Flag]:
    """What the rows of a vector and of its controls, and its own provenance, say against it; failures first.

    Args:
        name: the vector's condition.
        vector: as it is applied, so at the blocks where it is.
        block_count: how many blocks the model has.
        budget: the largest perplexity ratio.
        without: baselines that could not be run.
        random: the condition of the random directions that belong to it.
    """
    at = {(row.condition, row.measure): row for row in rows if row.setting == "same"}

    def estimate(condition: str, measure: str) -> float | None:
        row = at.get((condition, measure))
        return None if row is None else row.estimate

    found: list[Flag] = []
    layers = vector.layers

    def say(failure: bool, flag: str, text: str) -> None:
        found.append(Flag(flag, name, "failure" if failure else "caution", text))

    shift = at[name, "margin_shift"]
    gain, count = shift.estimate, at["none", "margin_shift"].count
    if shift.count < count:
        say(True, "not_finite", f"the answers of {count - shift.count} of {count} questions have log-probabilities "
            "that are not finite under steering; the other rows leave these out. Lower the strength.")  # fmt: skip
    if gain is None:
        return found
    band = at.get((random, "margin_shift"))
    if band is not None and band.high is not None and gain <= band.high:
        say(True, "within_random_band", f"its margin shift {gain:.3g} is not above the 95 % band of random directions, "
            f"which ends at {band.high:.3g}.")  # fmt: skip
    if gain <= 0 or (shift.low is not None and shift.low <= 0):
        low = "" if shift.low is None else f", interval from {shift.low:.3g}"
        say(True, "no_gain", f"its margin shift may be zero or negative ({gain:.3g}{low}).")
    anti = estimate(name, "anti_steerable")
    if anti is not None and anti > LARGEST_ANTI_STEERABLE:
        say(True, "anti_steerable", f"{anti:.0%} of the questions move the wrong way; at most "
            f"{LARGEST_ANTI_STEERABLE:.0%} is expected.")  # fmt: skip
    ratio = estimate(name, "perplexity_ratio")
    if ratio is None:
        say(False, "perplexity_unknown", "nothing was measured on neutral text; give neutral=[...].")
    elif ratio > budget:
        say(True, "perplexity", f"the perplexity of neutral text is {ratio:.3g} times that without steering, over the "
            f"budget of {budget:g}.")  # fmt: skip
    divergence = estimate(name, "divergence")
    if divergence is not None and divergence > LARGEST_DIVERGENCE:
        say(False, "divergence", f"neutral text is predicted otherwise than before ({divergence:.2g} nats a token), "
            "whatever its perplexity.")  # fmt: skip
    completeness = vector.provenance.get("completeness") or {}
    settings = vector.provenance.get("settings") or {}
    gap = completeness.get("relative_gap")
    if settings.get("attribution") == "ig" and gap is not None and gap > LARGEST_GAP:
        say(True, "incomplete_attribution", f"integrated gradients missed {gap:.0%} of the contrast when the vector "
            "was fitted, so tokens were chosen by noise; fit with more steps or another baseline.")  # fmt: skip
    agreement = [
        each["pairwise"] for each in vector.provenance.get("agreement") or () if each["block"] in layers
    ]
    if vector.provenance.get("pairs", 0) > 1 and agreement and max(agreement) < SMALLEST_AGREEMENT:
        say(True, "pairs_disagree", f"the fitted pairs hardly agree on a direction (mean cosine at most "
            f"{max(agreement):.2f}).")  # fmt: skip
    repetition, before = estimate(name, "repetition"), estimate("none", "repetition")
    if repetition is not None and before is not None and repetition - before > LARGEST_REPETITION:
        say(True, "degenerate", f"what it generates repeats itself: {repetition:.0%} of 4-grams, {before:.0%} without "
            "steering.")  # fmt: skip
    better = [
        (condition, value)
        for condition in BASELINES
        if condition != vector.provenance.get("method")
        and (value := estimate(condition, "margin_shift")) is not None
        and value >= gain
    ]
    if better:
        listed = ", ".join(f"{condition} {value:.3g}" for condition, value in better)
        say(
            False,
            "no_better_than_baseline",
            f"simpler ways shift the margin as much as its {gain:.3g}: {listed}.",
        )
    if without:
        say(False, "not_compared", f"there is nothing to compare with for {', '.join(without)}.")
    if list(layers) == [block_count - 1]:
        say(
            False,
            "last_block",
            "it steers the last block only, which is a bias on the logits and changes no attention.",
        )
    if shift.count < FEWEST_QUESTIONS:
        say(
            False, "few_questions", f"{shift.count} questions give wide intervals; {FEWEST_QUESTIONS} is few."
        )
    return sorted(found, key=lambda flag: flag.severity != "failure")
