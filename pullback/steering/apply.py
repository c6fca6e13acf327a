"""Steering a model while a context is open: forward hooks on the user's own model, removed on exit.

Everywhere else the package runs a private shadow; here the user's own ``generate`` has to be steered. Parameters,
buffers and flags are not touched, block outputs are replaced and never written to. Hooks act only in the thread
that opened the context, so that threads can steer one model in different ways.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pullback.core.errors import MethodError, ModelError, SiteError

from .blocks import find_blocks
from .positions import Chunk, PositionTracker
from .scope import Scope, check_rows, check_scope, for_batch, in_scope
from .statistics import SteeringStatistics, Tally
from .vector import SteeringVector

__all__ = ["Gate", "Scale", "Scope", "Steering"]

Scale: TypeAlias = Literal["relative", "fit", "absolute"]
Gate: TypeAlias = "Callable[[Tensor, Tensor], Tensor] | Tensor"

# torch numbers hooks with a counter that two threads may read at once, and hooks of equal number replace each other
_REGISTERING = threading.Lock()


class Steering:
    """A context in which a model is steered: h becomes h + s r v, rescaled to the norm of h, token by token.

    Args:
        vector: the directions v by block, added to the block's output.
        model: any transformer; an encoder-decoder is steered in its decoder, a vision-language model in its
            language model.
        strength: s; negative to steer the other way, 0 leaves the model bit for bit.
        scale: r is the token's norm ||h|| ("relative"), the fitted length ("fit") or 1 ("absolute").
        scope: "all" tokens, those of the "prompt", those "generated" after it, or a bool mask (length,) or
            (batch, length) over absolute positions, padding included; positions beyond the mask are left alone.
            Padding never is steered. A prompt is what the first pass, or a pass without cached tokens, holds.
        preserve_norm: rescale to ||h||.
        gate: which examples are steered: a bool tensor (batch,), or a callable (hidden (batch, length, width),
            real (batch, length)) -> (batch,) bool, asked once per prompt about the lowest steered block's output and
            kept while generating.
        blocks: dotted path of the list of blocks, where it is not found.
        allow_other_model: steer a model of another architecture where widths and blocks agree.

    Contexts nest; the hooks of the inner one run after those of the outer one. With ``preserve_norm`` nesting is not
    a sum: for that, steer with ``a * v + b * w``. Passes of other threads, ``generate`` started in one among them,
    run unsteered; open the context in the thread that runs the model.

    Raises ModelError for compiled and scripted models and for a model that the vector is not for, MethodError for
    parameters out of range, SiteError where no blocks are found.
    """

    def __init__(
        self,
        vector: SteeringVector,
        model: nn.Module,
        strength: float = 1.0,
        scale: Scale = "relative",
        scope: Scope = "all",
        preserve_norm: bool = True,
        gate: Gate | None = None,
        blocks: str | None = None,
        allow_other_model: bool = False,
    ) -> None:
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not math.isfinite(strength):
            raise MethodError(f"strength={strength!r}; expected a finite number such as 0.4.")
        if scale not in get_args(Scale):
            raise MethodError(f"scale={scale!r}; expected one of {', '.join(map(repr, get_args(Scale)))}.")
        check_scope(scope)
        if gate is not None and not callable(gate):
            check_rows(gate)
        _refuse_compiled(model)
        vector.check(model, blocks=blocks, allow_other_model=allow_other_model)
        self.vector, self.strength, self.scale, self.scope = vector, float(strength), scale, scope
        self.preserve_norm, self.gate = preserve_norm, gate
        self._blocks = find_blocks(model, blocks)
        config = getattr(self._blocks.model, "config", None)
        self._tracker = PositionTracker(bool(getattr(config, "is_encoder_decoder", False)))
        self._stack: ExitStack | None = None
        self._start()

    def _start(self) -> None:
        self._owner = threading.get_ident()
        self._calls = self._others = 0
        self._width = self.vector.width
        self._norms = {layer: float(one.norm()) for layer, one in self.vector.directions.items()}
        self._tallies = {layer: Tally(norm, self.preserve_norm) for layer, norm in self._norms.items()}
        self._placed: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._rows: Tensor | None = None
        self._chosen: tuple[Chunk | None, dict[torch.device, Tensor | bool]] = (None, {})
        self._tracker.chunk = None
        self._tracker.reset()

    def __enter__(self) -> Steering:
        if self._stack is not None:
            raise MethodError(
                "this steering context is open already; call vector.apply(...) again to nest another."
            )
        _refuse_compiled(self._blocks.model)
        self._start()
        found = self._blocks
        with ExitStack() as stack, _REGISTERING:
            if found.decoder is not found.model:
                before = self._in_thread(self._tracker.outer)
                stack.callback(found.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            before = self._in_thread(self._tracker.inner)
            stack.callback(found.decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
            for layer in self.vector.layers:
                stack.callback(found.modules[layer].register_forward_hook(self._hook(layer)).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            with _REGISTERING:
                stack.close()
        self._chosen = (None, {})
        self._placed.clear()
        if kind is None and not self._calls:
            others = (
                f"{self._others} block calls of other threads were left alone; open the context in the thread that "
                "runs the model"
                if self._others
                else "the model was not run, or runs a compiled copy of itself (pass disable_compile=True to generate)"
            )
            warnings.warn(f"nothing was steered: no steered block ran; {others}.", stacklevel=2)

    def reset(self) -> None:
        """The next pass starts a new prompt, as before a new turn on a cache that is used on."""
        self._tracker.reset()

    @property
    def statistics(self) -> SteeringStatistics:
        """What was steered since the context was entered; also after it."""
        results = {layer: tally.result() for layer, tally in self._tallies.items()}
        steered = {layer: result for layer, result in results.items() if result is not None}
        rows = None if self._rows is None else self._rows.clone()
        return SteeringStatistics(steered, self._calls, self._others, rows)

    def _in_thread(self, hook: Callable[..., None]) -> Callable[..., None]:
        def guarded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == self._owner:
                hook(module, args, kwargs)

        return guarded

    def _hook(self, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != self._owner:
                self._others += 1
                return None
            self._calls += 1
            key, hidden = self._hidden(output, layer)
            chosen = self._choose(hidden)
            if self.strength == 0.0 or self._norms[layer] == 0.0 or chosen is False:
                return None
            moved = self._moved(hidden, layer, chosen if isinstance(chosen, Tensor) else None)
            return _replaced(output, key, moved)

        return steer

    def _moved(self, hidden: Tensor, layer: int, selected: Tensor | None) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        h, v = hidden.to(dtype), self._direction(layer, hidden.device, dtype)
        norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
        if self.scale == "relative":
            step: Tensor | float = self.strength * norm
            moved = torch.addcmul(h, norm, v, value=self.strength)
        else:
            step = self.strength * (self.vector.scales[layer] if self.scale == "fit" else 1.0)
            moved = torch.add(h, v, alpha=step)
        reached = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
        self._tallies[layer].add(norm, reached, step, selected)
        if self.preserve_norm:
            moved = moved * (norm / reached.clamp_min(1e-12))
        moved = moved.to(hidden.dtype)
        return moved if selected is None else torch.where(selected, moved, hidden)

    def _direction(self, layer: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (layer, device, dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # else autograd could not save it when the context is used on
                self._placed[key] = self.vector.directions[layer].to(device, dtype)
        return self._placed[key]

    def _hidden(self, output: Any, layer: int) -> tuple[Any, Tensor]:
        """The hidden state in a block's output, and the key it stands under."""
        key: Any = None
        value = output
        if isinstance(output, tuple | list) and output:
            key, value = 0, output[0]
        elif isinstance(output, Mapping) and output:
            key, value = next(iter(output.items()))
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[-1] != self._width:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SiteError(
                f'block {layer} of "{self._blocks.path}" returned {shape} where a hidden state (batch, length, '
                f'{self._width}) was expected. Name the list of blocks: blocks="dotted.path".'
            )
        return key, value

    def _choose(self, hidden: Tensor) -> Tensor | bool:
        """Which tokens of this pass: all, none, or (batch, length, 1) bool; worked out once per pass."""
        chunk = self._tracker.chunk
        if (
            chunk is None or chunk.length != hidden.shape[1]
        ):  # a block run by itself, or with tokens put before
            chunk = self._tracker.chunk = Chunk(length=hidden.shape[1], prompt_length=hidden.shape[1])
        known, by_device = self._chosen
        if known is not chunk:
            by_device = {}
            self._chosen = (chunk, by_device)
            if self.gate is not None and (chunk.fresh or self._rows is None):
                self._rows = self._decide(hidden, chunk)
        if hidden.device not in by_device:
            selected = self._select(chunk, hidden)
            by_device[hidden.device] = selected
        return by_device[hidden.device]

    def _select(self, chunk: Chunk, hidden: Tensor) -> Tensor | bool:
        batch, length, _ = hidden.shape
        selected = in_scope(self.scope, chunk, batch, length, hidden.device)
        if self._rows is not None:
            rows = for_batch(self._rows, batch, "the gate's answer")
            if not bool(rows.any()):
                return False
            if not bool(rows.all()):
                of_rows = rows.to(hidden.device)[:, None].expand(batch, length)
                selected = (
                    selected & of_rows if isinstance(selected, Tensor) else of_rows if selected else False
                )
        if chunk.real is not None and selected is not False:
            real = chunk.real.to(hidden.device)
            if len(real) == batch:
                selected = real & selected
        return selected[..., None] if isinstance(selected, Tensor) else selected

    def _decide(self, hidden: Tensor, chunk: Chunk) -> Tensor:
        if isinstance(self.gate, Tensor):
            return self.gate.cpu()
        assert self.gate is not None
        real = chunk.real
        if real is None or real.shape != hidden.shape[:2]:
            real = torch.ones(hidden.shape[:2], dtype=torch.bool)
        with torch.no_grad():
            answer = self.gate(hidden.detach(), real.to(hidden.device))
        return check_rows(answer, len(hidden)).cpu()


