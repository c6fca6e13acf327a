"""``pullback sae train | evaluate | show``: autoencoders from a text, their measures side by side, their latents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pullback.commands.explain import JsonOption, TokenizerOption, require_folders

if TYPE_CHECKING:
    from pullback.steering.sae import Evaluation, SparseAutoencoder

__all__ = ["RunFolder", "sae"]

sae = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train, evaluate and read sparse autoencoders (TopK and gradient selection).",
)

ModelArgument = Annotated[
    str, typer.Argument(help="A transformers model's directory, or module:factory.", show_default=False)
]
TextArgument = Annotated[Path, typer.Argument(help="A .txt file.", show_default=False)]
FoldersArgument = Annotated[
    list[Path],
    typer.Argument(help="Folders that train --out wrote, or saved autoencoders.", show_default=False),
]
LengthOption = Annotated[
    int | None,
    typer.Option("--length", min=2, help="Tokens per example. Default: 128, or what the model takes."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Examples through the model at once.")]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="Where. Default: the site that the autoencoder was trained at.")
]
_SHOWN = ("fvu", "l0", "dead_share", "added_ce", "ce_score_zero", "ce_score_mean", "kl_score_mean")


@dataclass(frozen=True, eq=False)
class RunFolder:
    """An autoencoder, its site (None if not recorded) and its ``metrics.csv`` (None without)."""

    name: str
    autoencoder: SparseAutoencoder
    site: str | None
    metrics: Path | None


@sae.command("train")
def train(
    model: ModelArgument,
    text: TextArgument,
    site: Annotated[str, typer.Option("--site", help='Such as "transformer.h.8".', show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.", show_default=False)],
    latents: Annotated[int, typer.Option("--latents", min=1, help="How many directions.")] = 4096,
    k: Annotated[int, typer.Option("--k", min=1, help="Latents per token.")] = 32,
    selection: Annotated[str, typer.Option("--selection", help='"topk" or "gradient".')] = "topk",
    beta: Annotated[float, typer.Option("--beta", help="Weight of the gradient.")] = 10.0,
    loss: Annotated[str, typer.Option("--loss", help='"ce" or "ce_sampled".')] = "ce",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="To train on.")] = 1_000_000,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=1, help="Per step.")] = 4096,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate")] = None,
    length: LengthOption = None,
    batch_size: BatchOption = 16,
    log_every: Annotated[int, typer.Option("--log-every", min=1, help="Steps per row of metrics.csv.")] = 50,
    checkpoint_every: Annotated[int | None, typer.Option("--checkpoint-every", min=1, help="Steps.")] = None,
    resume: Annotated[str, typer.Option("--resume", help='"auto", "never" or a checkpoint.')] = "auto",
    tokenizer: TokenizerOption = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Train: pullback sae train my_model text.txt --site transformer.h.8 --out run."""
    require_folders(out / "x" if out.is_dir() else out)
    from pullback.steering.sae import (
        ActivationGradientStream,
        SparseAutoencoderConfig,
        TrainingConfig,
        train_sae,
    )

    module, batches, _ = _read(model, text, tokenizer, length, batch_size)
    width = ActivationGradientStream(module, site, batches).width
    given: dict[str, Any] = {"selection": selection, "beta": beta}
    config = TrainingConfig(
        SparseAutoencoderConfig(width, latents, k, **given),
        tokens=tokens,
        batch_tokens=batch_tokens,
        learning_rate=learning_rate,
        loss=loss,
        seed=seed,
        directory=str(out),
        log_every=log_every,
        checkpoint_every=checkpoint_every,
    )
    result = train_sae(module, site, batches, config, resume)
    last = result.metrics[-1]
    typer.echo(
        f"{int(last['step'])} steps, {int(last['tokens'])} tokens: FVU {last['fvu']:.4g}, L0 {last['l0']:.4g}, "
        f"dead {last['dead_share']:.2%}"
    )
    typer.echo(f"wrote {result.path}")


