"""``pullback steer fit | apply | evaluate``: a steering vector from pairs, in use, and on trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pullback.commands.steering_files import (
    configured,
    parse_layers,
    read_pairs,
    read_questions,
    read_texts,
    save_configuration,
)

__all__ = ["steer"]

steer = typer.Typer(
    help="Fit a steering vector to pairs of answers, generate with it, evaluate it.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Argument(help="A transformers model's directory, or module:factory.")]
Vector = Annotated[Path | None, typer.Argument(help="A vector that `pullback steer fit` saved.")]
Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", help="Directory of the tokenizer, where the model's has none.")
]
Layers = Annotated[
    str | None, typer.Option("--layers", help='Blocks: "4", "4,5", "4:8", "0.5". Default: all.')
]
Strength = Annotated[
    float | None,
    typer.Option("--strength", help="Default 0.4, or chosen where there are validation questions."),
]
Scale = Annotated[str | None, typer.Option("--scale", help='"relative" (default), "fit" or "absolute".')]
Scope = Annotated[str | None, typer.Option("--scope", help='"all" (default), "prompt" or "generated".')]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Of splits, random methods and intervals. Default 0.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Rows per forward.")]
TruthfulQA = Annotated[
    Path | None,
    typer.Option("--truthfulqa", help="TruthfulQA.csv, split by --seed, instead of files of one's own."),
]
FitQuestions = Annotated[
    int | None,
    typer.Option("--fit-questions", help="Of TruthfulQA, to fit on. Default 50; the same for evaluate."),
]
ValidationQuestions = Annotated[
    int | None,
    typer.Option("--validation-questions", help="Of TruthfulQA, to choose the strength on. Default 100."),
]
Config = Annotated[Path | None, typer.Option("--config", help="Options from a file; those typed come first.")]
SaveConfig = Annotated[Path | None, typer.Option("--save-config", help="Write the options to this file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]

_SPLIT = {"fit_questions": 50, "validation_questions": 100, "seed": 0}


@steer.command("fit")
def fit_vector(
    model: Model = None,
    pairs: Annotated[
        Path | None, typer.Argument(help='JSON lines with "prompt", "preferred", "dispreferred".')
    ] = None,
    truthfulqa: TruthfulQA = None,
    fit_questions: FitQuestions = None,
    validation_questions: ValidationQuestions = None,
    method: Annotated[
        str | None, typer.Option("--method", help='"grains" (default), "mean_grad", "mean_diff", ...')
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Tokens per sign in each prompt. Default 8.")] = None,
    attribution: Annotated[
        str | None, typer.Option("--attribution", help='"ig" (default), "relp" or "gradient".')
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Of integrated gradients. Default 32.")] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help='"mask", "pad", "mean" or "zero". Default: mask, else mean.'),
    ] = None,
    layers: Layers = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    tokenizer: Tokenizer = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to save the vector. Required.")] = None,
    config: Config = None,
    save_config: SaveConfig = None,
    as_json: AsJson = False,
) -> None:
    """Fit a vector: pullback steer fit model pairs.jsonl --out vector.safetensors."""
    given = {
        name: value for name, value in locals().items() if name not in ("config", "save_config", "as_json")
    }
    defaults = {"method": "grains", "k": 8, "attribution": "ig", "steps": 32, "batch_size": 8, **_SPLIT}
    options = configured("fit", given, config, defaults)
    _require(options, "model", "out")

    from pullback.commands.explain import require_folders
    from pullback.steering import fit

    require_folders(Path(options["out"]), save_config)
    data = _data(options, options["pairs"], "pairs")
    named, words = _model(options)
    found = data["fit"] if data else read_pairs(Path(options["pairs"]))
    vector = fit(
        named, words, found, options["method"], k=options["k"], attribution=options["attribution"],
        steps=options["steps"], baseline=options["baseline"], layers=parse_layers(options["layers"]),
        batch_size=options["batch_size"], seed=options["seed"],
    )  # fmt: skip
    vector.save(options["out"])
    save_configuration(save_config, "fit", options)
    agreement = {str(each["block"]): each["pairwise"] for each in vector.provenance["agreement"]}
    document = {
        "vector": str(vector), "pairs": len(found), "completeness": vector.provenance.get("completeness"),
        "agreement": agreement, "out": str(options["out"]),
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"{vector} from {len(found)} pairs")
    if document["completeness"]:
        typer.echo(f"completeness gap: {vector.provenance['completeness']['relative_gap']:.1%}")
    for block, value in agreement.items():
        typer.echo(f"block {block}: mean cosine between pairs {value:.3f}")
    typer.echo(f"wrote {options['out']}")


@steer.command("apply")
def apply_vector(
    model: Model = None,
    vector: Vector = None,
    text: Annotated[str | None, typer.Option("--text", help="The prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Or a file with one prompt a line.")
    ] = None,
    strength: Strength = None,
    layers: Layers = None,
    scale: Scale = None,
    scope: Scope = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="To generate. Default 64.")] = None,
    batch_size: BatchSize = None,
    tokenizer: Tokenizer = None,
    config: Config = None,
    save_config: SaveConfig = None,
    as_json: AsJson = False,
) -> None:
    """Generate with and without a vector: pullback steer apply model vector.safetensors --text "Why ...?"."""
    given = {
        name: value for name, value in locals().items() if name not in ("config", "save_config", "as_json")
    }
    options = configured("apply", given, config, {**_SETTING, "tokens": 64, "batch_size": 8})
    _require(options, "model", "vector")

    from pullback.core.errors import InputError
    from pullback.steering import load
    from pullback.steering.continuations import continuations, text_of
    from pullback.steering.pairs import EncodedPair, encode_prompt
    from pullback.steering.scoring import require_eval

    if (options["text"] is None) == (options["prompts"] is None):
        raise InputError("give the prompt with --text, or a file of prompts with --prompts; one of the two.")
    asked = [options["text"]] if options["text"] is not None else read_texts(Path(options["prompts"]))
    named, words = _model(options)
    require_eval(named)
    loaded = load(options["vector"], model=named)
    at = _setting(options, loaded, named)
    encoded = []
    for number, prompt in enumerate(asked):
        ids, others = encode_prompt(f"prompt {number}", prompt, None, words)
        encoded.append(EncodedPair(number, ids, (), (), others))
    run: dict[str, Any] = {"tokens": options["tokens"], "batch_size": options["batch_size"]}
    before = continuations(named, words, encoded, **run)
    after = continuations(named, words, encoded, loaded, at, **run)
    save_configuration(save_config, "apply", options)
    rows = [
        {"prompt": prompt, "before": text_of(words, first), "after": text_of(words, second)}
        for prompt, first, second in zip(asked, before, after, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps({"strength": at.strength, "layers": at.layers, "generations": rows}, indent=2))
        return
    for row in rows:
        typer.echo(f"prompt: {row['prompt']}\nbefore: {row['before']}\nafter:  {row['after']}\n")


@steer.command("evaluate")
def evaluate_vector(
    model: Model = None,
    vector: Vector = None,
    questions: Annotated[
        Path | None, typer.Argument(help='JSON lines with "prompt", "true", "false" (lists), or pairs.')
    ] = None,
    truthfulqa: TruthfulQA = None,
    fit_questions: FitQuestions = None,
    validation_questions: ValidationQuestions = None,
    test_questions: Annotated[
        int | None, typer.Option("--test-questions", help="Of TruthfulQA, to test on. Default: all left.")
    ] = None,
    fit_pairs: Annotated[
        Path | None, typer.Option("--fit-pairs", help="What it was fitted on, for the baselines.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option("--validation", help="Questions to choose strength and blocks on.")
    ] = None,
    neutral: Annotated[
        Path | None,
        typer.Option("--neutral", help="Texts for perplexity, one a line. Default: 16 sentences."),
    ] = None,
    strength: Strength = None,
    layers: Layers = None,
    scale: Scale = None,
    scope: Scope = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", help='Text before the prompts, for the baseline "prompt".')
    ] = None,
    random_draws: Annotated[
        int | None, typer.Option("--random-draws", help="Random directions for the band. Default 20.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Largest perplexity ratio. Default 1.05.")
    ] = None,
    generations: Annotated[
        int | None, typer.Option("--generations", help="Prompts to continue, before and after. Default 4.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Of each continuation. Default 32.")] = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    tokenizer: Tokenizer = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write everything as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the rows as CSV.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with tables and curves.")] = None,
    config: Config = None,
    save_config: SaveConfig = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a vector on new questions: pullback steer evaluate model vector.safetensors questions.jsonl."""
    given = {
        name: value for name, value in locals().items() if name not in ("config", "save_config", "as_json")
    }
    defaults = {
        **_SETTING, **_SPLIT, "random_draws": 20, "budget": 1.05, "generations": 4, "tokens": 32, "batch_size": 16,
    }  # fmt: skip
    options = configured("evaluate", given, config, defaults)
    _require(options, "model", "vector")
    files = {name: Path(options[name]) for name in ("out", "csv", "html") if options[name] is not None}

    from pullback.commands.explain import require_folders
    from pullback.core.errors import InputError
    from pullback.datasets import neutral_sentences
    from pullback.steering import evaluate, load, sweep

    require_folders(*files.values(), save_config)
    data = _data(options, options["questions"], "questions")
    named, words = _model(options)
    loaded = load(options["vector"], model=named)
    texts = neutral_sentences() if options["neutral"] is None else read_texts(Path(options["neutral"]))
    tested = data["test"] if data else read_questions(Path(options["questions"]))
    pairs = data["fit"] if data else _read(options["fit_pairs"], read_pairs)
    if options["strength"] is not None and options["validation"] is not None:
        raise InputError("--strength is given, and --validation to choose it on; give one of the two.")
    chosen_on = _read(options["validation"], read_questions)
    if data and options["strength"] is None:
        chosen_on = data["validation"]
    setting: Any = _setting(options, loaded, named)
    swept = None
    if chosen_on is not None:
        setting = swept = sweep(
            named, words, loaded, chosen_on, neutral=texts, budget=options["budget"], setting=setting,
            layers=None if setting.layers is None else [list(setting.layers)], batch_size=options["batch_size"],
        )  # fmt: skip
    found = evaluate(
        named, words, loaded, tested, setting=setting, fit_pairs=pairs, neutral=texts, budget=options["budget"],
        instruction=options["instruction"], random_draws=options["random_draws"], seed=options["seed"],
        generations=options["generations"], tokens=options["tokens"], batch_size=options["batch_size"],
    )  # fmt: skip
    save_configuration(save_config, "evaluate", options)
    if "out" in files:
        found.to_json(files["out"])
    if "csv" in files:
        found.to_csv(files["csv"])
    if "html" in files:
        from pullback.steering import write_steering_report

        write_steering_report(
            files["html"], found, loaded, sweep=swept, pairs=pairs, tokenizer=words, model=named
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    typer.echo(found.to_markdown())
    for path in files.values():
        typer.echo(f"wrote {path}")


_SETTING = {"scale": "relative", "scope": "all"}
_STRENGTH = 0.4


def _require(options: dict[str, Any], *names: str) -> None:
    from pullback.core.errors import InputError

    for name in names:
        if options[name] is None:
            what = "--out FILE" if name == "out" else f"the {name}, as an argument or in --config"
            raise InputError(f"there is no {name}; give {what}.")


def _model(options: dict[str, Any]) -> tuple[Any, Any]:
    """The model and its tokenizer; None where it has none, so that files hold token ids."""
    from pullback.commands.models import load_tokenizer, named_model

    named = named_model(options["model"])
    if options["tokenizer"] is not None:
        return named.model, load_tokenizer(Path(options["tokenizer"]))
    directory = named.directory
    has = directory is not None and any(directory.glob("tokenizer*"))
    return named.model, load_tokenizer(directory) if directory is not None and has else None


def _setting(options: dict[str, Any], vector: Any, model: Any) -> Any:
    from pullback.steering import Setting, find_blocks
    from pullback.steering.blocks import select_layers

    wanted = parse_layers(options["layers"])
    layers = None if wanted is None else tuple(select_layers(wanted, len(find_blocks(model))))
    if layers is not None:
        vector.select(list(layers))  # refuses blocks without a direction
    strength = _STRENGTH if options["strength"] is None else options["strength"]
    return Setting(strength, layers, options["scale"], options["scope"])


def _data(options: dict[str, Any], path: Any, name: str) -> dict[str, list[Any]] | None:
    """TruthfulQA's parts, where it was asked for; exactly one of it and a file is needed."""
    from pullback.core.errors import InputError

    if (options["truthfulqa"] is None) == (path is None):
        raise InputError(f"give a file of {name}, or --truthfulqa TruthfulQA.csv; one of the two.")
    if options["truthfulqa"] is None:
        return None
    from pullback.datasets import load_truthfulqa, split_questions
    from pullback.steering import truthful_pairs, truthful_questions

    split = split_questions(
        load_truthfulqa(options["truthfulqa"]), options["fit_questions"], options["validation_questions"],
        options.get("test_questions"), seed=options["seed"],
    )  # fmt: skip
    return {
        "fit": truthful_pairs(split.fit),
        "validation": truthful_questions(split.validation),
        "test": truthful_questions(split.test),
    }


def _read(path: Any, reader: Any) -> Any:
    return None if path is None else reader(Path(path))
