"""The blocks of a transformer, and what a steering vector remembers of the model it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from pullback.core.errors import ModelError, SiteError

__all__ = ["Blocks", "Fingerprint", "Layers", "find_blocks", "fingerprint", "select_layers"]

Layers: TypeAlias = "int | float | slice | Sequence[int | float]"

# what a config records of loading, generating and labels, or what users change on a loaded model
_NOT_ARCHITECTURE = frozenset(
    {
        "_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
        "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
        "_experts_implementation", "return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id",
        "num_labels", "problem_type", "quantization_config", "vocab_size", "bos_token_id", "eos_token_id",
        "pad_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
        "chunk_size_feed_forward", "gradient_checkpointing", "_output_attentions",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """The blocks whose outputs are the residual stream.

    Attributes:
        model: the model without the wrappers of PEFT and data parallelism.
        decoder: the module that runs the blocks and is handed the cache.
        path: dotted path of the list of blocks in ``model``.
        modules: the blocks in order.
        width: size of the hidden state where the config tells it.
    """

    model: nn.Module
    decoder: nn.Module
    path: str
    modules: tuple[nn.Module, ...]
    width: int | None

    def __len__(self) -> int:
        return len(self.modules)


def find_blocks(model: nn.Module, blocks: str | None = None) -> Blocks:
    """The transformer blocks of a model; of an encoder-decoder, the decoder's; never those of a vision tower.

    The shallowest ``ModuleList`` under ``model.get_decoder()`` with as many modules as the text config has layers;
    without a config, the longest ``ModuleList``. ``blocks`` is the dotted path of the list where neither finds it.
    Raises SiteError where there is none or more than one.

    >>> find_blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])})).path
    'layers'
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; expected a torch.nn.Module.")
    model = _unwrapped(model)
    decoder = _decoder(model)
    text = _text_config(model)
    width = getattr(text, "hidden_size", None)
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    if blocks is not None:
        named = dict(model.named_modules()).get(blocks)
        if not isinstance(named, nn.ModuleList | nn.Sequential) or not len(named):
            raise SiteError(
                f'blocks="{blocks}" is {"no module" if named is None else f"a {type(named).__name__}"} of '
                f"{type(model).__name__}; expected the dotted path of a ModuleList. It has: {_listed(model)}."
            )
        found: nn.ModuleList | nn.Sequential = named
        if paths[id(named)] not in {paths[id(part)] for part in decoder.modules()}:
            decoder = model
    else:
        found = _the_list(model, decoder, getattr(text, "num_decoder_layers", None) or _depth(text))
    modules = tuple(found)
    if len({id(module) for module in modules}) < len(modules):
        raise SiteError(
            f'the blocks "{paths[id(found)]}" share one module, which hooks cannot tell apart; expected '
            "one module per layer."
        )
    return Blocks(model, decoder, paths[id(found)], modules, width if isinstance(width, int) else None)


@dataclass(frozen=True)
class Fingerprint:
    """The model a vector is for: its class, a digest of its text config, how many blocks, and how wide.

    Loading, generation and label settings, the vocabulary's size and the weights do not count, so a vector also
    fits fine-tuned and quantised copies.
    """

    model_class: str
    config: str
    block_count: int
    width: int | None

    def __str__(self) -> str:
        width = "" if self.width is None else f" of width {self.width}"
        return f"{self.model_class} ({self.block_count} blocks{width}, config {self.config})"

    def same_architecture(self, other: Fingerprint) -> bool:
        """Whether blocks, width and config agree; the class may differ (a model with another head)."""
        return (self.config, self.block_count, self.width) == (other.config, other.block_count, other.width)


