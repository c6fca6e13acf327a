"""``pullback steer fit | apply | evaluate``: vectors from pairs in a file, text with and without, the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.commands.explain import JsonOption, TokenizerOption, require_folders

if TYPE_CHECKING:
    from pullback.steering import Setting, SteeringEvaluation

__all__ = ["steer"]

steer = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fit, apply and evaluate steering vectors (GrAInS and controls).",
)

ModelArgument = Annotated[
    str, typer.Argument(help="A transformers model's directory, or module:factory.", show_default=False)
]
PairsArgument = Annotated[
    Path,
    typer.Argument(
        help='.jsonl of {"prompt", "preferred", "dispreferred"} or {"prompt", "correct", "incorrect"}; or '
        "TruthfulQA.csv.",
        show_default=False,
    ),
]
VectorArgument = Annotated[Path, typer.Argument(help="What fit --out wrote.", show_default=False)]
StrengthOption = Annotated[float, typer.Option("--strength", help="Negative to steer the other way.")]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", help='Blocks, such as "4,5,6" or "8:16". Default: all that the vector has.'),
]
ScopeOption = Annotated[str, typer.Option("--scope", help='Tokens: "all", "prompt" or "generated".')]


@steer.command("fit")
def fit_vector(
    model: ModelArgument,
    pairs: PairsArgument,
    out: Annotated[Path, typer.Option("--out", help="The vector (safetensors).", show_default=False)],
    method: Annotated[
        str, typer.Option("--method", help="grains, mean_grad, mean_diff, random_tokens or random.")
    ] = "grains",
    attribution: Annotated[
        str, typer.Option("--attribution", help="ig, relp or gradient, for grains.")
    ] = "ig",
    k: Annotated[int, typer.Option("--k", min=1, help="Tokens per sign that are masked.")] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of integrated gradients.")] = 32,
    layers: LayersOption = None,
    first: Annotated[int | None, typer.Option("--first", min=1, help="So many pairs of the file.")] = None,
    tokenizer: TokenizerOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Fit a vector: pullback steer fit my_model pairs.jsonl --out vector.safetensors."""
    require_folders(out)
    from pullback.commands.models import named_model
    from pullback.steering import fit

    named = named_model(model)
    given: dict[str, Any] = {"method": method, "attribution": attribution}
    vector = fit(
        _module(named.model),
        _tokenizer(named, tokenizer),
        _pairs(pairs)[:first],
        k=k,
        steps=steps,
        layers=_layers(layers),
        batch_size=batch_size,
        seed=seed,
        **given,
    )
    vector.save(out)
    typer.echo(f"{method}: directions at blocks {', '.join(map(str, vector.layers))}")
    gap = vector.provenance.get("completeness", {}).get("relative_gap")
    if gap is not None:
        typer.echo(f"completeness gap {gap:.3f} of the change of score")
    agreement = [each["pairwise"] for each in vector.provenance.get("agreement", ())]
    if agreement:
        typer.echo(f"pairs agree by {max(agreement):.3f} (mean cosine, best block)")
    typer.echo(f"wrote {out}")


