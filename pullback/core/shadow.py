"""A private shadow of a module tree: new module objects over the same storage, with parameters as constants.

Every explanation runs on a shadow, so hooks and attribute writes land on objects that belong to one call. The
user's model is only read: there is nothing to restore, and threads can share one model.

Built in three passes over the Python objects that the modules refer to: ``explore`` reads them once into
snapshots; ``spread`` marks whatever leads to an object that will be replaced (by reverse reachability, so
cycles are no special case); ``build`` makes the new objects, mutable ones empty first and filled afterwards.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pullback.core.errors import ModelError

__all__ = ["Shadow", "shadow"]


class Shadow(NamedTuple):
    """A private module tree to run and hook, what was unwrapped or kept, and whether it contains scripts."""

    module: nn.Module
    notes: tuple[str, ...]
    scripted: bool


def shadow(model: nn.Module, *, private: bool = False) -> Shadow:
    """A shadow of ``model``: new module objects over the same storage, parameters as constants.

    ``private`` copies parameters, buffers and tensor attributes, for a forward pass that writes into them.
    ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` are unwrapped wherever they occur;
    TorchScript modules are kept as they are (``scripted``). Recurrent modules on CUDA in eval mode run with
    ``training=True, dropout=0.0``, because cuDNN differentiates them only so; values are the same.
    Raises ``ModelError`` for sharded (FSDP, DTensor) and for lazy, not yet initialised parameters.

    >>> model = torch.nn.Linear(3, 2)
    >>> copy = shadow(model).module
    >>> copy is model, copy.weight.data_ptr() == model.weight.data_ptr(), copy.weight.requires_grad
    (False, True, False)
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model is a {type(model).__name__}; expected a torch.nn.Module. "
            "Wrap a plain function in a small module whose forward calls it."
        )
    with torch.inference_mode(False):  # autograd could not save tensors made in the caller's inference mode
        graph = _ObjectGraph(private)
        graph.explore(model)
        graph.spread()
        module = graph.build(model)
    return Shadow(module, tuple(dict.fromkeys(graph.notes)), graph.scripted)


class _Reach(enum.IntEnum):
    """How an object was reached; the higher wins. What only a hook of the user reaches is left the user's."""

    HOOK = 0  # from a hook: modules and parameters are replaced, the user's containers are not looked into
    HELD = 1  # from a function, partial or method: copied only where it leads to something replaced
    OBJECT = 2  # inside a plain object that a module owns: copied
    ATTRIBUTE = 3  # on a module, or in containers there: copied; tensors too where they are private


_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, torch.Size})
_ATOMS |= {torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator}
_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_CONTAINERS = (list, dict, set, deque)
_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_BASES = (OrderedDict, defaultdict, dict, list, set, deque, object)
_EMPTY = frozenset((dict, OrderedDict, set, list))
_GATHER = (
    "expected whole parameters. Gather them with `get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True))` of torch.distributed.checkpoint.state_dict, and explain an unsharded model."
)
_LRU = type(functools.lru_cache(lambda: None))


class _ObjectGraph:
    """The objects reachable from a model, which of them must be replaced, and their replacements."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.notes: list[str] = []
        self.scripted = False
        self.reached: dict[int, _Reach] = {}
        self.objects: list[object] = []  # keeps alive whatever an id is used of
        self.referrers: dict[int, list[int]] = {}
        self.state: dict[int, Any] = {}  # snapshots: another thread may change the original meanwhile
        self.inner: dict[int, nn.Module] = {}  # wrapper -> the module it wraps
        self.replaced: set[int] = set()
        self.new: dict[int, Any] = {}
        self.cloned: set[int] = set()
        self.plain: dict[type, bool] = {}
        self.weakly_held: list[object] = []
        # modules first, for their registered paths; hooks last, as what an attribute reaches is the model's
        self.queues: tuple[list[tuple[Any, _Reach, str]], ...] = ([], [], [])
        self.unfilled: list[tuple[Any, Any]] = []
        self.unfilled_tables: list[tuple[Any, Any]] = []

    # --- pass 1: read ---

    def explore(self, model: nn.Module) -> None:
        self.see(self, model, _Reach.ATTRIBUTE, "")
        while queue := next(filter(None, self.queues), None):
            found, reach, path = queue.pop()
            if isinstance(found, nn.Module):
                self.see_module(found, path)
            elif isinstance(found, Tensor):
                self.see_tensor(found, reach, path)
            else:
                self.see_parts(found, reach, path)

    def see(self, referrer: object, found: Any, reach: _Reach, path: str) -> None:
        kind = type(found)
        if kind in _ATOMS:
            return
        key = id(found)
        self.referrers.setdefault(key, []).append(id(referrer))
        if self.reached.get(key, -1) >= reach or (reach == _Reach.HOOK and isinstance(found, _CONTAINERS)):
            return
        self.objects.append(found)
        self.reached[key] = reach
        rank = 0 if isinstance(found, nn.Module) else 2 if reach == _Reach.HOOK else 1
        self.queues[rank].append((found, reach, path))

    def see_module(self, module: nn.Module, path: str) -> None:
        key = id(module)
        if key in self.state or key in self.new or key in self.inner:
            return
        where = f"'{path}'" if path else "the model"
        lineage = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")}
        if lineage & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ModelError(f"{where} is wrapped by FSDP; {_GATHER}")
        self.replaced.add(key)
        if isinstance(module, torch.jit.ScriptModule):
            self.scripted = True
            self.new[key] = module
            self.notes.append(f"{where} is a ScriptModule and was kept as it is: it cannot be hooked inside.")
            return
        if wrapper := lineage & _WRAPPERS.keys():
            (name,) = wrapper
            self.inner[key] = inner = vars(module)["_modules"][_WRAPPERS[name]]
            by = "torch.compile" if name == "OptimizedModule" else name
            by += ", whose own hooks do not run." if vars(module)["_forward_hooks"] else "."
            self.notes.append(f"{where} was unwrapped from {by}")
            self.see(module, inner, _Reach.ATTRIBUTE, path)
            return
        state = self.state[key] = dict(vars(module))
        if state.get("_compiled_call_impl") is not None:
            state["_compiled_call_impl"] = None
            self.notes.append(f"{where} was compiled in place by module.compile() and runs uncompiled.")
        for name, value in state.items():
            if type(value) in _EMPTY and not value:
                self.replace(value, type(value)())
            elif name == "_modules":
                for child_name, child in self.see_table(value).items():
                    self.see(module, child, _Reach.ATTRIBUTE, f"{path}.{child_name}" if path else child_name)
            elif name in ("_parameters", "_buffers"):
                for tensor_name, tensor in self.see_table(value).items():
                    if name == "_buffers" and type(tensor) is Tensor and id(tensor) not in self.new:
                        self.replace(tensor, _alias(tensor))  # so `.data = ...` in forward is private
                    if isinstance(tensor, Tensor):
                        self.see_tensor(tensor, _Reach.ATTRIBUTE, f"{path}.{tensor_name}".lstrip("."))
            elif name in _HOOKS:
                for hook in self.see_table(value).values():
                    self.see(value, hook, _Reach.HOOK, path)
            elif type(value) not in _ATOMS:
                self.see(module, value, _Reach.ATTRIBUTE, path)

    def see_table(self, table: dict[Any, Any]) -> dict[Any, Any]:
        """Mark a registry of a module as replaced, filled later from the snapshot that is returned."""
        self.reached[id(table)] = _Reach.ATTRIBUTE
        self.objects.append(table)
        self.replaced.add(id(table))
        self.state[id(table)] = (snapshot := dict(table), {})
        return snapshot

    def see_tensor(self, tensor: Tensor, reach: _Reach, path: str) -> None:
        key = id(tensor)
        if torch.nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"'{path}' is an uninitialised parameter of a lazy module; expected known shapes. "
                "Run the model once first: `model(inputs)`."
            )
        if any(base.__name__ == "DTensor" for base in type(tensor).__mro__):
            raise ModelError(f"'{path}' is a DTensor; {_GATHER}")
        if isinstance(tensor, nn.Parameter):
            if key not in self.new and (self.private or tensor.requires_grad or tensor.is_inference()):
                self.replace(tensor, _constant(tensor, self.private))
        elif self.private and reach == _Reach.ATTRIBUTE:
            if key not in self.cloned:
                self.cloned.add(key)
                self.replace(tensor, tensor.detach().clone())
        elif key not in self.new and reach > _Reach.HOOK and (tensor.requires_grad or tensor.is_inference()):
            self.replace(tensor, _alias(tensor))

    def replace(self, old: object, new: object) -> None:
        self.objects.append(old)
        self.replaced.add(id(old))
        self.new[id(old)] = new

    def see_parts(self, found: Any, reach: _Reach, path: str) -> None:
        key, within, owned = id(found), min(reach, _Reach.HELD), reach >= _Reach.OBJECT
        if isinstance(found, (*_CONTAINERS, tuple, frozenset)):
            extra = dict(found.__dict__) if hasattr(found, "__dict__") else {}
            items = dict(found) if isinstance(found, dict) else list(found)
            self.state[key] = (items, extra)
            values = items.values() if isinstance(items, dict) else ()
            self.see_each(found, (*items, *values, *extra.values()), reach, path)
            if owned and isinstance(found, _CONTAINERS):
                self.replaced.add(key)
        elif isinstance(found, types.FunctionType):
            compiled = vars(found).get("_torchdynamo_orig_callable")
            if compiled is not None:  # hooks do not reach into compiled code
                self.state[key] = compiled
                self.replaced.add(key)
                self.see(found, compiled, within, path)
                if not vars(found).get("_torchdynamo_disable"):
                    self.notes.append(
                        f"{found.__name__} was unwrapped from torch.compile and runs uncompiled."
                    )
                return
            parts = (found.__closure__, found.__defaults__, (found.__kwdefaults__ or {}).values())
            self.see_each(
                found, (*vars(found).values(), *chain(*(part or () for part in parts))), within, path
            )
        elif isinstance(found, types.CellType):
            with contextlib.suppress(ValueError):  # an empty cell
                self.see(found, found.cell_contents, within, path)
        elif isinstance(found, (types.MethodType, types.BuiltinMethodType)):
            self.see_each(found, (getattr(found, "__func__", None), found.__self__), within, path)
        elif isinstance(found, functools.partial):
            parts = (found.func, *found.args, *found.keywords.values(), *vars(found).values())
            self.see_each(found, parts, within, path)
        elif isinstance(found, _LRU):
            self.see(found, found.__wrapped__, within, path)
        elif type(found) is weakref.ref:
            referent = found()
            if isinstance(referent, (nn.Module, Tensor)):
                self.see(found, referent, within, path)
            elif referent is not None:  # replaced only where something else, holding it, replaces it
                self.referrers.setdefault(id(referent), []).append(key)
        elif self.is_plain(found):
            state = self.state[key] = dict(object.__getattribute__(found, "__dict__"))
            self.see_each(found, state.values(), min(reach, _Reach.OBJECT), path)
            self.replaced.update({key} if owned and state else ())

    def see_each(self, referrer: object, parts: Iterable[Any], reach: _Reach, path: str) -> None:
        for part in parts:
            self.see(referrer, part, reach, path)

    def is_plain(self, found: object) -> bool:
        """Whether copying attributes copies an instance: of a Python class that has no say in its copying."""
        kind = type(found)
        if kind not in self.plain:
            own = not kind.__dictoffset__ or any(vars(base).get("__slots__") for base in kind.__mro__)
            own = own or (kind.__reduce_ex__, kind.__reduce__) != (object.__reduce_ex__, object.__reduce__)
            own = own or hasattr(kind, "__del__") or issubclass(kind, (type, enum.Enum, torch.fx.Graph))
            self.plain[types.SimpleNamespace] = True
            self.plain.setdefault(kind, False)
            with contextlib.suppress(TypeError):  # a C type makes its own instances
                self.plain[kind] |= not own and object.__new__(kind) is not None
        return self.plain[kind]

    # --- pass 2: what leads to a replaced object is replaced ---

    def spread(self) -> None:
        frontier = list(self.replaced)
        while frontier:
            for referrer in self.referrers.get(frontier.pop(), ()):
                if referrer not in self.replaced:
                    self.replaced.add(referrer)
                    frontier.append(referrer)

    # --- pass 3: make ---

    def build(self, model: nn.Module) -> nn.Module:
        module: nn.Module = self.replacement(model)
        while queue := self.unfilled or self.unfilled_tables:  # tables last: keys are hashed by attributes
            self.fill(*queue.pop())
        vars(module).update({"_weakly_held": self.weakly_held} if self.weakly_held else {})
        return module

    def replacement(self, old: Any) -> Any:
        key = id(old)
        if key not in self.replaced:
            return old
        if key not in self.new:
            self.new[key] = self.make(old)
        return self.new[key]

    def make(self, old: Any) -> Any:
        """The new object for ``old``: a mutable one still empty and queued, an immutable one complete."""
        key, replacement = id(old), self.replacement
        if key in self.inner:
            return replacement(self.inner[key])
        if isinstance(old, weakref.ref):
            self.weakly_held.append(replacement(old()))
            return weakref.ref(self.weakly_held[-1])
        if isinstance(old, (*_CONTAINERS, nn.Module)):
            base: Any = next(base for base in _BASES if isinstance(old, base))
            new: Any = base.__new__(type(old))
        elif isinstance(old, (tuple, frozenset)):
            base = tuple if isinstance(old, tuple) else frozenset
            return base.__new__(type(old), map(replacement, self.state[key][0]))
        elif isinstance(old, types.FunctionType):
            if key in self.state:
                return replacement(self.state[key])
            closure = old.__closure__ and tuple(map(replacement, old.__closure__))
            new = types.FunctionType(old.__code__, old.__globals__, old.__name__, None, closure)
            new.__qualname__ = old.__qualname__
        elif isinstance(old, (types.MethodType, types.BuiltinMethodType)):
            owner = replacement(old.__self__)
            if isinstance(old, types.BuiltinMethodType) or id(old.__self__) in self.inner:
                return getattr(owner, old.__name__)
            return types.MethodType(replacement(old.__func__), owner)
        elif isinstance(old, _LRU):
            return functools.lru_cache(**old.cache_parameters())(replacement(old.__wrapped__))
        elif isinstance(old, functools.partial):
            new = type(old)(len)
        elif isinstance(old, (types.CellType, types.SimpleNamespace)):
            new = type(old)()
        else:
            new = object.__new__(type(old))
        (self.unfilled_tables if isinstance(new, (dict, set)) else self.unfilled).append((old, new))
        return new

    def each(self, state: dict[str, Any]) -> dict[str, Any]:
        same, new = self.replaced.isdisjoint, self.replacement
        return {name: value if same((id(value),)) else new(value) for name, value in state.items()}

    def fill(self, old: Any, new: Any) -> None:
        if isinstance(old, types.CellType):
            new.cell_contents = self.replacement(old.cell_contents)
        elif isinstance(old, types.FunctionType):
            new.__defaults__ = old.__defaults__ and tuple(map(self.replacement, old.__defaults__))
            new.__kwdefaults__ = old.__kwdefaults__ and self.each(old.__kwdefaults__)
            vars(new).update(self.each(vars(old)))
        elif isinstance(old, functools.partial):
            func, *args = map(self.replacement, (old.func, *old.args))
            new.__setstate__((func, tuple(args), self.each(old.keywords), self.each(vars(old))))
        elif isinstance(old, _CONTAINERS):
            self.fill_container(old, new)
        else:
            state = self.each(self.state[id(old)])
            if isinstance(old, nn.RNNBase) and not old.training:
                weights = (*state.get("_flat_weights", ()), *old.parameters())
                if any(isinstance(one, Tensor) and (one.is_cuda or one.is_meta) for one in weights):
                    state["training"], state["dropout"] = True, 0.0  # meta: loaded when it runs
            object.__getattribute__(new, "__dict__").update(state)

    def fill_container(self, old: Any, new: Any) -> None:
        items, attributes = self.state[id(old)]
        if attributes:
            vars(new).update(self.each(attributes))
        if isinstance(old, dict):
            insert = OrderedDict.__setitem__ if isinstance(old, OrderedDict) else dict.__setitem__
            for name, value in items.items():
                insert(new, self.replacement(name), self.replacement(value))
            if isinstance(old, defaultdict):
                new.default_factory = old.default_factory
        elif isinstance(old, deque):
            deque.__init__(new, map(self.replacement, items), old.maxlen)
        else:
            (list.extend if isinstance(old, list) else set.update)(new, map(self.replacement, items))


def _constant(parameter: nn.Parameter, private: bool = False) -> Tensor:
    """A parameter of the same class over the same storage (or a copy) that does not require grad."""
    alias = parameter.detach().clone() if private else _alias(parameter)
    if type(alias) is type(parameter) or type(parameter) is nn.Parameter:
        constant: Tensor = nn.Parameter(alias, requires_grad=False)
    else:
        constant = torch.Tensor._make_subclass(type(parameter), alias, False)
    vars(constant).update(vars(parameter))
    return constant


def _alias(tensor: Tensor) -> Tensor:
    """The same storage in a tensor that autograd may save: outside the graph, and no inference tensor."""
    if not tensor.is_inference():
        return tensor.detach()
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        return tensor.clone()
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    alias = alias.conj() if tensor.is_conj() else alias
    return alias._neg_view() if tensor.is_neg() else alias
