"""What a training run of a sparse autoencoder is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pullback.core.errors import MethodError

from .config import SparseAutoencoderConfig
from .prediction_loss import Loss, check_loss

__all__ = ["TrainingConfig"]

_FREE = (
    "directory",
    "checkpoint_every",
    "keep",
    "log_every",
    "tensorboard",
    "memory_budget",
    "logits_budget",
)


@dataclass(frozen=True)
class TrainingConfig:
    """A training run: how long, how fast, on what loss, and what it leaves behind.

    Attributes:
        autoencoder: shape and selection.
        tokens: to train on; the last step may pass it by less than a batch.
        batch_tokens: per step, of all processes together.
        learning_rate: of Adam (0.9, 0.999, eps 6.25e-10); None for 2e-4 / sqrt(latents / 2**14).
        warmup: share of the steps in which the learning rate rises from 0.
        decay: share of the steps, the last, in which it falls to 0.
        beta_warmup: share of the steps, the first, that select by size (beta is 0, and no gradient is computed).
        loss: whose gradient selects: "ce", "ce_sampled" or a callable, see ``ActivationGradientStream``.
        skip_positions: left out of each example, counted from its first real token; 0 is BOS.
        buffer_tokens: held to shuffle; None for 16 batches.
        buffer_dtype: of what is held, such as "bfloat16"; None for the activations' own.
        seed: of the weights, the order and the drawn labels.
        dtype: of the weights, "float32" or "float64".
        score_dtype: of the products that choose latents: "exact", as the weights; "bfloat16", the best 3k/2 scored
            again exactly, so that only the choice may differ; "auto", the faster on this machine, timed once per run.
        memory_budget: bytes for the scores of a batch; None for all latents at once.
        logits_budget: bytes of the model's logits at once.
        directory: of checkpoints, metrics and the result; None writes nothing.
        checkpoint_every: steps; None for the end only.
        keep: checkpoints.
        log_every: steps per row of metrics.csv.
        tensorboard: whether to write for TensorBoard too, where it is installed.

    Raises MethodError for values out of range.

    >>> TrainingConfig(SparseAutoencoderConfig(16, 64, 4), tokens=1000, batch_tokens=64).steps
    16
    """

    autoencoder: SparseAutoencoderConfig
    tokens: int
    batch_tokens: int = 4096
    learning_rate: float | None = None
    warmup: float = 0.0
    decay: float = 0.2
    beta_warmup: float = 0.3
    loss: Loss = "ce"
    skip_positions: tuple[int, ...] = (0,)
    buffer_tokens: int | None = None
    buffer_dtype: str | None = None
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    score_dtype: Literal["exact", "bfloat16", "auto"] = "exact"
    memory_budget: int | None = None
    logits_budget: int | str = "64MiB"
    directory: str | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    log_every: int = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        optional = ("buffer_tokens", "memory_budget", "checkpoint_every")
        for name in ("tokens", "batch_tokens", "keep", "log_every", *optional):
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"{name} is {value!r}; expected a whole number of at least 1.")
        for name in ("warmup", "decay", "beta_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise MethodError(f"{name} is {getattr(self, name)!r}; expected a share from 0 to 1.")
        rate = self.learning_rate
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise MethodError(f"learning_rate is {rate!r}; expected a positive number.")
        choices = {
            "dtype": ("float32", "float64"),
            "score_dtype": ("exact", "bfloat16", "auto"),
            "buffer_dtype": (None, "float64", "float32", "bfloat16", "float16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                listed = ", ".join(repr(choice) for choice in known)
                raise MethodError(f"{name} is {getattr(self, name)!r}; expected one of {listed}.")
        if self.buffer_tokens is not None and self.buffer_tokens < 2 * self.batch_tokens:
            raise MethodError(
                f"buffer_tokens is {self.buffer_tokens} for batches of {self.batch_tokens}; expected at least two "
                "batches, better 16."
            )
        check_loss(self.loss)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate between warm-up and decay."""
        if self.learning_rate is not None:
            return float(self.learning_rate)
        return float(2e-4 / math.sqrt(self.autoencoder.latents / 2**14))

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = (step + 1) / (self.warmup * self.steps) if self.warmup else 1.0
        falling = (self.steps - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.peak_learning_rate * max(0.0, min(1.0, rising, falling))

    def beta_at(self, step: int) -> float:
        """beta of a step, counted from 0: switched on at once, after ``beta_warmup``."""
        on = self.autoencoder.selection == "gradient" and step >= self.beta_warmup * self.steps
        return float(self.autoencoder.beta) if on else 0.0

    def as_document(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on from, as JSON."""
        document: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _FREE:
                continue
            if field.name == "autoencoder":
                value = {part.name: getattr(value, part.name) for part in fields(value)}
            elif field.name == "loss" and callable(value):
                kind = value if hasattr(value, "__qualname__") else type(value)
                value = f"{kind.__module__}.{kind.__qualname__}"
            document[field.name] = list(value) if isinstance(value, tuple) else value
        return document


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings in which two documents differ, as "name 1 (now 2)"."""
    found = []
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name):
            if isinstance(saved.get(name), dict) and isinstance(now.get(name), dict):
                found += differences(saved[name], now[name])
            else:
                found.append(f"{name} {saved.get(name)!r} (now {now.get(name)!r})")
    return found
