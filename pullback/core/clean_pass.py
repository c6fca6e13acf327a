"""The first pass of a posed model: one forward on the clean inputs that tells everything the evaluations need."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .edits import capture
from .embeddings import find_embeddings
from .errors import InputError, SiteError
from .inputs import ModelInputs
from .live_pass import LivePass
from .points import Point, map_leaves
from .posed import kept_random_state, random_state_lock
from .resources import AllocationMeter, PeakMeter, Resources, is_out_of_memory
from .sites import Site

__all__ = ["CleanPass", "concatenated"]


class CleanPass:
    """The clean point, the number of calls of the site, the output, and what a row allocates.

    Writes into ``protected`` storages raise SharedWriteError before they happen. A ``live`` pass keeps the graph of
    this one where it can.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        read: ModelInputs,
        site: Site,
        resources: Resources,
        protected: frozenset[int] = frozenset(),
        live: LivePass | None = None,
    ) -> None:
        self.module = module
        self.read = read
        self.site = site
        self.asked_site = str(site)
        self.resources = resources
        self.protected = protected
        self.live = live
        self.stochastic = False
        self.batch_norms = False
        self.generators: tuple[torch.Generator, ...] = ()
        self.outputs: list[Any] = []
        self.points: list[Point] = []

    def run(self) -> None:
        """Run the whole batch, in chunks where the user bounded them."""
        batch = self.read.batch
        size = self.resources.chunk or batch
        if self.resources.budget is not None:
            size = min(size, self._fitting())
        start, seeded = 0, self.stochastic
        while start < batch:
            rows = torch.arange(start, min(batch, start + size))
            try:
                self._run_rows(None if len(rows) == batch else rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise self._explained(error) from error
                if len(rows) == 1:
                    raise
                size = max(1, len(rows) // 2)
                continue
            if self.stochastic and not seeded:
                # again with the draws that every later evaluation will see, so that clean values belong to them
                self.outputs.clear()
                self.points.clear()
                if self.live is not None:
                    self.live.drop()
                seeded, start = True, 0
                continue
            start += len(rows)

    def _fitting(self) -> int:
        with PeakMeter() as meter:
            self._run_rows(torch.tensor([0]))
        self.outputs.clear()
        self.points.clear()
        return max(1, int(self.resources.budget or 0) // max(1, int(meter.peak)))

    def _run_rows(self, rows: Tensor | None) -> None:
        seeded = self.stochastic
        live = None if seeded or rows is not None else self._usable_live()
        meter = AllocationMeter(self.protected) if self.resources.row_bytes is None else nullcontext()
        with (
            torch.no_grad(),  # a live pass turns gradients on again
            kept_random_state(0, self.generators) if seeded else random_state_lock,
            ExitStack() as stack,
        ):
            states = [] if seeded else _random_states()
            found: Any = None
            if self.site.kind == "embeddings":
                assert isinstance(self.module, nn.Module)
                edit = None if live is None else live.substitute
                found = stack.enter_context(find_embeddings(self.module, self.read, edit))
            elif self.site.kind == "module":
                assert isinstance(self.module, nn.Module)
                # every call is read, so that an error can say how many there were
                every = dataclasses.replace(self.site, call=None)
                found = stack.enter_context(capture(self.module, [every]))[every]
            leaves = {}
            if live is not None:
                assert isinstance(self.module, nn.Module)
                leaves = stack.enter_context(live.running(self.module, self.site, self.read))
            args, kwargs = self.read.rows(rows, leaves)
            stack.enter_context(meter)
            try:
                output = self.module(*args, **kwargs)
            finally:
                # other threads may draw too, so the state counts only where this forward was seen to draw
                if not seeded and isinstance(meter, AllocationMeter) and meter.draws:
                    self.stochastic = _restored(states) or bool(meter.generators)
                    self.generators = tuple(meter.generators)
                    for own, state in meter.generators.items():
                        own.set_state(state)
        if isinstance(meter, AllocationMeter):
            self.resources.learn(meter, self.read.batch if rows is None else len(rows))
            self.batch_norms = meter.batch_norms
        if self.site.kind == "embeddings":
            self.site, point = found.resolve()
            self.points.append(point)
        elif self.site.kind == "module":
            self.points.append(self._captured(found))
        self.outputs.append(output)
        if live is not None:
            live.finish(output)

    def _usable_live(self) -> LivePass | None:
        """The live pass where this one may be it: a few rows, in one piece, without limits on memory."""
        limited = self.resources.budget is not None or self.resources.chunk is not None
        if self.live is None or limited or not self.live.suits(self.site, self.read):
            return None
        return self.live

    def _captured(self, values: list[Tensor]) -> Tensor:
        path = self.site.path
        if self.site.call is None and len(values) > 1:
            choices = ", ".join(f'"{path}@{call}"' for call in range(len(values)))
            raise SiteError(
                f'"{path}" ran {len(values)} times in one forward pass. Choose one call: {choices}.'
            )
        if not values:
            raise SiteError(
                f'"{self.site}" never ran in this forward pass. Choose a module that the forward uses.'
            )
        if self.site.call is not None and self.site.call >= len(values):
            raise SiteError(
                f'"{path}" ran {len(values)} times; calls are counted from 0, so "{self.site}" does not exist.'
            )
        value = values[self.site.call or 0]
        if not value.is_floating_point() and not value.is_complex():
            raise SiteError(
                f'the value at "{self.site}" is {value.dtype}; only floating values can be explained.'
            )
        return value

    def point(self) -> Point:
        if self.site.kind == "input":
            names = (self.site.leaf,) if self.site.leaf else self.read.explained
            found: dict[str, Tensor] = {
                str(name): self.read.leaf[str(name)].detach().clone() for name in names
            }
            return found if len(found) > 1 else next(iter(found.values()))
        if len(self.points) == 1:
            return self.points[0]
        return map_leaves(lambda *parts: torch.cat(parts), *self.points)

    def _explained(self, error: RuntimeError | MemoryError) -> Exception:
        """An input of the wrong dtype or device said in the user's words; other errors as they are."""
        if not isinstance(self.module, nn.Module):
            return error
        parameter = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if parameter is not None and not self.read.explained and re.search(r"\bd?type\b", str(error)):
            name, leaf = next(iter(self.read.leaf.items()))
            return InputError(
                f'input "{name}" is {leaf.dtype}, the model\'s parameters are {parameter.dtype}, and the forward '
                f"failed: {error}. If it holds numbers rather than token ids, convert it: x.to({parameter.dtype})."
            )
        for name in self.read.explained if parameter is not None else ():
            leaf = self.read.leaf[name]
            assert parameter is not None
            if leaf.dtype != parameter.dtype:
                return InputError(
                    f'input "{name}" is {leaf.dtype}, the model\'s parameters are {parameter.dtype}, and the '
                    f"forward failed: {error}. Convert one of them, for example x.to({parameter.dtype})."
                )
            if leaf.device != parameter.device:
                return InputError(
                    f'input "{name}" is on {leaf.device}, the model on {parameter.device}. '
                    f'Move the input: x.to("{parameter.device}").'
                )
        return error


def concatenated(outputs: Sequence[Any]) -> Any:
    """Outputs of several chunks of the batch as one: tensors joined along the batch, the rest from the first."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if first.dim() else first
    if hasattr(first, "items"):
        joined = copy.copy(first)
        for key in list(first.keys()):
            joined[key] = concatenated([output[key] for output in outputs])
        return joined
    if isinstance(first, list) and first and not isinstance(first[0], Tensor):
        return [entry for output in outputs for entry in output]
    if isinstance(first, (list, tuple)):
        parts = [concatenated([output[index] for output in outputs]) for index in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if any(isinstance(part, Tensor) for part in getattr(first, "__dict__", {}).values()):
        joined = copy.copy(first)
        for name in vars(first):
            object.__setattr__(joined, name, concatenated([vars(output)[name] for output in outputs]))
        return joined
    return first


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _restored(states: list[Tensor]) -> bool:
    """Whether the forward drew from the global generators; if so they are put back."""
    after = _random_states()
    if all(torch.equal(before, now) for before, now in zip(states, after, strict=False)):
        return False
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
    return True
