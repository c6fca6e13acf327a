"""``pullback doctor``: what a model is, which methods work on it, and what would stop them."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from pullback.commands.explain import (
    ChannelsOption,
    InputArgument,
    JsonOption,
    ModelArgument,
    SiteOption,
    SizeOption,
    TargetOption,
    TextOption,
    TokenizerOption,
    is_language_model,
    read_input,
)

__all__ = ["doctor"]


def doctor(
    model: ModelArgument,
    input: InputArgument = None,
    text: TextOption = None,
    target: TargetOption = None,
    site: SiteOption = None,
    size: SizeOption = None,
    channels: ChannelsOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model is, which methods work and are exact on it, and what would stop them.

    With an input, every method is tried at low cost on its first example.
    """
    from pullback.commands.models import load_tokenizer, named_model
    from pullback.commands.targets import parse_target
    from pullback.doctor import diagnose

    named = named_model(model)
    inputs = None
    words = load_tokenizer(Path(tokenizer)) if tokenizer is not None else None
    if input is not None or text is not None:
        inputs, words, _ = read_input(named, input, text, size, channels, words)
    wanted = parse_target(target, words, is_language_model(named.model))
    diagnosis = diagnose(named.model, inputs, site=site, target=wanted)
    typer.echo(json.dumps(diagnosis.to_dict(), indent=2) if as_json else str(diagnosis))
