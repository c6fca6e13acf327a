"""From a config class and its settings to a tiny model with random weights, biases and statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "CLASSES", "ENCODER_DECODER", "EXPERTS", "IMAGES", "SHARED", "SIZES", "VOCABULARY", "Built", "Inputs", "build",
    "decoder", "encoder", "image", "in_float64", "noise", "of_module", "rebuilt_with_attention", "seeded", "sequence_to_sequence", "tokens",
]  # fmt: skip

Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]

VOCABULARY = 40
IMAGES, CLASSES = (2, 3, 32, 32), 3  # of our own networks
SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
# the fused product of all experts (the default) has no float64 kernel
EXPERTS: dict[str, Any] = {"experts_implementation": "eager"}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def tokens(length: int = 7, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def seeded(construct: Callable[[], nn.Module], inputs: Inputs) -> Built:
    """The model in eval mode with nothing left at its initial zero or one; equal at every call.

    Biases and the scales of norms start at 0 and 1, where an explanation that loses or counts them twice still adds up;
    other parameters of several architectures start at 0, where gradients vanish.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = construct().eval()
        for parameter in model.parameters():
            started = parameter.ndim == 1 or float(parameter.std(unbiased=False)) < 1e-3
            if parameter.is_floating_point() and started:
                parameter.add_(0.1 * torch.randn_like(parameter))
        set_running_statistics(model, inputs)
    return model, inputs


def set_running_statistics(model: nn.Module, inputs: Inputs) -> None:
    """Batch norms as after training, near the inputs' own moments: at 0 and 1 the signal fades from layer to layer."""
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        model(**inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        if norm.running_mean is not None and norm.running_var is not None:
            # the mean counts as well: where two examples hardly differ, they are not blown up to differ by one
            spread = (norm.running_var + norm.running_mean.square()).sqrt()
            norm.running_mean.add_(0.3 * spread * torch.randn_like(spread))
            norm.running_var.copy_(spread.square() * (0.8 + 0.4 * torch.rand_like(spread)))


def build(model_class: str, config_class: str, inputs: Inputs, **settings: Any) -> Built:
    """A model of ``model_class`` with the settings that differ from the config's defaults."""
    import transformers

    config = getattr(transformers, config_class)(**settings)
    return seeded(lambda: getattr(transformers, model_class)(config), inputs)


def of_module(construct: Callable[[], nn.Module], *shape: int) -> Built:
    """A module of our own on one floating input "input" of the given shape."""
    return seeded(construct, {"input": noise(*shape)})


def decoder(model_class: str, config_class: str, length: int = 7, **settings: Any) -> Built:
    return build(model_class, config_class, {"input_ids": tokens(length)}, **{**SHARED, **settings})


def encoder(model_class: str, config_class: str, length: int = 7, **settings: Any) -> Built:
    """Two padding tokens end the second sequence."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    inputs = {"input_ids": tokens(length), "attention_mask": mask}
    return build(model_class, config_class, inputs, **{**SHARED, **settings})


def image(model_class: str, config_class: str, size: int = 32, **settings: Any) -> Built:
    return build(model_class, config_class, {"pixel_values": noise(2, 3, size, size)}, **settings)


def sequence_to_sequence(model_class: str, config_class: str, **settings: Any) -> Built:
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(5)}
    return build(model_class, config_class, inputs, **{**SHARED, "decoder_start_token_id": 1, **settings})


def in_float64(built: Built) -> Built:
    """The same model and inputs with every floating number in float64."""
    model, inputs = built
    return model.double(), {
        name: value.double() if value.is_floating_point() else value for name, value in inputs.items()
    }


def rebuilt_with_attention(built: Built, implementation: str) -> Built | None:
    """The same weights under another attention implementation; None where the class offers no choice."""
    from transformers import PreTrainedModel

    model, inputs = built
    if not isinstance(model, PreTrainedModel) or not model._supports_sdpa:
        return None
    config = copy.deepcopy(model.config)
    config._attn_implementation = implementation
    with torch.random.fork_rng():
        new = type(model)(config)
    new.load_state_dict(model.state_dict())
    return new.eval(), inputs
