"""``train_sae``: a sparse autoencoder from a model, a site and batches of tokens, which can be stopped at any time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import FormatError, InputError

from .buffer import ShuffleBuffer
from .checkpoints import Checkpoints
from .latents import SparseAutoencoderLoss
from .model import SparseAutoencoder
from .processes import Processes
from .records import Records
from .store import save
from .stream import ActivationGradientStream
from .trainer import Trainer
from .training_config import TrainingConfig, differences

__all__ = ["TrainingResult", "train_sae"]

_STARTING_TOKENS = 32768  # that tell the first bias and the input's scale
_BATCHES_HELD = 16


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """A trained autoencoder on raw activations, the rows of metrics.csv, and the folder that it was saved in."""

    sae: SparseAutoencoder
    metrics: list[dict[str, float]]
    path: Path | None


def train_sae(
    model: nn.Module,
    site: str,
    token_batches: Iterable[Any],
    config: TrainingConfig,
    resume: str | Path = "auto",
) -> TrainingResult:
    """Train a sparse autoencoder on what a model computes at a site.

    The model runs on a shadow and stays as it is. While beta is 0 its forward ends at the site; after that each batch
    costs a whole forward and a backward from the loss to the site. In ``config.directory``: ``metrics.csv``,
    ``timing.csv`` (what differs between equal runs), ``checkpoints/``, and in the end ``sae/``, the result. A run that
    was stopped and goes on ends in the same bits as one that was not, if the model gives the same bits.

    Under ``torchrun`` each process takes its share of the batches and holds a buffer of its own; the first writes.

    Args:
        model: in eval mode.
        site: such as "transformer.h.8".
        token_batches: a list, a DataLoader, or another iterable that can be read again: token ids (batch, length), or
            dicts as the model takes them. Read again where the tokens do not suffice.
        config: the run.
        resume: "auto" goes on from the latest checkpoint in the directory, if there is one; "never" starts anew and
            needs a directory without; or the path of a checkpoint.

    Raises InputError (widths differ, no token, NaN), ModelError, SiteError, MethodError, FormatError (a damaged or
    another run's checkpoint), OSError (a full disk; the checkpoints before are whole).

    >>> from pullback.steering.sae import SparseAutoencoderConfig
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
    >>> config = TrainingConfig(SparseAutoencoderConfig(4, 8, 2), tokens=40, batch_tokens=10)
    >>> train_sae(model, "0", [torch.arange(6).reshape(1, 6)], config).metrics[-1]["tokens"]
    40.0
    """
    processes = Processes.here()
    share = config.batch_tokens // processes.count
    if share * processes.count != config.batch_tokens:
        raise InputError(
            f"batch_tokens is {config.batch_tokens}, which {processes.count} processes cannot share equally."
        )
    stream = ActivationGradientStream(
        model,
        site,
        token_batches,
        loss=config.loss,
        skip_positions=config.skip_positions,
        seed=config.seed,
        logits_budget=config.logits_budget,
        process=processes.number,
        processes=processes.count,
    )
    width = config.autoencoder.width
    if stream.width != width:
        raise InputError(
            f'"{site}" gives activations of width {stream.width}; the config has width {width}. Try '
            f"SparseAutoencoderConfig(width={stream.width}, ...)."
        )
    trainer = Trainer(config, device=stream.cut.device, processes=processes)
    held = config.buffer_tokens or _BATCHES_HELD * config.batch_tokens

    def produce(gradient: bool) -> tuple[Tensor, Tensor | None]:
        found = stream.read(gradient)
        return found.x, found.gradient

    buffer = ShuffleBuffer(
        produce,
        max(held // processes.count, 2 * share),
        width,
        seed=config.seed,
        process=processes.number,
        dtype=getattr(torch, config.buffer_dtype) if config.buffer_dtype else stream.cut.dtype,
        device=stream.cut.device,
    )
    run = _Run(config, site, trainer, buffer, stream, processes)
    run.restore(resume)
    if trainer.step_count == 0:
        dtype = trainer.autoencoder.decoder.dtype
        trainer.start_(buffer.held(_STARTING_TOKENS).to(dtype))
    return run.finish(share)


class _Run:
    """What the loop, the checkpoints and the records share."""

    def __init__(
        self,
        config: TrainingConfig,
        site: str,
        trainer: Trainer,
        buffer: ShuffleBuffer,
        stream: ActivationGradientStream,
        processes: Processes,
    ) -> None:
        self.config, self.site = config, site
        self.trainer, self.buffer, self.stream, self.processes = trainer, buffer, stream, processes
        self.directory = None if config.directory is None else Path(config.directory).absolute()
        self.checkpoints = (
            None
            if self.directory is None
            else Checkpoints(self.directory / "checkpoints", config.keep, processes)
        )
        self.settings = {**config.as_document(), "site": site}
        self.since_row = 0

    def restore(self, resume: str | Path) -> None:
        """Go on from a checkpoint, if there is one to go on from."""
        if self.checkpoints is None:
            if resume not in ("auto", "never"):
                raise InputError(
                    f"resume is {str(resume)!r} without a directory; set directory in the config."
                )
            return
        latest = self.checkpoints.latest()
        if resume == "never":
            if latest is not None:
                raise InputError(
                    f'{latest} exists and resume is "never"; choose another directory, or delete it.'
                )
            return
        path = latest if resume == "auto" else Path(resume)
        if path is None:
            return
        found = self.checkpoints.load(path)
        changed = differences(found.document.get("settings", {}), self.settings)
        if changed:
            raise FormatError(
                f"{path} is of a run with {', '.join(changed[:4])}; expected the same settings. Choose another "
                "directory for another run."
            )
        self.trainer.load_state(found.training, found.document["numbers"])
        self.buffer.load_state(found.stream)
        self.stream.batches.seek(*found.stream["position"].tolist())
        self.since_row = found.document["numbers"]["since_row"]

    def finish(self, share: int) -> TrainingResult:
        """All steps that are left, and the result."""
        trainer, config = self.trainer, self.config
        own = self.directory if self.processes.first else None
        records = Records(own, config.steps, trainer.step_count, config.tensorboard)
        dtype = trainer.autoencoder.decoder.dtype
        saved = trainer.step_count
        try:
            while not trainer.finished:
                beta = trainer.beta
                x, gradient = self.buffer.draw(share, trainer.needs_gradient)
                x = x.to(dtype)
                logged = (
                    trainer.step_count + 1
                ) % config.log_every == 0 or trainer.step_count + 1 == config.steps
                plain = (
                    trainer.autoencoder.encode(x, selection="topk").indices if logged and beta > 0 else None
                )
                rate = config.learning_rate_at(trainer.step_count)
                loss = trainer.step(x, gradient)
                self.since_row += 1
                records.step()
                if logged:
                    self._record(records, loss, plain, beta, rate)
                if config.checkpoint_every and trainer.step_count % config.checkpoint_every == 0:
                    self._save(records)
                    saved = trainer.step_count
            if saved != trainer.step_count:
                self._save(records)
        finally:
            records.close()
        made = trainer.autoencoder.folded().eval().requires_grad_(False)
        path = None
        if self.directory is not None:
            path = self.directory / "sae"
            if self.processes.first:
                save(trainer.autoencoder, path, metadata=self._metadata())
            self.processes.wait()
        return TrainingResult(made, records.rows, path)

    @torch.no_grad()
    def _record(
        self,
        records: Records,
        loss: SparseAutoencoderLoss,
        plain: Tensor | None,
        beta: float,
        rate: float,
    ) -> None:
        trainer = self.trainer
        values: dict[str, float | None] = dict(trainer.measured(self.since_row))
        self.since_row = 0
        changed = None
        if plain is not None:
            chosen = loss.latents.indices
            kept = (chosen.unsqueeze(-1) == plain.unsqueeze(-2)).any(-1)
            changed = float(self.processes.mean((~kept).double().mean()))
        if beta == 0:
            values["gradient_norm"] = None
        values |= {
            "step": trainer.step_count,
            "tokens": trainer.tokens,
            "dead_share": float(trainer.autoencoder.dead_latents().double().mean()),
            "gradient_scale": float(trainer.autoencoder.gradient_scale) if beta > 0 else None,
            "selection_changed": changed,
            "beta": beta,
            "learning_rate": rate,
        }
        records.row(values)

    def _save(self, records: Records) -> None:
        if self.checkpoints is None:
            return
        records.flush()
        tensors, numbers = self.trainer.state()
        position = torch.tensor([self.stream.batches.epoch, self.stream.batches.number])
        self.checkpoints.save(
            self.trainer.step_count,
            self.trainer.autoencoder,
            tensors,
            {**self.buffer.state(), "position": position},
            {
                "settings": self.settings,
                "numbers": {**numbers, "since_row": self.since_row},
                "processes": self.processes.count,
            },
            self._metadata(),
        )

    def _metadata(self) -> dict[str, Any]:
        loss = self.settings["loss"]
        return {
            "hook_name": self.site,
            "model_name": str(getattr(getattr(self.stream.cut.module, "config", None), "_name_or_path", "")),
            "training": {"loss": loss, "tokens": self.trainer.tokens, "seed": self.config.seed},
        }
