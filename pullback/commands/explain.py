"""``pullback explain``: one model, one input, one result, and a record of how it was made."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pullback.result import Attribution

__all__ = [
    "ChannelsOption",
    "InputArgument",
    "JsonOption",
    "ModelArgument",
    "SiteOption",
    "SizeOption",
    "TargetOption",
    "TextOption",
    "TokenizerOption",
    "explain",
    "is_language_model",
    "read_input",
]

ModelArgument = Annotated[
    str, typer.Argument(help="A transformers model's directory, or module:factory.", show_default=False)
]
InputArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[INPUT]", help="An image, a .npy array (batch first) or a .txt file.", show_default=False
    ),
]
TextOption = Annotated[str | None, typer.Option("--text", help="The input as text.")]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size", help='Resize images to "224" or "HEIGHTxWIDTH" pixels; they are then scaled to [0, 1].'
    ),
]
ChannelsOption = Annotated[
    int | None, typer.Option("--channels", min=1, max=3, help="Read images as grey (1) or RGB (3).")
]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="Directory of the tokenizer, where the model's has none.")
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help='Class index, label, continuation of a text, or a call: "Margin(1, 2)". Default: predicted.',
    ),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", help='"input", "embeddings", or a module path such as "layer4.1".')
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
_LARGEST = 10


def explain(
    model: ModelArgument,
    input: InputArgument = None,
    text: TextOption = None,
    target: TargetOption = None,
    method: Annotated[
        str, typer.Option("--method", help='As "pullback list" shows them: "smoothgrad(ig(steps=32))".')
    ] = "auto",
    site: SiteOption = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help='Replaces the method\'s: "zeros", "blur(sigma=5)".')
    ] = None,
    chunk: Annotated[
        str, typer.Option("--chunk", help='Rows through the model at once, or "auto".')
    ] = "auto",
    memory_budget: Annotated[
        str | None, typer.Option("--memory-budget", help='The most memory to use: "4GB".')
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Replaces the method's own.")] = None,
    size: SizeOption = None,
    channels: ChannelsOption = None,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Save the result (safetensors, read by pullback.load).")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with pictures.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain a model's score by its input: pullback explain my_models:build image.png --size 56x28.

    Nothing is downloaded; models from a factory are put in eval mode.
    """
    given = {name: value for name, value in locals().items() if name not in ("out", "html", "as_json")}
    require_folders(out, html)

    from pullback.api import explain as attribution_of
    from pullback.commands.models import load_tokenizer, named_model
    from pullback.commands.targets import parse_target
    from pullback.core.errors import InputError

    if chunk != "auto" and not chunk.isdecimal():
        raise InputError(f'--chunk is "auto" or a number of rows, such as 16; got "{chunk}".')
    named = named_model(model)
    words = load_tokenizer(tokenizer) if tokenizer is not None else None
    inputs, words, record = read_input(named, input, text, size, channels, words)
    attribution = checked(
        named.model,
        inputs,
        lambda: attribution_of(
            named.model,
            inputs,
            target=parse_target(target, words, is_language_model(named.model)),
            method=method,
            site=site,
            baseline=baseline,
            chunk=chunk if chunk == "auto" else int(chunk),
            memory_budget=memory_budget,
            seed=seed,
        ),
    )
    attribution = replace(attribution, meta={**attribution.meta, "run": run_record(given, record)})
    written = {"out": out, "html": html}
    if out is not None:
        attribution.save(out)
    if html is not None:
        attribution.to_html(html)
    if as_json:
        files = {name: str(path) for name, path in written.items() if path is not None}
        typer.echo(json.dumps({**summary(attribution), **files}, indent=2, allow_nan=False))
        return
    typer.echo(str(attribution))
    for note in attribution.diagnostics.get("notes") or ():
        typer.echo(f"note: {note}")
    for path in written.values():
        if path is not None:
            typer.echo(f"wrote {path}")