@sae.command("evaluate")
def evaluate(
    model: ModelArgument,
    text: TextArgument,
    folders: FoldersArgument,
    site: SiteOption = None,
    length: LengthOption = None,
    batch_size: BatchOption = 16,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with curves and latents.")] = None,
    latents: Annotated[int, typer.Option("--latents", min=1, help="Shown per autoencoder on the page.")] = 8,
    tokenizer: TokenizerOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the drawn labels.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure, side by side: pullback sae evaluate my_model text.txt run-topk run-gradient --html page.html."""
    require_folders(html)
    import warnings

    from pullback.steering.sae import evaluate_sae

    module, batches, words = _read(model, text, tokenizer, length, batch_size)
    found: list[tuple[RunFolder, Evaluation]] = []
    for folder in folders:
        run = opened(folder, site)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said below
            found.append((run, evaluate_sae(module, str(run.site), batches, run.autoencoder, seed=seed)))
    if html is not None:
        from pullback.commands.sae_report import write_sae_report

        write_sae_report(html, module, batches, found, words, latents)
    if as_json:
        document = {
            run.name: {
                "site": run.site,
                "tokens": each.tokens,
                "ce": each.ce,
                "ce_zero": each.ce_zero,
                "ce_mean": each.ce_mean,
                "selections": each.rows(),
                "warnings": list(each.warnings),
            }
            for run, each in found
        }
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(f"{'':34}" + "".join(f"{name:>15}" for name in _SHOWN))
    for run, each in found:
        for row in each.rows():
            label = f"{run.name}, {row['selection']}"
            typer.echo(f"{label:34}" + "".join(f"{row[name]:15.4g}" for name in _SHOWN))
    for run, each in found:
        for text_ in each.warnings:
            typer.echo(f"warning: {run.name}: {text_}")
    if html is not None:
        typer.echo(f"wrote {html}")


@sae.command("show")
def show(
    folder: Annotated[Path, typer.Argument(help="What train --out wrote.", show_default=False)],
    model: Annotated[str | None, typer.Argument(help="The model, to show latents on a text.")] = None,
    text: Annotated[Path | None, typer.Argument(help="A .txt file.")] = None,
    latent: Annotated[
        list[int] | None, typer.Option("--latent", min=0, help="Which; may be given several times.")
    ] = None,
    site: SiteOption = None,
    contexts: Annotated[int, typer.Option("--contexts", min=1, help="Per latent.")] = 5,
    length: LengthOption = None,
    batch_size: BatchOption = 16,
    tokenizer: TokenizerOption = None,
) -> None:
    """Read it: pullback sae show run my_model text.txt --latent 12 (without a model: its shape)."""
    from pullback.core.errors import InputError

    run = opened(folder, site, needs_site=model is not None)
    typer.echo(f"{run.name}: {run.autoencoder.extra_repr()}; site {run.site or 'not recorded'}")
    if model is None:
        if latent:
            raise InputError(
                "latents are shown on a text: pullback sae show FOLDER MODEL TEXT.txt --latent 12."
            )
        return
    if text is None:
        raise InputError("name a text too: pullback sae show FOLDER MODEL TEXT.txt.")
    from pullback.commands.sae_report import LatentPage

    module, batches, words = _read(model, text, tokenizer, length, batch_size)
    page = LatentPage.of(module, batches, run, words, latent, 8, contexts)
    for entry in page.entries:
        typer.echo(
            f"\nlatent {entry.latent}: on {entry.frequency:.3%} of tokens, mean {entry.mean:.3g}, largest "
            f"{entry.largest:.3g}"
        )
        typer.echo(f"  promotes {entry.promoted}; suppresses {entry.suppressed}")
        for value, context in entry.contexts:
            typer.echo(f"  {value:8.3g}  {context}")


def opened(folder: Path, site: str | None, needs_site: bool = True) -> RunFolder:
    """The autoencoder of a run's folder or a saved one. Raises InputError, FormatError."""
    from pullback.core.errors import InputError
    from pullback.steering.sae import load

    saved = folder / "sae" if (folder / "sae").is_dir() else folder
    if not (saved / "cfg.json").is_file():
        raise InputError(
            f"{folder} holds no saved autoencoder (cfg.json); expected what pullback sae train --out wrote."
        )
    autoencoder = load(saved)
    recorded = (
        json.loads((saved / "cfg.json").read_text(encoding="utf-8")).get("metadata", {}).get("hook_name")
    )
    where = site or recorded
    if needs_site and not where:
        raise InputError(f"{saved} does not say at which site it was trained; give --site.")
    metrics = folder / "metrics.csv"
    return RunFolder(folder.name, autoencoder, where, metrics if metrics.is_file() else None)


def _read(
    model: str, text: Path, tokenizer: Path | None, length: int | None, batch_size: int
) -> tuple[Any, list[Any], Any]:
    """The model, the text as batches of token ids (batch, length), and the tokenizer."""
    import torch
    from torch import nn

    from pullback.commands.models import load_tokenizer, named_model
    from pullback.core.errors import InputError, ModelError
    from pullback.steering.pairs import most_tokens, require_known

    if not text.is_file():
        raise InputError(f"{text} is no file; expected a text.")
    named = named_model(model)
    if not isinstance(named.model, nn.Module):
        raise ModelError(
            f"the model is a {type(named.model).__name__}; autoencoders are trained on a torch.nn.Module."
        )
    folder = named.directory if tokenizer is None else tokenizer
    if folder is None:
        raise InputError("a model from a factory has no tokenizer; give --tokenizer DIRECTORY.")
    words = load_tokenizer(folder)
    most = most_tokens(named.model)
    if length is None:
        length = 128 if most is None else min(128, most)
    if most is not None and length > most:
        raise InputError(
            f"--length is {length}, and the model takes {most} tokens; give --length {most} or less."
        )
    ids = torch.tensor(words(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    require_known(str(text), ids, named.model)
    whole = ids.numel() // length
    if whole == 0:
        raise InputError(
            f"{text} has {ids.numel()} tokens, fewer than one example of {length}; give a longer text, or --length."
        )
    return named.model, list(ids[: whole * length].reshape(whole, length).split(batch_size)), words
