"""A buffer that shuffles activations, in memory that is allocated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pullback.core.errors import InputError, MethodError
from pullback.core.noise import generator

__all__ = ["ShuffleBuffer"]

Producer = Callable[[bool], "tuple[Tensor, Tensor | None]"]
"""Called with whether gradients are wanted; gives the next activations and gradients, (tokens, width) each."""


class ShuffleBuffer:
    """Holds ``size`` tokens and draws them without replacement, in an order of its own generator.

    When half is drawn, new tokens go exactly into the slots of those drawn, and a new order begins. Nothing is
    concatenated or moved: the peak is the buffer and one batch of the producer, whose surplus waits.

    Args:
        produce: gives the next tokens.
        size: slots.
        width: of the activations.
        gradients: whether gradients are kept too; memory for them is taken when the first are asked for.
        seed, process: of the order.
        dtype, device: of what is held.

    >>> buffer = ShuffleBuffer(lambda gradient: (torch.arange(4.0).unsqueeze(1), None), 4, 1)
    >>> sorted(buffer.draw(2)[0].flatten().tolist() + buffer.draw(2)[0].flatten().tolist()) == [0, 1, 2, 3]
    False
    """

    def __init__(
        self,
        produce: Producer,
        size: int,
        width: int,
        *,
        seed: int = 0,
        process: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if size < 1:
            raise MethodError(f"the buffer has {size} slots; expected at least 1.")
        self._produce = produce
        self.size = size
        self._generator = generator(seed, process, "shuffle")
        self._x = torch.zeros(size, width, dtype=dtype, device=device)
        self._gradient: Tensor | None = None
        self._order = torch.arange(size)  # of the slots: those before _drawn are free
        self._drawn = size
        self._graded = torch.zeros(size, dtype=torch.bool)  # slots with a gradient
        self._waiting: tuple[Tensor, Tensor | None] = (self._x[:0].clone(), None)

    def draw(self, count: int, gradient: bool = False) -> tuple[Tensor, Tensor | None]:
        """The next ``count`` tokens, at most half of the slots: x and with ``gradient`` g, (count, width), copies.

        Tokens that were produced without gradient are given up when gradients are first asked for.
        """
        if not 1 <= count <= max(1, self.size // 2):
            raise MethodError(f"{count} tokens drawn from {self.size} slots; expected at most half of them.")
        if gradient:
            self._give_up_ungraded()
        if self._drawn + count > max(self.size // 2, count):
            self._refill(gradient)
        slots = self._order[self._drawn : self._drawn + count].to(self._x.device)
        self._drawn += count
        return self._x[slots], self._gradient[slots] if gradient and self._gradient is not None else None

    def held(self, count: int) -> Tensor:
        """The first ``count`` activations that will be drawn (fewer if there are no more), without drawing them."""
        if self._drawn == self.size:
            self._refill(False)
        return self._x[self._order[self._drawn : self._drawn + count].to(self._x.device)]

    def state(self) -> dict[str, Tensor]:
        """Everything that the next draws depend on, apart from the producer."""
        x, gradient = self._waiting
        state = {
            "x": self._x,
            "order": self._order,
            "drawn": torch.tensor(self._drawn),
            "graded": self._graded,
            "waiting_x": x,
            "generator": self._generator.get_state(),
        }
        if self._gradient is not None:
            state["gradient"] = self._gradient
        if gradient is not None:
            state["waiting_gradient"] = gradient
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on as the buffer would have whose state this is."""
        if state["x"].shape != self._x.shape or state["x"].dtype != self._x.dtype:
            raise InputError(
                f"the saved buffer is {tuple(state['x'].shape)} {state['x'].dtype}; expected {tuple(self._x.shape)} "
                f"{self._x.dtype}."
            )
        self._x.copy_(state["x"])
        if "gradient" in state:
            self._room()[:] = state["gradient"].to(self._x.device)
        self._order, self._drawn = state["order"].clone(), int(state["drawn"])
        self._graded = state["graded"].clone()
        waiting = state.get("waiting_gradient")
        device = self._x.device
        self._waiting = state["waiting_x"].to(device), None if waiting is None else waiting.to(device)
        self._generator.set_state(state["generator"])

    # --- inside ---

    def _room(self) -> Tensor:
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._x)
        return self._gradient

    def _give_up_ungraded(self) -> None:
        rest = self._order[self._drawn :]
        without = ~self._graded[rest]
        if bool(without.any()):
            # given up slots join the free ones
            self._order = torch.cat([self._order[: self._drawn], rest[without], rest[~without]])
            self._drawn += int(without.sum())
        if self._waiting[1] is None:
            self._waiting = (self._x[:0].clone(), None)

    def _refill(self, gradient: bool) -> None:
        free = self._order[: self._drawn]
        filled = 0
        empty = 0
        while filled < len(free):
            x, g = self._waiting
            if not len(x):
                x, g = self._produce(gradient)
                empty = 0 if len(x) else empty + 1
                if empty > 1000:
                    raise InputError(
                        "1000 batches without a token; expected some that are neither padding nor skipped."
                    )
            take = min(len(x), len(free) - filled)
            slots = free[filled : filled + take]
            at = slots.to(self._x.device)
            self._x[at] = x[:take].to(self._x)
            if g is not None:
                self._room()[at] = g[:take].to(self._x)
            self._graded[slots] = g is not None
            filled += take
            # copies, so that the producer's batch is let go of
            self._waiting = (
                x[take:].to(self._x).clone(),
                None if g is None else g[take:].to(self._x).clone(),
            )
        self._order = torch.randperm(self.size, generator=self._generator)
        self._drawn = 0
