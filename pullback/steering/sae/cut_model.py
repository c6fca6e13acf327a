"""A model cut at a site: its value there, and the gradient of the loss, without the logits of a whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pullback.core.edits import Edit, edit
from pullback.core.errors import SiteError
from pullback.core.inputs import ModelInputs
from pullback.core.noise import generator
from pullback.core.pose import on_shadow, require_settled
from pullback.core.posed import gradient_of, gradients_enabled, kept_random_state
from pullback.core.resources import Resources
from pullback.core.sites import Site
from pullback.core.target_outputs import main_tensor

from .prediction_loss import Loss, chunked_loss, plan_prediction, summed_loss

__all__ = ["CutModel", "SiteGradient"]

_LOGITS_COPIES = 3  # the logits, their softmax and their gradient


class SiteGradient(NamedTuple):
    """The value at the site, the gradient of the summed loss there, of the same shape, and the loss (scalar)."""

    value: Tensor
    gradient: Tensor
    loss: Tensor


class _Reached(BaseException):
    """Ends a forward whose rest is not needed; no Exception, so that no model catches it."""


class CutModel:
    """A private shadow of a model, run up to a site, or on from there and back to it.

    Below the site nothing is recorded: the shadow's weights are constants. A head (the output embeddings) whose product
    is the logits runs on some tokens at a time; any other model on some examples at a time.

    Args:
        model: in eval mode.
        inputs: a call, of which the first example is run once to find the site and the head.
        site: where.
        loss: see ``prediction_loss``.
        budget: bytes of logits at once.

    Attributes: width, dtype and device of the value at the site.
    """

    def __init__(self, model: nn.Module, inputs: ModelInputs, site: str, loss: Loss, budget: int) -> None:
        require_settled(model, False)
        self.loss = loss
        self.asked_site = str(site)
        one = {name: leaf[:1] if name in inputs.examples else leaf for name, leaf in inputs.leaf.items()}
        with torch.inference_mode(False), torch.no_grad():
            first = dataclasses.replace(inputs, leaf=one, batch=1)
            clean = on_shadow(model, first, Site.parse(site), Resources(), [])
            assert isinstance(clean.module, nn.Module)
            self.module, self.site = clean.module, clean.site
            self._stochastic, self._generators = clean.stochastic, clean.generators
            point = clean.point()
            if not isinstance(point, Tensor) or point.dim() < 2:
                what = tuple(point.shape) if isinstance(point, Tensor) else "several tensors"
                raise SiteError(
                    f'the value at "{site}" is {what}; expected one tensor (batch, ..., width). Name another site.'
                )
            self._input = None
            if self.site.kind == "input":
                self._input = self.site.leaf or inputs.explained[0]
            self.width, self.dtype, self.device = point.shape[-1], point.dtype, point.device
            self._head: tuple[Site, nn.Module] | None = None
            self._examples = self._tokens = 1
            try:
                logits = main_tensor(clean.outputs[0])
            except ValueError:
                return  # a custom loss may read another part; one example at a time
            held = _LOGITS_COPIES * logits.element_size()
            self._examples = max(1, budget // (held * max(1, logits.numel())))
            self._tokens = max(1, budget // (held * logits.shape[-1]))
            if not callable(loss):
                self._head = self._find_head(first, logits)

    def value(self, inputs: ModelInputs) -> Tensor:
        """The value at the site, by a forward that ends there."""
        if self._input is not None:
            return inputs.leaf[self._input].detach().clone()
        with torch.inference_mode(False), torch.no_grad():
            return self._reached(inputs, self.site).clone()

    def gradient(self, inputs: ModelInputs, labels: Tensor | None, draw: tuple[int, str]) -> SiteGradient:
        """Value, gradient and loss, by a forward and a backward from the loss to the site.

        ``draw``: seed and name of the uniform numbers that draw labels.
        """
        with gradients_enabled():
            if self._head is not None:
                return self._by_tokens(inputs, labels, draw)
            size = self._examples
            parts = [
                self._by_examples(inputs, labels, draw, slice(first, min(first + size, inputs.batch)))
                for first in range(0, inputs.batch, size)
            ]
        values, gradients, losses = zip(*parts, strict=True)
        return SiteGradient(torch.cat(values), torch.cat(gradients), torch.stack(losses).sum())

    # --- inside ---

    def _by_tokens(self, inputs: ModelInputs, labels: Tensor | None, draw: tuple[int, str]) -> SiteGradient:
        assert self._head is not None
        site, head = self._head
        variable, edits = self._variable()
        hidden = self._reached(inputs, site, variable, edits)
        named = _named(inputs, labels)
        places = torch.Size((*hidden.shape[:-1], 0))
        assert isinstance(self.loss, str)
        plan = plan_prediction(
            self.loss, places, named, inputs.attention_mask, _draws(self.loss, places, draw, hidden.device)
        )
        loss, downwards = chunked_loss(head, hidden, plan, self._tokens)
        (value,) = variable
        if not hidden.requires_grad:
            raise self._unrelated()
        (found,) = torch.autograd.grad(hidden, value, downwards, allow_unused=True)
        if found is None:
            raise self._unrelated()
        return SiteGradient(value.detach(), found, loss)

    def _by_examples(
        self, inputs: ModelInputs, labels: Tensor | None, draw: tuple[int, str], rows: slice
    ) -> SiteGradient:
        index = torch.arange(rows.start, rows.stop)
        variable, edits = self._variable()
        logits = main_tensor(self._run(inputs, index, variable, edits))
        whole = _named(inputs, labels)
        some = {
            name: value[rows] if name in inputs.examples or name == "labels" else value
            for name, value in whole.items()
        }
        plan = None
        if isinstance(self.loss, str):
            places = torch.Size((inputs.batch, *logits.shape[1:]))
            draws = _draws(self.loss, places, draw, logits.device)
            mask = inputs.attention_mask
            plan = plan_prediction(
                self.loss,
                logits.shape,
                some,
                None if mask is None else mask[rows],
                None if draws is None else draws[rows],
            )
        loss = summed_loss(self.loss, logits, some, plan)
        (value,) = variable
        found = gradient_of(loss, value, self.site)
        assert isinstance(found, Tensor)
        return SiteGradient(value.detach(), found, loss.detach())

    def _variable(self) -> tuple[list[Tensor], list[tuple[Site, Edit]]]:
        """Where the site's value is kept as a leaf of the graph, and the edit that does it."""
        kept: list[Tensor] = []

        def substitute(value: Tensor, call: int) -> Tensor:
            kept.append(value.detach().clone().requires_grad_())
            return kept[-1].clone()  # what follows may work in place

        return kept, [] if self._input is not None else [(self.site, substitute)]

    def _reached(
        self,
        inputs: ModelInputs,
        site: Site,
        variable: list[Tensor] | None = None,
        edits: list[tuple[Site, Edit]] | None = None,
    ) -> Tensor:
        """The value at a site where the forward ends."""
        found: list[Tensor] = []

        def stop(value: Tensor, call: int) -> None:
            found.append(value)
            raise _Reached

        try:
            self._run(inputs, None, variable, [*(edits or []), (site, stop)])
        except _Reached:
            return found[0]
        raise SiteError(
            f'"{site}" was not reached in this forward pass, but in the first one. Choose another site.'
        )

    def _run(
        self,
        inputs: ModelInputs,
        rows: Tensor | None,
        variable: list[Tensor] | None,
        edits: list[tuple[Site, Edit]],
    ) -> Any:
        replaced: dict[str, Tensor] = {}
        if self._input is not None and variable is not None:
            leaf = inputs.leaf[self._input].detach()
            variable.append((leaf if rows is None else leaf[rows]).clone().requires_grad_())
            replaced = {self._input: variable[0].clone()}
        args, kwargs = inputs.rows(rows, replaced)
        frozen = kept_random_state(0, self._generators) if self._stochastic else nullcontext()
        with frozen, edit(self.module, edits):
            return self.module(*args, **kwargs)

    def _find_head(self, first: ModelInputs, logits: Tensor) -> tuple[Site, nn.Module] | None:
        """The output embeddings, if they alone make the logits: a softcap or scale after them would be lost."""
        getter: Callable[[], Any] | None = getattr(self.module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        path = next((name for name, part in self.module.named_modules() if part is head), "")
        if not isinstance(head, nn.Module) or not path or logits.dim() != 3:
            return None
        site = Site("module", path, side="input")
        try:
            hidden = self._reached(first, site)
        except SiteError:
            return None
        again = head(hidden)
        # bit for bit, since a softcap hardly shows on small logits
        return (site, head) if torch.equal(again.to(logits.dtype), logits) else None

    def _unrelated(self) -> SiteError:
        return SiteError(
            f'the loss does not depend on "{self.asked_site}": no differentiable path leads from there to the logits. '
            "Choose a site before them."
        )


def _named(inputs: ModelInputs, labels: Tensor | None) -> Mapping[str, Tensor]:
    return inputs.leaf if labels is None else {**inputs.leaf, "labels": labels}


def _draws(loss: str, logits: torch.Size, draw: tuple[int, str], device: torch.device) -> Tensor | None:
    if loss != "ce_sampled":
        return None
    seed, name = draw
    return torch.rand(logits[:-1], generator=generator(seed, 0, name), dtype=torch.float64).to(device)
