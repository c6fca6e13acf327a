"""Reading and replacing values at module sites."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pullback.core.edits import capture, edit
from pullback.core.errors import SiteError
from pullback.core.sites import Site


class Named(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        return {"out": x * scale, "other": x}


class Net(nn.Module):
    """A module called by keyword with a dict output, between two that work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True)
        self.named = Named()
        self.last = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        found = self.named(self.first(x * 1.0), scale=torch.full_like(x, 3.0))
        out: Tensor = self.last(found["out"]) + found["other"]
        return out


X = torch.tensor([[1.0, -2.0]])


def test_capture_is_safe_from_in_place_writes() -> None:
    net = Net()
    wanted = [
        Site.parse(text)
        for text in ("first:input", "first", "named:input.scale", "named:output.out", "last:input")
    ]
    with capture(net, wanted) as found, torch.no_grad():
        net(X)
    values = [found[site][0].tolist() for site in wanted]
    assert values == [[[1.0, -2.0]], [[1.0, 0.0]], [[3.0, 3.0]], [[3.0, 0.0]], [[3.0, 0.0]]]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("site", "value", "wanted"),
    [
        ("first", 5.0, [20.0, 20.0]),
        ("first:input", -5.0, [0.0, 0.0]),
        ("named:input.scale", 10.0, [11.0, 0.0]),
        ("named:output.other", 7.0, [10.0, 7.0]),
        ("last", 2.0, [3.0, 2.0]),
    ],
)
def test_edits_reach_the_output(site: str, value: float, wanted: list[float]) -> None:
    net = Net()
    with edit(net, [(Site.parse(site), lambda current, call: torch.full_like(current, value))]):
        assert net(X).tolist() == [wanted]
    assert net(X).tolist() == [[4.0, 0.0]]


def test_calls_are_counted_and_none_leaves_the_value() -> None:
    net = nn.Sequential(*[nn.Identity()] * 3)
    calls: list[int] = []

    def second(value: Tensor, call: int) -> Tensor | None:
        calls.append(call)
        return value + 1 if call == 1 else None

    with edit(net, [(Site.parse("0"), second)]):
        assert torch.equal(net(X), X + 1)
    assert calls == [0, 1, 2]
    only: list[int] = []
    with edit(net, [(Site.parse("0@2"), lambda value, call: only.append(call))]):
        net(X)
    assert only == [2]


def test_hooks_are_removed_when_the_forward_or_the_edit_raises() -> None:
    net = Net()

    def fail(value: Tensor, call: int) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), edit(net, [(Site.parse("first"), fail)]):
        net(X)
    with (
        pytest.raises(SiteError, match="no module"),
        edit(net, [(Site.parse("first"), fail), (Site.parse("frist"), fail)]),
    ):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_an_edit_does_not_change_the_structure_it_found() -> None:
    kept: list[dict[str, Tensor]] = []

    class Keeper(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            kept.append({"out": x})
            return kept[-1]

    net = Keeper()
    with edit(net, [(Site.parse(":output"), lambda value, call: value + 1)]):
        assert torch.equal(net(X)["out"], X + 1)
    assert torch.equal(kept[0]["out"], X)


def test_script_modules_take_no_site() -> None:
    net = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with (
        pytest.raises(
            SiteError, match=r'"1" is a ScriptModule, which takes no hooks\. Choose the module around it'
        ),
        capture(net, [Site.parse("1")]),
    ):
        net(X)
    assert not net[0]._forward_hooks