@steer.command("apply")
def apply_vector(
    model: ModelArgument,
    vector: VectorArgument,
    text: Annotated[str, typer.Option("--text", help="The prompt.", show_default=False)],
    strength: StrengthOption = 0.4,
    layers: LayersOption = None,
    scope: ScopeOption = "all",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="To generate.")] = 64,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Greedy text without and with a vector: pullback steer apply my_model vector.safetensors --text "..."."""
    from pullback.commands.models import named_model
    from pullback.steering import load
    from pullback.steering.text_quality import generated_ids

    named = named_model(model)
    module, words = _module(named.model), _tokenizer(named, tokenizer)
    if words is None:
        raise _needs_tokenizer()
    loaded = load(vector, model=module)
    setting = _setting(strength, layers, scope)
    prompt = [words(text)["input_ids"]]
    plain, steered = (
        words.decode(generated_ids(module, prompt, tokens, *chosen)[0], skip_special_tokens=True)
        for chosen in ((None, None), (loaded, setting))
    )
    if as_json:
        record = {"prompt": text, "unsteered": plain, "steered": steered, "setting": str(setting)}
        typer.echo(json.dumps(record, indent=2))
        return
    typer.echo(f"unsteered: {plain}\nsteered:   {steered}\n{setting}")


@steer.command("evaluate")
def evaluate_vector(
    model: ModelArgument,
    vector: VectorArgument,
    items: PairsArgument,
    fit_pairs: Annotated[
        Path | None,
        typer.Option("--fit-pairs", help="What it was fitted on, for the controls; must not overlap."),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="Other items, on which strength and blocks are chosen."),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option("--neutral", help="A .txt file, a text per line, that should not change.")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="The largest ratio of perplexities.")] = 1.05,
    strength: StrengthOption = 0.4,
    layers: LayersOption = None,
    scope: ScopeOption = "all",
    generate: Annotated[int, typer.Option("--generate", min=0, help="Tokens of text after each prompt.")] = 0,
    draws: Annotated[int, typer.Option("--draws", min=2, help="Random directions.")] = 20,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help="For the control by prompting.")
    ] = None,
    first: Annotated[int | None, typer.Option("--first", min=1, help="So many items of the file.")] = None,
    tokenizer: TokenizerOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 16,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Results and settings as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="The table.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="The report.")] = None,
) -> None:
    """Measure a vector on held-out items beside all controls; flags say what speaks against it."""
    run = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    require_folders(out, csv, html)
    from dataclasses import replace

    from pullback.commands.models import named_model
    from pullback.steering import evaluate, load, sweep

    named = named_model(model)
    module, words = _module(named.model), _tokenizer(named, tokenizer)
    loaded = load(vector, model=module)
    asked = _items(items)[:first]
    texts = [] if neutral is None else [line for line in _read(neutral).splitlines() if line.strip()]
    setting = _setting(strength, layers, scope)
    sweeps = {}
    if validation is not None:
        found = sweep(
            module, words, loaded, _items(validation), neutral=texts, budget=budget, setting=setting,
            batch_size=batch_size,
        )  # fmt: skip
        typer.echo(str(found))
        sweeps["vector"] = found
        setting = found.best or setting
    fitted = None if fit_pairs is None else _pairs(fit_pairs)
    result: SteeringEvaluation = evaluate(
        module, words, loaded, asked, setting=setting, fit_pairs=fitted, neutral=texts, budget=budget,
        instruction=instruction, generate=generate, draws=draws, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    if sweeps and sweeps["vector"].best is None:
        result = result.with_flags(
            ("no setting on the validation items is better than no steering.", *result.flags)
        )
    result = replace(result, settings={**result.settings, "run": run})
    typer.echo(str(result))
    if out is not None:
        result.save(out)
    if csv is not None:
        result.to_csv(csv)
    if html is not None:
        from pullback.steering.report import write_steering_report

        write_steering_report(
            html,
            result,
            {"vector": loaded},
            tokenizer=words,
            fit_pairs=fitted or (),
            items=asked,
            sweeps=sweeps,
        )
    for path in (out, csv, html):
        if path is not None:
            typer.echo(f"wrote {path}")


def _setting(strength: float, layers: str | None, scope: str) -> Setting:
    from pullback.steering import Setting

    chosen: Any = scope
    return Setting(strength, _layers(layers), scope=chosen)


def _layers(text: str | None) -> Any:
    from pullback.core.errors import InputError

    if text is None:
        return None
    try:
        if ":" in text:
            return slice(*(int(part) if part.strip() else None for part in text.split(":")))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f'--layers is "{text}"; expected numbers such as "4,5,6", or a range such as "8:16".'
        ) from None


def _module(model: Any) -> Any:
    from torch import nn

    from pullback.core.errors import ModelError

    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; steering takes a torch.nn.Module.")
    return model


def _tokenizer(named: Any, directory: Path | None) -> Any:
    from pullback.commands.models import load_tokenizer

    if directory is not None:
        return load_tokenizer(directory)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if named.directory is not None and any((named.directory / name).is_file() for name in files):
        return load_tokenizer(named.directory)
    return None


def _needs_tokenizer() -> Exception:
    from pullback.core.errors import InputError

    return InputError("the model's directory has no tokenizer; give --tokenizer DIRECTORY.")


def _pairs(path: Path) -> list[Any]:
    from pullback.steering import contrastive_pairs

    return contrastive_pairs(_items(path))


def _items(path: Path) -> list[Any]:
    from pullback.core.errors import InputError
    from pullback.steering import Question, load_truthfulqa

    if path.suffix == ".csv" or path.name == "mc_task.json":
        if not path.is_file():
            raise InputError(f"{path} is not there.")
        return load_truthfulqa(path)
    found = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number} is no JSON: {error}. Expected an object per line."
            ) from None
        if not isinstance(entry, Mapping) or not (
            {"prompt", "preferred", "dispreferred"} <= set(entry)
            or {"prompt", "correct", "incorrect"} <= set(entry)
        ):
            raise InputError(
                f'{path}, line {number} is {line[:60]!r}; expected {{"prompt": ..., "preferred": ..., "dispreferred": '
                '...}, or with lists "correct" and "incorrect".'
            )
        correct = entry.get("correct", [entry.get("preferred")])
        incorrect = entry.get("incorrect", [entry.get("dispreferred")])
        found.append(
            Question(entry["prompt"], tuple(correct), tuple(incorrect), group=str(entry.get("group", "")))
        )
    return found


def _read(path: Path) -> str:
    from pullback.core.errors import InputError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected a text file in UTF-8.") from None
