"""The stream of activations and gradients against autograd through the whole model, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pullback.core.errors import InputError, MethodError, ModelError, SiteError
from pullback.steering.sae import ActivationGradientStream
from pullback.testing import assert_model_untouched

from .language_model import TOKENS_AT_HEAD, WIDTH, WORDS, LanguageModel, batches


def model(**settings: Any) -> LanguageModel:
    return LanguageModel(**settings).double()


def by_hand(of: LanguageModel, ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x and g at "first": one graph over everything, the loss of all next tokens summed."""
    real = torch.ones_like(ids) if real is None else real
    x = of.below(ids).detach().requires_grad_()
    logits = of.above(x)
    total = x.new_zeros(())
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            if real[row, t] and real[row, t + 1]:
                total = total + cross_entropy(logits[row, t], ids[row, t + 1])
    return x.detach(), torch.autograd.grad(total, x)[0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("budget", [1, 3 * 8 * WORDS * 7, "64MiB"])
def test_gradient_of_the_summed_loss(softcap: float | None, budget: int | str) -> None:
    """A head of its own runs on tokens, a model with a softcap on examples; the numbers are the same."""
    of, (ids,) = model(softcap=softcap), batches(1)
    stream = ActivationGradientStream(of, "first", [ids], logits_budget=budget)
    TOKENS_AT_HEAD.clear()
    found = stream.read()
    most = max(TOKENS_AT_HEAD)
    x, g = by_hand(of, ids)
    assert found.gradient is not None
    torch.testing.assert_close(found.x, x[:, 1:].flatten(0, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.gradient, g[:, 1:].flatten(0, 1), rtol=0, atol=1e-12)
    assert float(g.abs().max()) > 0.1
    of_examples = {"64MiB": 54}.get(str(budget), 9)  # whole examples of nine tokens
    assert most == ({"1": 1, "64MiB": 48}.get(str(budget), 7) if softcap is None else of_examples)


def test_score_term_is_the_finite_difference_of_the_loss() -> None:
    """Golden check 5, through the model: w . g is the slope of the summed loss along w at one token."""
    of, (ids,) = model(), batches(1)
    found = ActivationGradientStream(of, "first", [ids], skip_positions=()).read()
    assert found.gradient is not None
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = of.below(ids).detach()

    def loss(by: float) -> float:
        moved = x.clone()
        moved[2, 3] += by * direction
        logits = of.above(moved)
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float(found.gradient[2 * 9 + 3] @ direction) == pytest.approx(slope, abs=1e-8)


def test_batches_of_other_sizes_give_the_same_rows() -> None:
    """Golden check 2: the loss is a sum."""
    of, (ids,) = model(), batches(1)
    whole = ActivationGradientStream(of, "first", [ids]).read()
    parts = ActivationGradientStream(of, "first", [ids[:2], ids[2:]])
    halves = [parts.read(), parts.read()]
    for name in ("x", "gradient"):
        joined = torch.cat([getattr(half, name) for half in halves])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=0, atol=1e-12)


def test_padding_and_bos_are_left_out() -> None:
    of, (ids,) = model(), batches(1, examples=2, length=6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    found = ActivationGradientStream(of, "first", [{"input_ids": ids, "attention_mask": mask}]).read()
    assert found.kept.int().tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]]
    x, g = by_hand(of, ids, mask)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient, g[found.kept], rtol=0, atol=1e-12)
    assert found.x.equal(x[found.kept])
    every = ActivationGradientStream(of, "first", [ids], skip_positions=(0, 2)).read()
    assert every.kept[0].int().tolist() == [0, 1, 0, 1, 1, 1]


def test_without_gradient_nothing_runs_above_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    of, (ids,) = model(), batches(1)
    stream = ActivationGradientStream(of, "first", [ids])
    TOKENS_AT_HEAD.clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a backward pass")

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", refuse)
        patched.setattr(torch.Tensor, "backward", refuse)
        found = stream.read(gradient=False)
        with pytest.raises(AssertionError, match="a backward pass"):
            stream.read()
    assert found.gradient is None
    assert not found.x.requires_grad
    assert found.x.equal(stream.read().x)
    assert TOKENS_AT_HEAD == [48, 48]  # of the two with gradient