def fingerprint(model: nn.Module, blocks: str | None = None) -> Fingerprint:
    """The fingerprint of a model. Raises SiteError where its blocks are not found."""
    found = find_blocks(model, blocks)
    text = _text_config(found.model)
    if text is None:
        described: Any = [
            [name, list(parameter.shape)] for name, parameter in found.modules[0].named_parameters()
        ]
    else:
        described = {name: value for name, value in text.to_dict().items() if name not in _NOT_ARCHITECTURE}
    document = json.dumps(described, sort_keys=True, default=lambda value: type(value).__name__)
    digest = hashlib.sha256(document.encode()).hexdigest()[:12]
    return Fingerprint(type(found.model).__name__, digest, len(found), found.width)


def select_layers(layers: Layers, count: int) -> list[int]:
    """Block numbers from an int (negative from the end), a depth between 0.0 and 1.0, a slice, or several of these.

    >>> select_layers(-1, 12), select_layers(0.5, 12), select_layers(slice(8, None), 12)
    ([11], [6], [8, 9, 10, 11])
    """
    if isinstance(layers, slice):
        return list(range(count))[layers]
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        return sorted({number for part in layers for number in select_layers(part, count)})
    if isinstance(layers, bool) or not isinstance(layers, int | float):
        raise SiteError(
            f"layers={layers!r} is no choice of blocks; expected numbers, depths from 0.0 to 1.0, a slice."
        )
    if isinstance(layers, float):
        if not 0.0 <= layers <= 1.0:
            raise SiteError(f"layers={layers} is no depth; expected a number from 0.0 (first block) to 1.0.")
        return [min(int(layers * count), count - 1)]
    if not -count <= layers < count:
        raise SiteError(f"there is no block {layers}: the model has {count}, numbered 0 to {count - 1}.")
    return [layers % count]


def _unwrapped(wrapped: nn.Module) -> nn.Module:
    model: Any = wrapped
    while True:
        if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            model = model.module
        elif type(model).__name__ == "DataParallel":
            if len(model.device_ids or ()) > 1:
                raise ModelError(
                    f"DataParallel runs the model in threads of its own, on {len(model.device_ids)} devices, where a "
                    "context of this thread does not steer. Steer model.module, or load it with device_map."
                )
            model = model.module
        else:
            whole: nn.Module = model
            return whole


def _decoder(model: nn.Module) -> nn.Module:
    """The innermost decoder; a vision-language model's is its language model's."""
    decoder = model
    for _ in range(8):
        try:
            inner: Any = getattr(decoder, "get_decoder")()  # noqa: B009 - not every module has one
        except (AttributeError, NotImplementedError, TypeError):
            return decoder
        if not isinstance(inner, nn.Module) or inner is decoder:
            return decoder
        decoder = inner
    return decoder


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):
        return config


def _depth(text: Any) -> int | None:
    depth = getattr(text, "num_hidden_layers", None)
    return depth if isinstance(depth, int) else None


def _the_list(model: nn.Module, decoder: nn.Module, depth: int | None) -> nn.ModuleList:
    for root in (decoder, model):
        lists = [
            (path, module)
            for path, module in root.named_modules()
            # blocks have parts; lists of projections and norms do not
            if isinstance(module, nn.ModuleList) and any(list(part.children()) for part in module)
        ]
        if depth is not None:
            lists = [(path, module) for path, module in lists if len(module) == depth]
        elif lists:
            longest = max(len(module) for _, module in lists)
            lists = [(path, module) for path, module in lists if len(module) == longest]
        if lists:
            shallowest = min(path.count(".") for path, _ in lists)
            lists = [(path, module) for path, module in lists if path.count(".") == shallowest]
        if len(lists) == 1:
            return lists[0][1]
    wanted = "a list of blocks" if depth is None else f"one list of {depth} blocks"
    raise SiteError(
        f"{type(model).__name__} has not exactly {wanted}. Lists of modules: {_listed(model)}. "
        'Name it: blocks="dotted.path".'
    )


def _listed(model: nn.Module) -> str:
    lists = [
        f'"{path}" ({len(module)})'
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    return ", ".join(lists[:8]) or "none"
