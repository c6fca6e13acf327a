"""The front door: explain and its siblings agree with one another and share the work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.targets import Contrast, LogProb
from tests.conformance.methods import INSTANCES, NAMES, images, relative, site_of, smooth_net, values
from tests.zoo.architectures import decoder


class Counting(nn.Module):
    """Passes values on and counts the rows of its forwards (in a list that copies of the module share)."""

    def __init__(self) -> None:
        super().__init__()
        rows: list[int] = []
        self.seen = lambda count: rows.append(count)
        object.__setattr__(self, "_rows", lambda: rows)

    def forward(self, x: Tensor) -> Tensor:
        self.seen(len(x))
        return x

    @property
    def rows(self) -> int:
        return sum(self._rows())

    def reset(self) -> None:
        self._rows().clear()


def counted() -> tuple[nn.Sequential, Counting]:
    counter = Counting()
    return nn.Sequential(counter, *smooth_net()), counter


def gpt2() -> nn.Module:
    return decoder("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, n_positions=32)[
        0
    ].double()


@pytest.mark.parametrize("name", NAMES)
def test_explain_targets_equals_separate_explains(name: str) -> None:
    net, x, method, site = smooth_net(), images(3), INSTANCES[name], site_of(name)
    questions: list[Any] = [0, 2, [1, 2, 3], None, Contrast(0, 3)]
    together = pb.explain_targets(net, x, questions, method=method, site=site)
    for found, question in zip(together, questions, strict=True):
        wanted = pb.explain(net, x, target=question, method=method, site=site)
        assert relative(values(found), values(wanted)) <= 1e-12
        assert torch.allclose(found.score.double(), wanted.score.double(), atol=1e-12)
        assert found.meta["labels"] == wanted.meta["labels"]
        assert torch.equal(
            torch.as_tensor(found.diagnostics["evaluations"]),
            torch.as_tensor(wanted.diagnostics["evaluations"]),
        )
        if wanted.diagnostics["gap"] is not None:
            assert torch.allclose(found.diagnostics["gap"], wanted.diagnostics["gap"], atol=1e-12)


@pytest.mark.parametrize("chunk", ["auto", 1, 5])
def test_explain_targets_shares_forwards(chunk: Any) -> None:
    """k targets cost the forwards of one: rows through the net do not grow with k."""
    net, counter = counted()
    rows = []
    for count in (1, 4):
        counter.reset()
        pb.explain_targets(
            net, images(3), list(range(count)), method=pb.IntegratedGradients(steps=8), chunk=chunk
        )
        rows.append(counter.rows)
    assert rows[1] <= rows[0] + 3


def test_explain_counts_what_it_runs() -> None:
    net, counter = counted()
    found = pb.explain(net, images(3), target=1, method=pb.IntegratedGradients(steps=8))
    # the clean pass, 8 points, the baseline; one evaluation per point
    assert counter.rows == 3 * (1 + 8 + 1)
    assert found.diagnostics["evaluations"].tolist() == [8, 8, 8]


def test_compare_equals_separate_explains_and_shares_sweeps() -> None:
    net, counter = counted()
    x = images(3)
    methods = {
        "g": pb.Gradient(), "ixg": pb.InputXGradient(), "mean": pb.SmoothGrad(samples=6), "var": pb.VarGrad(samples=6),
        "square": pb.SmoothGrad(samples=6, moment="square"), "ig": pb.IntegratedGradients(steps=5), "text": "ig(steps=5)",
    }  # fmt: skip
    together = pb.compare(net, x, methods, target=1)
    shared = counter.rows
    assert list(together) == list(methods)
    for name, method in methods.items():
        alone = pb.explain(net, x, target=1, method=method)
        assert torch.equal(values(together[name]), values(alone)), name
        assert together[name].method == alone.method
    # one clean pass, one gradient, one sweep of 6, one path of 5, a baseline for each of two completeness gaps
    assert shared <= 3 * (1 + 1 + 6 + 5 + 2)


def test_compare_takes_a_sequence_and_settings_where_they_fit() -> None:
    net, x = smooth_net(), images(2)
    found = pb.compare(net, x, ["gradient", pb.SmoothGrad(samples=3)], target=1, seed=5)
    assert list(found) == [
        "gradient",
        "SmoothGrad(method=Gradient(), samples=3, noise=0.15, seed=0, moment='mean', antithetic=False, independent=False)",
    ]
    assert "seed=5" in list(found.values())[1].method


def test_auto_is_integrated_gradients_to_a_tolerance() -> None:
    found = pb.explain(smooth_net(), images(2))
    assert found.method.startswith("IntegratedGradients(")
    assert "tol=0.05" in found.method
    change = found.score - pb.pose(smooth_net(), images(2)).score(torch.zeros(2, 2, 6, 6).double())
    assert (found.diagnostics["gap"].abs() <= 0.05 * change.abs()).all()


def test_settings_replace_the_methods_own_and_are_recorded() -> None:
    net, x = smooth_net(), images(2)
    inner = pb.SmoothGrad(pb.IntegratedGradients(steps=4), samples=2)
    given = pb.explain(net, x, target=1, method=inner, baseline="constant(0.5)", seed=3)
    same = pb.explain(
        net,
        x,
        target=1,
        method=pb.SmoothGrad(pb.IntegratedGradients(steps=4, baseline=pb.Constant(0.5)), samples=2, seed=3),
    )
    assert torch.equal(values(given), values(same))
    assert given.method == same.method
    tensor = pb.explain(net, x, target=1, method="ig(steps=4)", baseline=torch.full((2, 6, 6), 0.5))
    named = pb.explain(net, x, target=1, method="ig(steps=4)", baseline=pb.Constant(0.5))
    assert torch.equal(values(tensor), values(named))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gradiant"}, r'"gradiant" is unknown\. Nearest: "Gradient"'),
        ({"method": pb.Gradient}, r"a method is an object such as IntegratedGradients\(\)"),
        ({"method": 3}, r"a method is an object .* got 3"),
        ({"method": "gradient", "seed": 3}, r"Gradient\(\) has no seed to set"),
        ({"method": lambda problem: problem.point[:1]}, r"one row for each of the 2 examples"),
        ({"method": lambda problem: None}, r"gave NoneType; a method gives one row"),
    ],
)
def test_wrong_methods(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pb.MethodError, match=message):
        pb.explain(smooth_net(), images(2), **settings)


def test_wrong_questions() -> None:
    net, x = smooth_net(), images(2)
    for targets in ([], "cat"):
        with pytest.raises(pb.TargetError, match="targets is a sequence of at least one target"):
            pb.explain_targets(net, x, targets)  # type: ignore[arg-type]
    with pytest.raises(pb.TargetError, match=r"target 9 is outside the model's 4 classes \(0\.\.3\)"):
        pb.explain(net, x, target=9)
    with pytest.raises(
        pb.TargetError, match=r"returned shape \(2, 4\), expected a real tensor of shape \(2,\).*Reduce every"
    ):
        pb.explain(net, x, target=lambda output: output)


def test_generation_equals_token_by_token() -> None:
    """Row j is the gradient of log p(y_j | prompt, y_<j), each from a forward of its own."""
    model, prompt, ids = gpt2(), torch.tensor([[5, 9, 3]]), [7, 4, 11]
    whole = pb.explain_generation(model, prompt, ids, method=pb.InputXGradient())
    assert values(whole).shape == (3, 5, 16)
    for number, token in enumerate(ids):
        before = torch.cat([prompt, torch.tensor([ids[:number]], dtype=torch.long)], 1)
        alone = pb.explain(model, before, target=LogProb(token), method=pb.InputXGradient())
        length = before.shape[1]
        assert relative(values(whole)[number, :length], values(alone)[0]) <= 1e-9
        assert float(values(whole)[number, length:].abs().sum()) == 0.0
        assert abs(float(whole.score[number] - alone.score[0])) <= 1e-9


def test_generation_refuses_what_it_cannot_read() -> None:
    model = gpt2()
    with pytest.raises(pb.TargetError, match="nothing was generated"):
        pb.explain_generation(model, torch.tensor([[5]]), [])
    with pytest.raises(pb.TargetError, match="generated text needs its tokenizer"):
        pb.explain_generation(model, torch.tensor([[5]]), "hello")
    with pytest.raises(pb.InputError, match=r"one prompt: token ids \(1, T\)"):
        pb.explain_generation(model, torch.tensor([[5], [6]]), [3])


def log_probability(model: nn.Module, embedded: Tensor, prompt: Tensor, ids: list[int]) -> Tensor:
    """log p(ids | prompt), token by token, by the definition; the prompt's embeddings are given."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    total = embedded.new_zeros(())
    for number, token in enumerate(ids):
        text = torch.cat([embedded, table[ids[:number]].detach()], 0)[None]
        total = total + model(inputs_embeds=text).logits[0, -1].log_softmax(0)[token]
    return total