def test_other_losses() -> None:
    of, (ids,) = model(), batches(1)
    labels = ids.clone()
    labels[:, :4] = -100
    plain = ActivationGradientStream(
        of, "first", [{"input_ids": ids, "labels": labels}], skip_positions=()
    ).read()

    def own(logits: Tensor, inputs: Any) -> Tensor:
        some = inputs["labels"][:, 1:]
        return cross_entropy(logits[:, :-1].transpose(1, 2), some, reduction="none")

    both = {"input_ids": ids, "labels": labels}
    for budget in (1, "64MiB"):
        called = ActivationGradientStream(
            of, "first", [both], loss=own, skip_positions=(), logits_budget=budget
        ).read()
        assert called.gradient is not None
        assert plain.gradient is not None
        torch.testing.assert_close(called.gradient, plain.gradient, rtol=0, atol=1e-12)
        torch.testing.assert_close(called.loss, plain.loss, rtol=1e-12, atol=0)
    with pytest.raises(MethodError, match=r"^the loss returned a float without derivative; expected a diff"):
        ActivationGradientStream(of, "first", [both], loss=lambda logits, inputs: 1.0).read()  # type: ignore[arg-type,return-value]


def test_sampled_labels_are_the_models_own() -> None:
    """E[d loss / d x] = 0 where labels come from the model; the draws do not depend on how logits are cut."""
    of, ids = (
        model(),
        torch.randint(0, WORDS, (1, 4), generator=torch.Generator().manual_seed(0)).repeat(3000, 1),
    )
    streams = [
        ActivationGradientStream(
            made, "first", [ids], loss="ce_sampled", skip_positions=(), logits_budget=budget
        )
        for made, budget in ((of, "64MiB"), (of, 100_000), (model(softcap=1e9), 200_000))
    ]
    found = [stream.read().gradient for stream in streams]
    assert found[0] is not None
    for other in found[1:]:
        assert other is not None
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)
    rows = found[0].reshape(3000, -1)
    error = rows.std(0) / 3000**0.5
    assert float(error.min()) > 0
    assert float((rows.mean(0) / error).abs().max()) < 4.5  # of 32 entries
    again = streams[0].read().gradient  # the next pass draws anew
    assert again is not None
    assert not again.equal(found[0])


def test_classifiers_and_the_input_as_site() -> None:
    x, labels = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(),
        torch.tensor([0, 1, 1, 0, 1]),
    )
    of = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    for site, at in (("1", lambda z: of[1](of[0](z))), ("input", lambda z: z)):
        found = ActivationGradientStream(of, site, [{"input": x, "labels": labels}]).read()
        value = at(x).detach().requires_grad_()
        rest = of[2](value) if site == "1" else of(value)
        (g,) = torch.autograd.grad(cross_entropy(rest, labels, reduction="sum"), value)
        assert found.gradient is not None
        torch.testing.assert_close(found.gradient, g, rtol=0, atol=1e-14)
        assert found.x.equal(value.detach())


def test_the_model_stays_as_it_is() -> None:
    of, (ids,) = model(), batches(1)
    of.head.weight.grad = torch.ones_like(of.head.weight)
    state = torch.get_rng_state()
    with assert_model_untouched(of):
        ActivationGradientStream(of, "first", [ids], loss="ce_sampled").read()
    assert torch.get_rng_state().equal(state)


def test_errors() -> None:
    of, (ids,) = model(), batches(1)
    with pytest.raises(SiteError, match="no module"):
        ActivationGradientStream(of, "third", [ids])
    with pytest.raises(MethodError, match=r"^loss is 'mse'; expected \"ce\", \"ce_sampled\", or a callable"):
        ActivationGradientStream(of, "first", [ids], loss="mse")
    with pytest.raises(ModelError, match=r"^the model is a function; expected a torch\.nn\.Module\.$"):
        ActivationGradientStream(lambda ids: ids, "first", [ids])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="train"):
        ActivationGradientStream(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "0", [torch.ones(1, 2)])
    with pytest.raises(
        InputError, match=r"no input of shape \(5,\) says what to predict; expected token ids, or"
    ):
        ActivationGradientStream(nn.Linear(3, 2).eval(), "input", [torch.ones(5, 3)]).read()
    with pytest.raises(SiteError, match=r'^the loss does not depend on "second":'):
        detached = model()
        detached.above = lambda hidden: detached.head(hidden)  # type: ignore[method-assign]
        detached.forward = lambda input_ids: detached.head(
            detached.second(detached.below(input_ids)).detach()
        )  # type: ignore[method-assign]
        ActivationGradientStream(detached, "second", [ids]).read()
    with torch.no_grad():
        of.embeddings.weight[int(ids[0, 2])] = torch.nan
    with pytest.raises(
        InputError, match=r'^the activations at "first" are NaN or infinite at \d+ of 48 tokens; expected'
    ):
        ActivationGradientStream(of, "first", [ids]).read()