_COMPILED = (
    "{}: hooks that come after compiling are ignored, so steering would silently do nothing. Steer the model that "
    "is not compiled: {}."
)


def _refuse_compiled(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    for path, module in model.named_modules():
        where = f'module "{path}"' if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{where} is a ScriptModule, which takes no hooks. Steer it before torch.jit.")
        if hasattr(module, "_orig_mod"):
            out = "vector.apply(model._orig_mod, ...)" if not path else f"model.{path}._orig_mod in its place"
            raise ModelError(_COMPILED.format(f"{where} is compiled", out))
        if getattr(module, "_compiled_call_impl", None) is not None:
            out = f"set {f'model.{path}' if path else 'model'}._compiled_call_impl = None to undo .compile()"
            raise ModelError(_COMPILED.format(f"{where} is compiled", out))
        if hasattr(module.forward, "_torchdynamo_orig_callable"):
            raise ModelError(
                _COMPILED.format(f"the forward of {where} is compiled", "build it without torch.compile")
            )
        if "_compiled_call" in vars(module):  # transformers, generating with a static cache
            out = "`del model._compiled_call` and pass disable_compile=True to generate"
            raise ModelError(_COMPILED.format(f"generate has compiled {where}", out))


def _replaced(output: Any, key: Any, value: Tensor) -> Any:
    """The block's output with another hidden state; the output itself is left as it is."""
    if key is None:
        return value
    if isinstance(output, tuple):
        entries = (value, *output[1:])
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
    changed = copy.copy(output)
    changed[key] = value
    return changed