def read_input(
    named: Any, path: Path | None, text: str | None, size: str | None, channels: int | None, tokenizer: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """The model's inputs, the tokenizer that text went through (or None), and the record of both."""
    from pullback.commands.inputs import named_input
    from pullback.commands.models import load_tokenizer

    is_text = text is not None or (path is not None and path.suffix.lower() == ".txt")
    if is_text and tokenizer is None and named.directory is not None:
        tokenizer = load_tokenizer(named.directory)
    inputs, record = named_input(named, path, text, size, channels, tokenizer)
    return inputs, tokenizer, record


def checked(model: Any, inputs: Any, work: Any) -> Any:
    """``work()``; where it fails because the model does not take these inputs, an InputError says so."""
    import torch

    from pullback.core.errors import InputError

    try:
        return work()
    except (RuntimeError, TypeError, IndexError, KeyError, AttributeError, ValueError) as error:
        if type(error).__module__.startswith("pullback."):
            raise
        try:
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        except Exception as refused:
            shapes = _shapes(inputs)
            raise InputError(
                f"the model does not take this input ({shapes}): {refused}. "
                "Give another shape; images take --size and --channels."
            ) from error
        raise


def require_folders(*paths: Path | None) -> None:
    """Refuse, before any work, an output file in a folder that is not there."""
    from pullback.core.errors import InputError

    for path in paths:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(
                f"{path} cannot be written: it is a folder, or its folder does not exist. Create it first."
            )


def is_language_model(model: Any) -> bool:
    """Whether text as a target means a continuation: the model generates, or fills in masks."""
    names = getattr(getattr(model, "config", None), "architectures", None) or (type(model).__name__,)
    return any(name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")) for name in names)


def run_record(given: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked, enough to ask again: the options, the input's hash and preparation, and the command."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if value is not None
    }
    command = ["pullback", "explain", options["model"]]
    for name, value in options.items():
        if name == "input":
            command.append(value)
        elif name != "model":
            command.append(f"--{name.replace('_', '-')}={value}")
    return {**options, **record, "command": shlex.join(command)}


def summary(attribution: Attribution) -> dict[str, Any]:
    """The result as JSON types: the question, the trust, and the largest entries; the values are in --out."""
    diagnostics = attribution.diagnostics
    document: dict[str, Any] = {
        "model": attribution.meta["model"],
        "method": attribution.method,
        "site": attribution.site,
        "domain": attribution.domain,
        "labels": attribution.labels,
        "target": attribution.target.tolist()
        if hasattr(attribution.target, "tolist")
        else list(attribution.target),
        "score": _plain(attribution.score),
        **{name: _plain(diagnostics.get(name)) for name in ("gap", "converged", "evaluations")},
        "notes": list(diagnostics.get("notes") or ()),
        "seconds": attribution.meta["seconds"],
        "versions": dict(attribution.meta["versions"]),
        "run": attribution.meta.get("run"),
        "leaves": {},
    }
    for name, leaf in attribution.leaves().items():
        entry: dict[str, Any] = {"shape": list(leaf.shape), "sum": _plain(leaf.flatten(1).sum(1))}
        tokens = attribution.tokens
        if tokens and leaf.dim() == 3 and leaf.shape[1] == max(map(len, tokens)):
            sums = leaf.sum(2)
            entry["tokens"] = [
                [{"token": token, "value": _plain(value)} for token, value in zip(row, values, strict=False)]
                for row, values in zip(tokens, sums, strict=True)
            ]
        flat = leaf.flatten(1)
        largest = flat.abs().nan_to_num().topk(min(_LARGEST, flat.shape[1]), 1).indices
        shape = leaf.shape[1:]
        entry["largest"] = [
            [{"index": _place(int(at), shape), "value": _plain(values[at])} for at in row]
            for row, values in zip(largest, flat, strict=True)
        ]
        document["leaves"][name] = entry
    return document


def _place(flat: int, shape: Any) -> list[int]:
    place: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        place.insert(0, rest)
    return place


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shapes(inputs: Any) -> str:
    parts = inputs.items() if isinstance(inputs, Mapping) else [("", inputs)]
    return ", ".join(
        f"{name} {tuple(value.shape)}".strip() for name, value in parts if hasattr(value, "shape")
    )
