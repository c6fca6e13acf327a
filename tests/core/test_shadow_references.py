"""Every kind of reference a module can hold outside its registries must lead to the shadow."""

from __future__ import annotations

import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pullback.core.shadow import shadow
from tests.core.test_shadow import assert_same, fingerprint, leaves

Pair = namedtuple("Pair", ["first", "second"])


class Holder(nn.Module):
    """Computes ``call(self, x)``, made from the registered ``linear`` through some reference."""

    def __init__(self, refer: Callable[[Holder], Callable[[Holder, Tensor], Tensor]]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.call_path = refer(self)

    def scaled(self, x: Tensor, by: float = 2.0) -> Tensor:
        return by * self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call_path(self, x)


@dataclass
class Box:
    item: Any
    extra: list[Any] = field(default_factory=list)


def kept(make: Callable[[Holder], Any], read: Callable[[Any, Tensor], Tensor]) -> Holder:
    """A module with ``make(module)`` in its ``kept`` attribute, whose forward is ``read(kept, x)``."""
    module = Holder(lambda self: lambda own, x: read(own.__dict__["kept"], x))
    module.__dict__["kept"] = make(module)
    return module


def closure(module: Holder) -> Callable[[Tensor], Tensor]:
    weight, owner = module.linear.weight, module
    return lambda x: x @ weight.T + owner.linear.bias


def nested_closure(module: Holder) -> Callable[[Tensor], Tensor]:
    inner = closure(module)
    table = {"inner": [inner]}
    return lambda x: table["inner"][0](x)


def recursive_closure(module: Holder) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor, depth: int = 2) -> Tensor:
        return call(x, depth - 1) if depth else module.linear(x)

    return call


def defaults(module: Holder) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor, linear: nn.Module = module.linear, *, also: Any = (module.linear.bias,)) -> Tensor:
        return linear(x) + also[0]

    return call


def cyclic_list(module: Holder) -> list[Any]:
    items: list[Any] = [module]
    items.append(items)
    items.append({"back": (items, module.linear)})
    return items


def cyclic_object(module: Holder) -> Box:
    box = Box(module)
    box.extra = [box]
    return box


REFERENCES: dict[str, tuple[Callable[[Holder], Any], Callable[[Any, Tensor], Tensor]]] = {
    "module": (lambda m: m.linear, lambda k, x: k(x)),
    "parameter": (lambda m: m.linear.weight, lambda k, x: x @ k),
    "list": (lambda m: [m.linear], lambda k, x: k[0](x)),
    "tuple": (lambda m: (1, (m.linear.weight,)), lambda k, x: x @ k[1][0]),
    "namedtuple": (lambda m: Pair(m.linear, 2), lambda k, x: k.first(x) * k.second),
    "set": (lambda m: {m.linear}, lambda k, x: next(iter(k))(x)),
    "frozenset": (lambda m: frozenset([m.linear]), lambda k, x: next(iter(k))(x)),
    "dict_values": (lambda m: {"a": {"b": [{"c": m.linear}]}}, lambda k, x: k["a"]["b"][0]["c"](x)),
    "dict_keys": (lambda m: {m.linear: 3.0}, lambda k, x: next(iter(k))(x) * next(iter(k.values()))),
    "ordered_dict": (lambda m: OrderedDict(a=m.linear), lambda k, x: next(iter(k.values()))(x)),
    "defaultdict": (lambda m: defaultdict(list, a=[m.linear]), lambda k, x: k["a"][0](x) + len(k["new"])),
    "deque": (lambda m: deque([m.linear], maxlen=2), lambda k, x: k[0](x) * k.maxlen),
    "bound_method": (lambda m: m.scaled, lambda k, x: k(x)),
    "builtin_method": (lambda m: m.linear.weight.matmul, lambda k, x: k(x.mT).mT),
    "partial": (lambda m: functools.partial(m.scaled, by=3.0), lambda k, x: k(x)),
    "partial_args": (lambda m: functools.partial(Holder.scaled, m), lambda k, x: k(x)),
    "partial_keywords": (
        lambda m: functools.partial(nn.functional.linear, weight=m.linear.weight), lambda k, x: k(x)
    ),
    "partial_twice": (lambda m: functools.partial(functools.partial(m.scaled), by=2), lambda k, x: k(x)),
    "closure": (closure, lambda k, x: k(x)),
    "nested_closure": (nested_closure, lambda k, x: k(x)),
    "recursive_closure": (recursive_closure, lambda k, x: k(x)),
    "wrapped": (lambda m: functools.wraps(m.scaled)(closure(m)), lambda k, x: k(x) + k.__wrapped__(x)),
    "defaults": (defaults, lambda k, x: k(x)),
    "lru_cache": (lambda m: functools.lru_cache(lambda: m.linear), lambda k, x: k()(x)),
    "weakref": (lambda m: weakref.ref(m.linear.weight), lambda k, x: x @ k()),
    "weakref_key": (lambda m: {weakref.ref(m.linear): 1.0}, lambda k, x: next(iter(k))()(x)),
    "weak_key_dictionary": (
        lambda m: weakref.WeakKeyDictionary({m.linear: 2.0}), lambda k, x: next(iter(k.keys()))(x)
    ),
    "namespace": (lambda m: types.SimpleNamespace(a=[m.linear]), lambda k, x: k.a[0](x)),
    "dataclass": (lambda m: Box(m.linear), lambda k, x: k.item(x)),
    "nested_objects": (lambda m: Box(Box([Box(m)])), lambda k, x: k.item.item[0].item.linear(x)),
    "cyclic_list": (cyclic_list, lambda k, x: k[1][1][2]["back"][1](x) + k[0].linear(x)),
    "cyclic_object": (cyclic_object, lambda k, x: k.extra[0].extra[0].item.linear(x)),
    "plain_tensor": (lambda m: m.linear.weight * 2, lambda k, x: x @ k),
    "loose_module": (lambda m: [nn.Linear(3, 3)], lambda k, x: k[0](x)),
    "loose_parameter": (lambda m: Box({"w": nn.Parameter(torch.ones(3, 3))}), lambda k, x: x @ k.item["w"]),
}  # fmt: skip


