"""Transformers pipelines: explained as their model, called with what the pipeline makes of text or pictures.

They are known by what they have, so that transformers itself is not needed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .core.errors import InputError
from .core.inputs import nested_tensors
from .core.problem import Problem
from .core.text_targets import Contrast, LogProb, TokenAt

__all__ = ["Opened", "opened"]

VOCABULARY_TASKS = ("text-generation", "fill-mask", "text2text-generation", "summarization", "translation")


@dataclass(frozen=True)
class Opened:
    """What is posed for a call: the model, its inputs, and the tokenizer where a pipeline brought one.

    ``speaks`` says that the model's classes are tokens, so that a text as target is tokens too, not a label.
    """

    model: Any
    inputs: Any
    tokenizer: Any = None
    speaks: bool = False

    def target(self, target: Any) -> Any:
        """The target with the pipeline's tokenizer put in where it means tokens by their text."""
        if not self.speaks or self.tokenizer is None:
            return target
        if isinstance(target, str):
            return LogProb(target, tokenizer=self.tokenizer)
        if isinstance(target, (Contrast, LogProb, TokenAt)) and target.tokenizer is None:
            return replace(target, tokenizer=self.tokenizer)
        return target

    def named(self, problem: Problem) -> Problem:
        """The problem, knowing the tokenizer: for the labels of tokens, and for the mask token as baseline."""
        if problem.posed.tokenizer is None:
            problem.posed.tokenizer = self.tokenizer
        return problem


def opened(model: Any, inputs: Any) -> Opened:
    """A pipeline and what it is called with, as a model and its inputs; anything else comes back as it is.

    Args:
        model: a transformers pipeline, by its ``model``, ``preprocess`` and tokenizer or processor; or anything.
        inputs: a text, a picture, or a list of them, batched with padding; tensors go to the model as they are.

    Raises:
        InputError: the pipeline cuts the input into several calls, or the examples cannot form one batch.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> opened(layer, torch.ones(1, 2)).model is layer
        True
    """
    if not is_pipeline(model):
        return Opened(model, inputs)
    tokenizer = getattr(model, "tokenizer", None)
    speaks = str(getattr(model, "task", "")).startswith(VOCABULARY_TASKS)
    if next(nested_tensors(inputs), None) is None:
        inputs = model_inputs(model, inputs)
    return Opened(model.model, inputs, tokenizer, speaks)


def is_pipeline(model: Any) -> bool:
    """Whether something has a model, a way to prepare its inputs, and a tokenizer or processor to do it with."""
    if isinstance(model, (nn.Module, type)) or not isinstance(getattr(model, "model", None), nn.Module):
        return False
    parts = ("tokenizer", "image_processor", "feature_extractor", "processor")
    return callable(getattr(model, "preprocess", None)) and any(
        getattr(model, part, None) is not None for part in parts
    )


def model_inputs(pipeline: Any, inputs: Any) -> dict[str, Tensor]:
    """The tensors a pipeline calls its model with, for one example or a list of them."""
    several = isinstance(inputs, (list, tuple))
    if several and not inputs:
        raise InputError("no input: the list given to the pipeline is empty.")
    calls = [prepared(pipeline, each) for each in (inputs if several else [inputs])]
    device = next((p.device for p in pipeline.model.parameters() if not p.is_meta), torch.device("cpu"))
    return {name: value.to(device) for name, value in batched(calls, pipeline).items()}


def prepared(pipeline: Any, example: Any) -> dict[str, Tensor]:
    """One example through the pipeline's own preparation: the tensors that the model's forward names."""
    try:
        found = pipeline.preprocess(example, **getattr(pipeline, "_preprocess_params", {}))
        parts = list(found) if inspect.isgenerator(found) else None
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"a {type(pipeline).__name__} cannot prepare a {type(example).__name__} alone ({type(error).__name__}: "
            f"{error}). Explain the model: pb.explain(pipeline.model, inputs) with the tensors it is called with."
        ) from error
    if parts is not None:
        if len(parts) != 1:
            raise InputError(
                f"a {type(pipeline).__name__} cuts this input into {len(parts)} calls of its model. Explain the model: "
                "pb.explain(pipeline.model, inputs) with the tensors of one call."
            )
        found = parts[0]
    if not isinstance(found, Mapping) and not hasattr(found, "items"):
        raise InputError(
            f"a {type(pipeline).__name__} prepares a {type(found).__name__}, expected tensors by name. Explain the "
            "model: pb.explain(pipeline.model, inputs)."
        )
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    names = inspect.signature(pipeline.model.forward).parameters
    return {name: value for name, value in tensors.items() if name in names} or tensors


def batched(calls: Sequence[dict[str, Tensor]], pipeline: Any) -> dict[str, Tensor]:
    """Examples of one row each as one batch, texts padded by the tokenizer. Raises InputError."""
    shapes = [{name: value.shape[1:] for name, value in call.items()} for call in calls]
    if all(each == shapes[0] for each in shapes):
        return {name: torch.cat([call[name] for call in calls]) for name in calls[0]}
    if not all("input_ids" in call for call in calls):
        raise InputError(
            f"the examples have different shapes once prepared: {[dict(each) for each in shapes]}. "
            "Explain them one at a time, or bring them to one size."
        )
    try:
        found = pipeline.tokenizer.pad(
            [{name: value[0].tolist() for name, value in call.items()} for call in calls], return_tensors="pt"
        )
    except ValueError as error:
        raise InputError(
            f"texts of different lengths need padding, and the tokenizer refuses: {error} "
            "Set its pad_token, or explain them one at a time."
        ) from error
    return {str(name): value for name, value in found.items()}