@pytest.mark.parametrize("mask", [None, "right", "left"])
def test_several_tokens_against_a_slow_loop(mask: str | None) -> None:
    """LogProb and Contrast of strings: the gradient at the prompt's embeddings, summed over tokens."""
    model = gpt2()
    texts = [[5, 9, 3, 8], [6, 2, 12, 4]] if mask is None else [[5, 9, 3, 8], [6, 12]]
    width = max(map(len, texts))
    ids, real = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if mask == "left" else slice(0, len(text))
        ids[row, place], real[row, place] = torch.tensor(text), 1
    inputs: Any = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": real}
    if mask == "left":
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)

    class Words:
        """A tokenizer whose words are numbers."""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, tokens: Any) -> str:
            return " ".join(map(str, tokens))

    table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    if mask == "left":
        with pytest.raises(pb.TargetError, match="cannot lengthen position_ids"):
            pb.explain(model, inputs, target=LogProb("7 4 11", tokenizer=Words()), method="gradient")
        return
    for target, sides in [
        (LogProb("7 4 11", tokenizer=Words()), [(1.0, [7, 4, 11])]),
        (Contrast("7 4 11", "3 2", tokenizer=Words()), [(1.0, [7, 4, 11]), (-1.0, [3, 2])]),
    ]:
        found = pb.explain(model, inputs, target=target, method="gradient")
        for row, text in enumerate(texts):
            embedded = table[text].clone().requires_grad_()
            score = sum(
                sign * log_probability(model, embedded, torch.tensor(text), tokens) for sign, tokens in sides
            )
            wanted = torch.autograd.grad(score, embedded)[0]  # type: ignore[arg-type]
            assert relative(values(found)[row, : len(text)], wanted) <= 1e-9
            assert float(values(found)[row, len(text) :].abs().sum()) == 0.0
            assert abs(float(found.score[row]) - float(score.detach())) <= 1e-9
