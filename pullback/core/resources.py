"""How many rows go through the model at once: chosen from what the forward allocates, halved when memory runs out.

The choice depends on shapes and budgets only, never on timing, so the same call gives the same chunk and therefore the
same bits; on a CPU with hardly any memory free it depends on that too.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import InputError
from .inputs import nested_tensors
from .lean import BATCH_NORMS, KERNELS, SMALLEST

__all__ = [
    "HELD_COPIES",
    "AllocationMeter",
    "PeakMeter",
    "Resources",
    "SharedWriteError",
    "is_out_of_memory",
    "parse_bytes",
    "storages",
]

# Measured in benchmarks/attribution.py: on a CPU a couple of dozen rows are worth a large working set, since they
# share the reading of the weights; more rows than that help only while their activations stay near the caches.
CPU_WORKING_SET = 640 * 2**20
CPU_CACHED_SET = 192 * 2**20
WEIGHT_SHARING_ROWS = 24
ACCELERATOR_SHARE = 0.25
LARGEST_CHUNK = 1024
# The backward holds a gradient beside each activation for a moment; measured between 1.2 and 1.9 on the test nets.
BACKWARD_FACTOR = 2.0
# Copies of a row of the point, in the accumulation dtype, that placing and summing hold; measured by the tests.
ROW_COPIES = 2
SUM_COPIES = 7
HELD_COPIES = 6
# The backward is lean where that lets go of this much of what the forward allocates; in transformers it is little.
LEAN_SHARE = 0.25
# Under a budget it is from small rows on, whatever the time: memory is what was asked for.
LEAN_ROW_UNDER_BUDGET = SMALLEST // 64

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: int | float | str) -> int:
    """A number of bytes from a number or from text such as "4GB" or "512 MiB". Raises InputError.

    >>> parse_bytes("4GB"), parse_bytes(1024)
    (4000000000, 1024)
    """
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
        amount = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    else:
        amount = float(text)
    if not amount >= 1:
        raise InputError(
            f'memory_budget is a number of bytes or text such as "4GB" or "512MiB", got {text!r}.'
        )
    return int(amount)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text
        or "not enough memory" in text
        or "can't allocate memory" in text
        or "status_alloc_failed" in text  # cuBLAS and cuDNN
    )


class SharedWriteError(Exception):
    """A forward is about to write into storage that belongs to the user's model; nothing was written yet."""


