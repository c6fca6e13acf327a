"""Sites: text that reads back, the module it means, and errors that name the nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.core.errors import SiteError
from pullback.core.sites import Site, first_tensor_at, sites


class Deep(nn.Module):
    """Blocks under names, one of them run twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.shared = nn.Linear(3, 3)
        self.spare = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.shared(self.layer2(self.shared(self.layer1(x)))))
        return out


@pytest.mark.parametrize(
    "text",
    ["input", "input:pixel_values", "embeddings", "layer4.1", "layer4.1:input", "block@2", "block@2:input",
     "language_model:input.inputs_embeds", "lstm:output.0", "a.b@0:output.1.2", ":input"],
)  # fmt: skip
def test_text_reads_back(text: str) -> None:
    site = Site.parse(text)
    assert str(site) == text
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site


def test_parts_of_a_site() -> None:
    assert Site.parse(" block@2:input.x ") == Site("module", "block", 2, "input", "x")
    assert Site.parse("layer4.1:output") == Site("module", "layer4.1")
    assert Site.parse("input:a.b") == Site("input", leaf="a.b")


@pytest.mark.parametrize("text", ["", "a:sideways", "a@b", "a@", "a::input", "a:input:b"])
def test_no_site(text: str) -> None:
    with pytest.raises(SiteError, match=r'is not a site\. Write "input", "embeddings", a module path'):
        Site.parse(text)


def test_not_even_text() -> None:
    with pytest.raises(SiteError, match=r"a site is text such as .* got int"):
        Site.parse(3)  # type: ignore[arg-type]


def test_unknown_module_names_the_nearest() -> None:
    with pytest.raises(
        SiteError, match=r'no module "layer3" in Deep\. Nearest: "layer2", "layer1".* lists all \d+'
    ) as caught:
        pb.explain(Deep(), torch.ones(1, 3), site="layer3")
    assert "pullback.sites(model)" in str(caught.value)


def test_sites_lists_every_path() -> None:
    assert sites(Deep()) == [
        "layer1",
        "layer1.0",
        "layer1.1",
        "layer2",
        "layer2.0",
        "layer2.1",
        "shared",
        "spare",
        "head",
    ]


def test_paths_of_a_wrapped_model_work_with_and_without_the_prefix() -> None:
    net = Deep().double()
    x = torch.ones(1, 3, dtype=torch.float64)
    wanted = pb.explain(net, x, site="layer2.0", method="gradient").values
    compiled = torch.compile(net, backend="eager")
    for model, site in [(compiled, "layer2.0"), (compiled, "_orig_mod.layer2.0")]:
        assert torch.equal(pb.explain(model, x, site=site, method="gradient").values, wanted)
    assert sites(compiled) == sites(net)  # type: ignore[arg-type]


def test_a_module_that_never_runs() -> None:
    with pytest.raises(
        SiteError, match=r'"spare" never ran in this forward pass\. Choose a module that the forward uses'
    ):
        pb.explain(Deep(), torch.ones(1, 3), site="spare")


def test_a_module_that_runs_twice_is_asked_for_by_call() -> None:
    net, x = Deep().double(), torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(
        SiteError, match=r'"shared" ran 2 times in one forward pass\. Choose one call: "shared@0", "shared@1"'
    ):
        pb.explain(net, x, site="shared")
    with pytest.raises(
        SiteError, match=r'ran 2 times; calls are counted from 0, so "shared@2" does not exist'
    ):
        pb.explain(net, x, site="shared@2")
    first = pb.explain(net, x, target=1, site="shared@0", method="gradient")
    second = pb.explain(net, x, target=1, site="shared@1", method="gradient")
    # closed forms: head alone after the second call; head, shared and layer2's derivative after the first
    assert torch.allclose(second.values, net.head.weight[1].expand(2, 3))
    assert isinstance(first.point, Tensor)
    inner = net.layer2(first.point)
    through = (1 - inner.square()) * (net.head.weight[1] @ net.shared.weight)
    assert torch.allclose(first.values, through @ net.layer2[0].weight)


class Nested(nn.Module):
    """A module whose output is a nest, and one whose output holds no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = _Pair()
        self.text = _Text()

    def forward(self, x: Tensor) -> Tensor:
        self.text(x)
        found = self.pair(x)
        return found["states"][0] * 2 + found["states"][1].sum(1, keepdim=True)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"ids": torch.arange(3), "states": (x * 3, x * 5)}


class _Text(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


def test_one_entry_of_a_nest() -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    for site, wanted in [
        ("pair", [2.0, 0.0]),
        ("pair:output.states.0", [2.0, 0.0]),
        ("pair:output.states.1", [1.0, 1.0]),
    ]:
        assert pb.explain(Nested(), x, target=0, site=site, method="gradient").values.tolist() == [wanted]


def test_missing_entries_and_sites_without_tensors() -> None:
    with pytest.raises(
        SiteError, match=r'site "text" holds no tensor : it is a str|site "text" holds no tensor'
    ):
        pb.explain(Nested(), torch.ones(1, 2), site="text")
    with pytest.raises(SiteError, match=r'"pair:output\.logits" holds no tensor'):
        pb.explain(Nested(), torch.ones(1, 2), site="pair:output.logits")
    with pytest.raises(
        SiteError, match=r'the value at "pair:output\.ids" is torch\.int64; only floating values'
    ):
        pb.explain(Nested(), torch.ones(1, 2), site="pair:output.ids")


def test_first_tensor_is_the_first_floating_one() -> None:
    nest = {"a": torch.arange(2), "b": [torch.ones(1), torch.zeros(1)]}
    assert first_tensor_at(nest, None) == ("b", 0)
    assert first_tensor_at(nest, "b.1") == ("b", 1)
    assert first_tensor_at(torch.ones(1), None) == ()


def test_other_ways_at_other_values_are_refused() -> None:
    """A forward that runs the module again for some values has no fixed place there."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.step(x)
            return self.step(x) if float(x.detach().sum()) < 1.5 else x

    problem = pb.pose(Repeated(), torch.ones(1, 2), target=0, site="step")
    with pytest.raises(SiteError, match=r'"step" ran 2 times in this forward pass but once in the first one'):
        problem.score(torch.zeros(1, 2))
