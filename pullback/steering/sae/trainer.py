"""One training step after another of a sparse autoencoder, on activations from wherever they come."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from pullback.core.errors import FormatError, InputError, MethodError

from .functional import sparse_decode
from .latents import SparseAutoencoderLoss
from .model import SparseAutoencoder
from .processes import Processes
from .training_config import TrainingConfig

__all__ = ["MEASURED", "Trainer"]

MEASURED = ("loss", "fvu", "auxiliary", "l0", "gradient_norm")
_EPSILON = 6.25e-10  # of Adam, as in OpenAI's training script
_FIRST_STEPS = 10  # whose mean FVU says whether anything is learnt
_SLOWEST_MEAN = 0.01  # weight of a batch in the running mean of the gradient's norm, from the hundredth on
_START_TOKENS = 1024  # that tell the encoder's first scale
_PROBE_ROWS, _PROBE_TOKENS, _PROBE_ROUNDS = 4096, 256, 5
_MEDIAN_ROUNDS, _MEDIAN_TOLERANCE = 100, 1e-6


class Trainer:
    """Trains an autoencoder by Adam, step by step.

    A step takes the loss and its gradients, projects the decoder's onto the tangent of the unit sphere, applies Adam
    (plain: no weight decay), renormalises the decoder rows and counts silence in tokens. beta is 0 for the first
    ``config.beta_warmup`` of the steps. g is measured in units of the running mean of its norm over tokens.

    With several processes (``torchrun``) each gives its own tokens, as many as the others; gradients, means, variances
    and counters are those of the joined batch.

    Args:
        config: the run.
        autoencoder: to go on with; None makes one from the config.
        device: of a new one.
        processes: None for those of ``torch.distributed``, if it is set up.

    Attributes:
        autoencoder: what is trained.
        step_count, tokens: so far, of all processes.

    >>> from pullback.steering.sae import SparseAutoencoderConfig
    >>> trainer = Trainer(TrainingConfig(SparseAutoencoderConfig(4, 8, 2), tokens=64, batch_tokens=32))
    >>> for _ in range(2):
    ...     loss = trainer.step(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))
    >>> trainer.finished
    True
    """

    def __init__(
        self,
        config: TrainingConfig,
        autoencoder: SparseAutoencoder | None = None,
        *,
        device: torch.device | str = "cpu",
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        self.processes = Processes.here() if processes is None else processes
        if autoencoder is None:
            dtype = torch.float64 if config.dtype == "float64" else torch.float32
            autoencoder = SparseAutoencoder(
                config.autoencoder,
                seed=config.seed,
                memory_budget=config.memory_budget,
                dtype=dtype,
                device=device,
            )
        elif autoencoder.config != config.autoencoder:
            raise MethodError(
                f"the autoencoder is {autoencoder.config}; the run's config has {config.autoencoder}."
            )
        self.autoencoder = autoencoder
        if config.score_dtype == "bfloat16" or (
            config.score_dtype == "auto" and _bfloat16_is_faster(autoencoder)
        ):
            autoencoder.score_dtype = torch.bfloat16
        self.optimizer = torch.optim.Adam(
            autoencoder.parameters(), lr=config.peak_learning_rate, eps=_EPSILON, fused=True
        )
        self.step_count = 0
        self.tokens = 0
        self._gradients_seen = 0
        self._measured = torch.zeros(len(MEASURED), dtype=torch.float64, device=autoencoder.decoder.device)
        self._first_fvu = self._measured.new_zeros(())

    # --- where the run is ---

    @property
    def finished(self) -> bool:
        """Whether all steps of the config are done."""
        return self.step_count >= self.config.steps

    @property
    def beta(self) -> float:
        """beta of the next step."""
        return self.config.beta_at(self.step_count)

    @property
    def needs_gradient(self) -> bool:
        """Whether the next step looks at gradients."""
        return self.beta > 0

    # --- steps ---

    @torch.no_grad()
    def start_(self, x: Tensor) -> None:
        """Fit the input's scale, the decoder bias and the encoder's scale to activations (tokens, width).

        The bias is their geometric median. The encoder is scaled so that the first reconstruction is the best multiple
        of itself, so that FVU begins below 1.
        """
        autoencoder = self.autoencoder
        autoencoder.fit_normalization_(x)
        scale = self.processes.mean(1 / autoencoder.input_scale)
        autoencoder.input_scale.copy_(1 / scale)
        seen = autoencoder.normalized(x)[0]
        autoencoder.decoder_bias.copy_(self.processes.mean(_geometric_median(seen)))
        some = x.reshape(-1, x.shape[-1])[:_START_TOKENS]
        about = seen[:_START_TOKENS] - autoencoder.decoder_bias
        found = autoencoder.encode(some, selection="topk")
        decoded = sparse_decode(found.indices, found.values, autoencoder.decoder)
        products = torch.stack([(about * decoded).sum(), decoded.square().sum()])
        self.processes.mean_(products)
        if bool((products > 0).all()):
            autoencoder.encoder.mul_(products[0] / products[1])

    def step(self, x: Tensor, gradient: Tensor | None = None) -> SparseAutoencoderLoss:
        """One step on activations (..., width) and, where ``needs_gradient``, the gradient of the model's loss there.

        Returns the loss before the step; nothing in it is read by the host, so a GPU is not waited for. On the CPU
        raises InputError for activations that are not finite; on a GPU ``measured`` does.
        """
        autoencoder, config = self.autoencoder, self.config
        if self.finished:
            raise MethodError(
                f"the run of {config.steps} steps has ended; its learning rate is 0. Raise tokens in the config."
            )
        beta = self.beta
        norm = self._scale_gradient(gradient) if beta > 0 else x.new_zeros(())
        self.optimizer.param_groups[0]["lr"] = config.learning_rate_at(self.step_count)
        self.optimizer.zero_grad()
        several = self.processes.count > 1
        loss = autoencoder.loss(x, gradient, beta=beta, average=self.processes.mean if several else None)
        loss.total.backward()
        for parameter in autoencoder.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.processes.mean_(parameter.grad)
        autoencoder.project_decoder_gradient_()
        self.optimizer.step()
        autoencoder.normalize_decoder_()
        autoencoder.count_(loss.latents, self.processes)
        self.step_count += 1
        self.tokens += loss.latents.values.shape[:-1].numel() * self.processes.count
        self._measure(loss, norm)
        return loss

    def measured(self, steps: int) -> dict[str, float]:
        """Means of the last ``steps`` steps, and starts anew. Waits for the device; raises InputError for NaN."""
        sums = self.processes.mean(self._measured)
        values = dict(zip(MEASURED, (sums / steps).tolist(), strict=True))
        self._measured.zero_()
        if not math.isfinite(values["loss"]):
            raise InputError(
                f"the loss is {values['loss']} in the {steps} steps before step {self.step_count}: activations or "
                "gradients were not finite, or the learning rate is too high."
            )
        return values

    # --- saved state ---

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Everything that the next steps depend on: tensors, and numbers."""
        tensors = {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        for name, parameter in self.autoencoder.named_parameters():
            for part in ("exp_avg", "exp_avg_sq"):
                moments = self.optimizer.state[parameter]
                tensors[f"adam.{part}.{name}"] = moments[part] if moments else torch.zeros_like(parameter)
        tensors |= {"measured": self._measured, "first_fvu": self._first_fvu}
        numbers = {"steps": self.step_count, "tokens": self.tokens, "gradients": self._gradients_seen}
        return tensors, {**numbers, "bfloat16": int(self.autoencoder.score_dtype is torch.bfloat16)}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Go on as the trainer would have whose state this is. Raises FormatError for another's shapes."""
        now, _ = self.state()
        for name, value in now.items():
            if (
                name not in tensors
                or tensors[name].shape != value.shape
                or tensors[name].dtype != value.dtype
            ):
                given = (
                    "missing"
                    if name not in tensors
                    else f"{tuple(tensors[name].shape)} {tensors[name].dtype}"
                )
                raise FormatError(
                    f"the saved {name} is {given}; expected {tuple(value.shape)} {value.dtype}, as in this run."
                )
        for name, value in self.autoencoder.state_dict().items():
            value.copy_(tensors[f"autoencoder.{name}"])
        self.step_count, self.tokens = numbers["steps"], numbers["tokens"]
        self._gradients_seen = numbers["gradients"]
        self.autoencoder.score_dtype = torch.bfloat16 if numbers["bfloat16"] else None
        self._measured.copy_(tensors["measured"])
        self._first_fvu.copy_(tensors["first_fvu"])
        for name, parameter in self.autoencoder.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step_count), device=parameter.device),
                "exp_avg": tensors[f"adam.exp_avg.{name}"].to(parameter.device, copy=True),
                "exp_avg_sq": tensors[f"adam.exp_avg_sq.{name}"].to(parameter.device, copy=True),
            }

    # --- inside ---

    @torch.no_grad()
    def _scale_gradient(self, gradient: Tensor | None) -> Tensor:
        """Take the batch into the running mean of the gradient's norm."""
        if gradient is None:
            raise InputError(
                f"step {self.step_count} selects by gradient and none was given. Try step(x, gradient) where "
                "trainer.needs_gradient."
            )
        scale = self.autoencoder.gradient_scale
        norm = torch.linalg.vector_norm(gradient.to(scale.dtype), dim=-1).mean()
        norm = self.processes.mean(norm)
        self._gradients_seen += 1
        scale.lerp_(norm, max(1 / self._gradients_seen, _SLOWEST_MEAN))
        scale.clamp_(min=torch.finfo(scale.dtype).tiny)  # all gradients 0 select as beta 0 does
        return norm

    @torch.no_grad()
    def _measure(self, loss: SparseAutoencoderLoss, norm: Tensor) -> None:
        active = (loss.latents.values > 0).sum(-1).double().mean()
        values = (loss.total, loss.reconstruction, loss.auxiliary, active, norm)
        self._measured += torch.stack([value.detach().double() for value in values])
        if self.step_count <= _FIRST_STEPS:
            self._first_fvu += loss.reconstruction.detach().double() / _FIRST_STEPS
        if self.step_count == _FIRST_STEPS:
            fvu = float(self.processes.mean(self._first_fvu))
            if not fvu <= 1:
                warnings.warn(
                    f"FVU is {fvu:.3g} over the first {_FIRST_STEPS} batches: they are reconstructed worse than by "
                    "their mean. Check that the site is the one meant, and the learning rate.",
                    stacklevel=3,
                )


