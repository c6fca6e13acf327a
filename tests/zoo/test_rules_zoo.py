"""Rules on the whole zoo: relevance is conserved, values stay, FullGrad adds up, and every method runs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import pullback as pb
from pullback.attribution.conservation import conservation_report
from pullback.attribution.rules.presets import RELP
from pullback.attribution.rules.recurrent import RecurrentDecomposition
from pullback.core.overrides import Operation
from pullback.core.points import leaves
from tests.conformance.fingerprint import assert_untouched
from tests.zoo.architectures import ARCHITECTURES, in_float64, target_of
from tests.zoo.coverage_table import FAMILIES, PAGE, page, row
from tests.zoo.measuring import EXCEPTIONS, Kind, kind_of, measure, prepared

pytest.importorskip("transformers")

# sums of some 1e3 numbers in float64, with constants that absorb up to 1e2 times the score; found: 4e-14
CONSERVED = 1e-12
# the same per relevance at the site, which is as little as 1e-4 of what flows in the model; found: 2e-12
LEAKED = 1e-10
# far above rounding; found: 2e-3 and more
BROKEN = 1e-3
ADDS_UP = 1e-10
METHODS: dict[str, Any] = {
    "ig": pb.IntegratedGradients(steps=2),
    "smoothgrad": pb.SmoothGrad(samples=2),
    "semantic": pb.SemanticPullback(),
    "excitation": pb.ExcitationPullback(absent="gradient"),
}


def names_of(*kinds: Kind) -> list[str]:
    return [name for name in EXCEPTIONS if kind_of(name) in kinds]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_relevance_is_conserved_and_values_stay(name: str) -> None:
    entry, kind = prepared(name), kind_of(name)
    with assert_untouched(*entry):
        found = measure(name, entry)
    if kind == "held":
        assert found.built is None
        assert found.refusal is not None
        assert "hold everything between constant" in found.refusal
    else:
        assert found.refusal is None
        for each in filter(None, (found.built, found.eager)):
            assert each.equal
            assert each.error <= CONSERVED
            assert each.leaked <= LEAKED
            assert sum(count for _, count in each.rules) > 0
            assert "gradient" not in dict(each.rules)
    if kind == "piecewise linear":
        assert found.gradient <= CONSERVED
    elif kind == "faint":
        assert CONSERVED < found.gradient <= BROKEN < found.gradient_leaked
    else:
        assert found.gradient > BROKEN
    if kind == "hidden":
        names = {each.split(":")[-1] for each in found.uncovered}
        assert len(names) == 1
        assert f"FullGrad names {names.pop()}," in EXCEPTIONS[name][1]
        assert found.fullgrad > ADDS_UP
    else:
        assert found.fullgrad <= ADDS_UP
        assert found.uncovered == ()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_methods_run_and_leave_the_model_untouched(name: str) -> None:
    model, inputs = in_float64(ARCHITECTURES[name]())
    kind, target = kind_of(name), target_of(name)
    chunk = 2 if kind == "patch rows" else "auto"
    with assert_untouched(model, inputs):
        found = {
            each: pb.explain(model, inputs, target=target, method=method, chunk=chunk)
            for each, method in METHODS.items()
        }
    for each, explained in found.items():
        for values in leaves(explained.values):
            assert torch.isfinite(values).all(), each
            assert (values.flatten(1).abs().sum(1) > 0).all(), each


@pytest.mark.parametrize("name", names_of("patch rows"))
def test_what_the_exceptions_say_of_methods_is_still_so(name: str) -> None:
    model, inputs = in_float64(ARCHITECTURES[name]())
    with pytest.raises(pb.InputError, match="Pass chunk=2"), assert_untouched(model, inputs):
        pb.explain(model, inputs, target=target_of(name), method=METHODS["ig"])


@dataclass(frozen=True, eq=False)
class WatchedBiases:
    """The rule for recurrent layers, noting ``Σ b ⊙ ∂score/∂b`` of their biases under it."""

    sent: list[Tensor] = field(default_factory=list)
    within: str | None = None
    operations: ClassVar[frozenset[str]] = RecurrentDecomposition.operations

    def __call__(self, operation: Operation) -> Any:
        signal, state, parameters, *others = operation.args
        watched = [self.watch(each, signal) if each.dim() == 1 else each for each in parameters]
        return RecurrentDecomposition()(replace(operation, args=(signal, state, watched, *others)))

    def watch(self, bias: Tensor, signal: Tensor) -> Tensor:
        live = bias + 0 * signal.sum()  # on the way to the site, so that its gradient is computed
        live.register_hook(lambda gradient: self.sent.append((gradient * bias).sum()))
        return live


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_biases_of_a_fused_kernel_absorb_what_they_get(name: str) -> None:
    model, inputs = in_float64(ARCHITECTURES[name]())
    report = conservation_report(model, inputs, 1, RELP)
    watched = WatchedBiases()
    pb.pose(model, inputs, target=1).under((watched, *RELP)).grad()
    assert len(watched.sent) == sum(parameter.dim() == 1 for parameter in model.layer.parameters())  # type: ignore[union-attr]
    absorbed = {block.name: block.absorbed.sum() for block in report.blocks}
    sent = torch.stack(watched.sent).sum()
    assert sent.abs() > BROKEN * report.score.abs().sum()
    assert (absorbed["layer"] - sent).abs() <= CONSERVED * report.score.abs().sum()


def test_every_exception_is_an_entry_with_a_reason() -> None:
    assert set(EXCEPTIONS) <= set(ARCHITECTURES)
    assert all(len(reason) > 20 for _, reason in EXCEPTIONS.values())
    # the rule is the rule
    assert len(EXCEPTIONS) < len(ARCHITECTURES) / 8


def rows_of_page() -> dict[str, list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {each[0]: each for each in cells if each[0] != "architecture"}


def test_the_page_lists_exactly_the_zoo() -> None:
    found = rows_of_page()
    assert list(found) == [name for names in FAMILIES.values() for name in sorted(names)]
    assert set(found) == set(ARCHITECTURES)
    for name, cells in found.items():
        errors = [float(cell) for cell in cells[1:3] if re.fullmatch(r"1e-\d+", cell)]
        assert errors or kind_of(name) == "held"
        assert all(error <= CONSERVED for error in errors)
        assert name not in EXCEPTIONS or EXCEPTIONS[name][1] in cells[6]


@pytest.mark.parametrize("name", ["plain_googlenet", "multihead_attention", "convolution_3d", "gpt2"])
def test_rows_of_the_page_are_what_is_measured(name: str) -> None:
    shown, fresh = rows_of_page()[name], [cell.strip() for cell in row(measure(name)).strip("|").split("|")]
    assert shown[5:] == fresh[5:]
    for before, now in zip(shown[1:5], fresh[1:5], strict=True):
        numbers = [re.fullmatch(r"1e[+-]\d+", cell) for cell in (before, now)]
        if all(numbers):
            # rounding differs between machines, and powers of ten jump
            assert abs(math.log10(float(before) / float(now))) <= 2.1
        else:
            assert before == now


def test_all_but_the_rows_of_the_page_is_up_to_date() -> None:
    made = page({name: f"| {name} |" for name in ARCHITECTURES})
    made_prose, shown_prose = (
        [line for line in text.splitlines() if not line.startswith("| ")]
        for text in (made, PAGE.read_text(encoding="utf-8"))
    )
    assert made_prose == shown_prose