NOT_CALLING_LINEAR = {
    "parameter", "tuple", "builtin_method", "partial_keywords", "closure", "nested_closure", "weakref",
    "plain_tensor", "loose_module", "loose_parameter",
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_of_each_kind_leads_to_the_shadow(name: str) -> None:
    model = kept(*REFERENCES[name]).eval()
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = model(x)
    assert any(leaf is not x for leaf in leaves(expected)), "the model itself must reach parameters"
    before = fingerprint(model)
    private = shadow(model).module
    output = private(x)
    assert all(leaf is x for leaf in leaves(output))
    assert torch.equal(output, expected)
    assert_same(before, fingerprint(model))
    private.linear.register_forward_hook(lambda module, args, out: out * 0)
    if name not in NOT_CALLING_LINEAR:  # hooks on the shadow are met on this path too
        assert not torch.equal(private(x), output)
    assert torch.equal(model(x), expected)


def test_containers_and_objects_of_a_module_are_private_to_any_depth() -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log: dict[str, Any] = {"a": [{"b": ([], {"c"})}]}
            self.alias = self.log["a"]
            self.append = self.alias.append
            self.cache = Box(types.SimpleNamespace(length=0, keys=[]))
            self.recent = deque(maxlen=1)
            self.counter = types.SimpleNamespace(calls=0)
            self.factors = OrderedDict(two=2)

        def forward(self, x: Tensor) -> Tensor:
            self.log["a"][0]["b"][0].append(x)
            self.log["a"][0]["b"][1].add("d")
            self.append(1)
            self.cache.item.length += 1
            self.cache.item.keys.append(x)
            self.recent.append(x)
            self.counter.calls += 1
            self.factors["three"] = 3
            return x

    model = Recorder()
    private = shadow(model).module
    private(torch.ones(1))
    assert model.log == {"a": [{"b": ([], {"c"})}]}
    assert (model.cache.item.length, model.cache.item.keys, len(model.recent)) == (0, [], 0)
    assert list(model.factors) == ["two"]
    assert (model.counter.calls, private.counter.calls) == (0, 1)
    assert private.alias is private.log["a"]
    assert private.alias[1:] == [1]
    assert private.cache.item.length == 1


def test_hooks_over_the_model_see_the_shadow_and_keep_the_users_list() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    seen: list[Any] = [model[1], torch.ones(1, requires_grad=True) * 2]
    calls = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(model[1].weight)
        return output + model[1](output)

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal calls
        calls += 1

    class Scaler(nn.Linear):
        def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self(output)

    scaler = Scaler(3, 3)
    model[0].register_forward_hook(hook)
    model[0].register_forward_hook(count)
    model[1].register_forward_hook(scaler.hook)
    x = torch.randn(2, 3, requires_grad=True)
    expected = model(x)
    private = shadow(model).module
    output = private(x)
    assert torch.equal(output, expected)
    assert all(leaf is x for leaf in leaves(output))
    assert seen[-1] is private[1].weight
    assert len(seen) == 4
    assert calls == 2


def test_a_hook_handle_kept_by_the_model_removes_the_shadows_hook_only() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()
            self.handle = self.inner.register_forward_hook(lambda module, args, output: output + 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            self.handle.remove()
            return out

    model = Once()
    private = shadow(model).module
    assert private(torch.zeros(1)).item() == 1
    assert private(torch.zeros(1)).item() == 0
    assert len(model.inner._forward_hooks) == 1


def test_a_parent_known_only_weakly_is_shadowed_and_kept_alive() -> None:
    parent = Holder(lambda self: lambda own, x: own.scaled(x))
    child = nn.Identity()
    child.parent = weakref.ref(parent)
    private = shadow(child).module
    assert private.parent() is not parent
    x = torch.ones(1, 3, requires_grad=True)
    assert all(leaf is x for leaf in leaves(private.parent()(x)))


def test_enumerations_and_objects_that_own_a_resource_keep_their_identity() -> None:
    class Owner:
        closed = 0

        def __init__(self) -> None:
            self.path = "file"

        def __del__(self) -> None:
            Owner.closed += 1

    model = nn.Identity()
    model.owner, model.config_type = Owner(), nn.Linear
    private = shadow(model).module
    assert private.owner is model.owner
    assert private.config_type is nn.Linear
    del private
    assert Owner.closed == 0