@torch.no_grad()
def _bfloat16_is_faster(autoencoder: SparseAutoencoder) -> bool:
    """Whether the product of some tokens with some latents is, with the conversion of the weights counted."""
    rows = autoencoder.encoder[:_PROBE_ROWS]
    tokens = rows[:_PROBE_TOKENS]
    seconds = []
    for dtype in (rows.dtype, torch.bfloat16):
        rounds = []
        for _ in range(_PROBE_ROUNDS):
            began = time.perf_counter()
            product = tokens.to(dtype) @ rows.to(dtype).t()
            if product.device.type != "cpu":
                product.sum().item()  # waits for the device
            rounds.append(time.perf_counter() - began)
        seconds.append(min(rounds))
    return seconds[1] < seconds[0]


def _geometric_median(x: Tensor) -> Tensor:
    """The point with the smallest sum of distances to the rows, by Weiszfeld's iteration."""
    median = x.mean(0)
    for _ in range(_MEDIAN_ROUNDS):
        weights = 1 / torch.linalg.vector_norm(x - median, dim=1).clamp(min=1e-12)
        moved = (weights @ x) / weights.sum()
        change = torch.linalg.vector_norm(moved - median)
        median = moved
        if bool(change <= _MEDIAN_TOLERANCE * torch.linalg.vector_norm(median)):
            break
    return median