class AllocationMeter(TorchDispatchMode):
    """Watches one forward pass: what it allocates, whether it draws random numbers, whether it writes into the model.

    ``bytes`` adds up every storage that operations create: an upper bound of what a backward could keep. ``draws``
    says whether any used a random generator; ``generators`` are those that are not torch's own, with their states
    before. ``batch_norms`` says whether a batch norm ran. ``droppable`` are the bytes that a lean backward need not
    keep, ``largest`` the most elements of one tensor among them. A write into a storage of ``protected`` raises
    SharedWriteError before it happens.
    """

    def __init__(self, protected: frozenset[int] = frozenset()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.draws = False
        self.droppable = 0
        self.largest = 0
        self.generators: dict[torch.Generator, Tensor] = {}
        self.batch_norms = False
        self.protected = protected

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.draws = self.draws or _draws(func, args, kwargs)
        own = kwargs.get("generator")
        if isinstance(own, torch.Generator) and own not in self.generators:
            self.generators[own] = own.get_state()
        given = {_pointer(tensor) for tensor in _operands(args)}
        given.update(_pointer(value) for value in kwargs.values() if isinstance(value, Tensor))
        if self.protected and func._schema.is_mutable and not self.protected.isdisjoint(given):
            self._require_private(func, args, kwargs)
        self.batch_norms = self.batch_norms or func in BATCH_NORMS
        if func in KERNELS:
            self.droppable += args[0].numel() * args[0].element_size()
            self.largest = max(self.largest, args[0].numel())
        output = func(*args, **kwargs)
        for tensor in (output,) if isinstance(output, Tensor) else _operands(output or ()):
            if _pointer(tensor) not in given:
                self.bytes += tensor.numel() * tensor.element_size()
        return output

    def _require_private(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                if any(_pointer(tensor) in self.protected for tensor in nested_tensors(value)):
                    raise SharedWriteError(f"{func} writes into a parameter or buffer")


def storages(module: torch.nn.Module) -> frozenset[int]:
    """Addresses of the storages of all parameters and buffers."""
    found = (*module.parameters(), *module.buffers())
    return frozenset(_pointer(tensor) for tensor in found) - {0}


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if _strided(tensor) and tensor.device.type != "meta" else 0


class PeakMeter(TorchDispatchMode):
    """Follows the bytes of all storages alive that were created while it is entered; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.live = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known_before = [
            tensor.untyped_storage() for tensor in nested_tensors((args, kwargs or {})) if _strided(tensor)
        ]
        output = func(*args, **(kwargs or {}))
        for tensor in nested_tensors(output):
            if not _strided(tensor):
                continue
            storage = tensor.untyped_storage()
            pointer = storage.data_ptr()
            if storage in self._known or any(pointer == other.data_ptr() for other in known_before):
                continue
            size = storage.nbytes()
            self._known[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, size)
        return output

    def _freed(self, size: int) -> None:
        self.live -= size


def _draws(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation uses a random generator; attention and recurrent kernels do so only with dropout."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    for position, argument in enumerate(operation._schema.arguments):
        if argument.name in ("dropout", "dropout_p"):
            given = args[position] if position < len(args) else argument.default_value
            return bool(kwargs.get(argument.name, given))
    return True


@lru_cache(maxsize=256)
def _plain(kind: type) -> bool:
    """Whether tensors of a class own a storage, as torch's own do and wrappers of other tensors need not."""
    return kind.__module__.startswith("torch")


def _strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and _plain(type(tensor))


def _operands(values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which nest at most one list deep."""
    found: list[Tensor] = []
    for value in values if isinstance(values, (tuple, list)) else ():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(part for part in value if isinstance(part, Tensor))
    return found


class Resources:
    """The chunk policy of one call, shared by every problem derived from it.

    Attributes:
        chunk: rows at once if given; None for automatic.
        budget: bytes the evaluation may hold beyond what exists already, or None.
        halved: how often memory ran out and the chunk was halved.
        row_bytes: what the first forward pass allocated per row.
        lean_row: elements per row of the largest tensor that a lean backward lets go of; 0 where it does not pay.
    """

    def __init__(
        self, chunk: int | str | None = "auto", memory_budget: int | float | str | None = None
    ) -> None:
        if chunk not in ("auto", None) and (
            isinstance(chunk, (str, bool)) or int(chunk) != chunk or chunk < 1
        ):
            raise InputError(f'chunk is "auto" or a number of rows, at least 1; got {chunk!r}.')
        self.chunk = None if chunk in ("auto", None) else int(chunk)
        self.budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.halved = 0
        self.row_bytes: int | None = None
        self.lean_row = 0
        self._chosen: int | None = self.chunk
        self._measured = False

    @property
    def chosen(self) -> int | None:
        """The chunk in use, or None where none was needed yet."""
        return self._chosen

    def learn(self, meter: AllocationMeter, rows: int) -> None:
        """Take in what the first forward pass of so many rows allocated."""
        self.row_bytes = meter.bytes // rows
        self.lean_row = meter.largest // rows if meter.droppable >= LEAN_SHARE * meter.bytes else 0

    def lean_from(self, rows: int) -> int | None:
        """How many elements an operation must have to be lean in an evaluation of so many rows; None: none is lean."""
        if self.budget is None:
            # where a chunk that shares its weights fits easily, a twentieth more time is worth more than the memory
            if self.chunk is None and self.is_roomy():
                return None
            return SMALLEST if rows * self.lean_row >= SMALLEST else None
        # the same at every number of rows, so that the peaks of one and of two rows tell that of many
        return 1 if self.lean_row >= LEAN_ROW_UNDER_BUDGET else None

    def is_roomy(self) -> bool:
        """Whether as many rows as share the reading of the weights fit the CPU's working set."""
        return BACKWARD_FACTOR * (self.row_bytes or 0) * WEIGHT_SHARING_ROWS <= CPU_WORKING_SET

    def rows(
        self, device: torch.device, probe: Callable[[int], int], point_bytes: int = 0, held: int = 0
    ) -> int:
        """How many rows to evaluate at once.

        Args:
            probe: the peak bytes of an evaluation of so many rows.
            point_bytes: bytes of one row of the point in the accumulation dtype.
            held: bytes that the estimator keeps beside its rows.
        """
        if self.budget is not None and not self._measured:
            self._measured = True
            one = probe(1)
            # two rows tell the fixed part; where they might not fit, one row is taken to be all slope
            slope = max((probe(2) if 2 * one + held < self.budget else 2 * one) - one, 1)
            fixed = max(one - slope, 0) + held
            # a row's point and path stay during the evaluation; its share of the sums is taken when that has ended
            slope = max(slope + ROW_COPIES * point_bytes, SUM_COPIES * point_bytes)
            if fixed + slope > self.budget:
                raise InputError(
                    f"memory_budget is {self.budget:,} bytes, but one example needs {fixed + slope:,}. "
                    "Raise the budget, or shorten the input."
                )
            # 3 % for what the estimator itself holds between two evaluations
            fitting = max(1, int((0.97 * self.budget - fixed) // slope))
            self._chosen = fitting if self._chosen is None else min(self._chosen, fitting)
        if self._chosen is None:
            per_row = max(1.0, BACKWARD_FACTOR * (self.row_bytes or 1))
            rows = working_set(device) // per_row
            if device.type == "cpu":
                rows = min(rows, max(WEIGHT_SHARING_ROWS, CPU_CACHED_SET // per_row))
            self._chosen = int(min(LARGEST_CHUNK, max(1.0, rows)))
        return self._chosen

    def halve(self, rows: int, error: BaseException, targets: int = 1) -> None:
        """Remember a smaller chunk after memory ran out at ``rows`` of several targets; re-raises at one row."""
        if rows <= 1:
            raise error
        self.halved += 1
        self._chosen = max(1, rows // 2 // targets)


def working_set(device: torch.device) -> float:
    """Bytes a chunk may hold on this device when the user gave no budget."""
    if device.type == "cuda":
        # of all memory rather than of what is free now, so that the chunk is the same next time; halving is the net
        return ACCELERATOR_SHARE * torch.cuda.get_device_properties(device).total_memory
    try:
        available = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        available = float(2**32)
    return min(float(CPU_WORKING_SET), 0.25 * available)
