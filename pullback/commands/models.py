"""Models named on the command line: a ``transformers`` directory or ``module:factory``; no download."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from pullback.core.errors import InputError, ModelError, nearest

__all__ = ["NamedModel", "load_tokenizer", "named_model"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_TASKS = {"LMHeadModel": "CausalLM", "ForPreTraining": "PreTraining"}


@dataclass(frozen=True, eq=False)
class NamedModel:
    """A model in eval mode and, where it came from a directory, that directory."""

    model: Callable[..., Any]
    directory: Path | None = None

    def settings(self, name: str) -> dict[str, Any]:
        """A JSON file beside the model's weights; empty where there is none."""
        path = None if self.directory is None else self.directory / name
        if path is None or not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"{path} is not JSON: {error}. Save the model again with save_pretrained."
            ) from None
        return found if isinstance(found, dict) else {}


def named_model(text: str) -> NamedModel:
    """The model a command line names, in eval mode.

    Args:
        text: the directory that ``save_pretrained`` wrote, or ``module:factory``: a function of nothing
            that returns the model (or the model itself), importable from the current directory.

    Raises:
        ModelError: there is no such directory, module or factory, or loading failed.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        return NamedModel(_pretrained(path), path)
    if _FACTORY.fullmatch(text) is None:
        raise ModelError(
            f'"{text}" is neither a directory nor module:factory. Give the directory of a transformers model '
            '(nothing is downloaded), or for example "my_models:build".'
        )
    model = _built(*text.split(":"))
    if isinstance(model, nn.Module):
        model.eval()
    elif not callable(model):
        raise ModelError(
            f'"{text}" gave a {type(model).__name__}. A factory returns an nn.Module or a function.'
        )
    return NamedModel(model)


def _built(module_name: str, attribute: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ModelError(f'importing "{module_name}" failed: {error}. Install what it needs.') from None
        raise ModelError(
            f'no module "{module_name}" here ({here}) or on PYTHONPATH. Run where it can be imported.'
        ) from None
    except AttributeError:
        names = [
            name for name, value in vars(importlib.import_module(module_name)).items() if callable(value)
        ]
        raise ModelError(
            f'"{module_name}" has no "{attribute}". Nearest: {nearest(attribute, names)}.'
        ) from None
    except Exception as error:
        raise ModelError(f'importing "{module_name}" failed with {type(error).__name__}: {error}.') from error
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise ModelError(
            f'"{module_name}:{attribute}" failed with {type(error).__name__}: {error}. '
            "A factory is called without arguments."
        ) from error


def _pretrained(directory: Path) -> nn.Module:
    transformers = _transformers()
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{directory} has no config.json. Give a directory that model.save_pretrained wrote."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        architecture = next(iter(config.architectures or ()), "")
        # safetensors only: other weight files are pickles, which run code when read
        model: nn.Module = _auto_class(transformers, architecture).from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{directory} could not be loaded: {error}. Expected config.json and model.safetensors, "
            "as model.save_pretrained writes them."
        ) from error
    return model.eval()


def _auto_class(transformers: Any, architecture: str) -> Any:
    """``AutoModelFor...`` by the ending of the architecture's name, else ``AutoModel``.

    >>> class known: AutoModel, AutoModelForCausalLM = "any", "text"
    >>> _auto_class(known, "GPT2LMHeadModel"), _auto_class(known, "BertModel")
    ('text', 'any')
    """
    for ending, task in _TASKS.items():
        if architecture.endswith(ending):
            return getattr(transformers, f"AutoModelFor{task}")
    task = architecture.rpartition("For")[2] if "For" in architecture else ""
    return (
        getattr(transformers, f"AutoModelFor{task}", transformers.AutoModel)
        if task
        else transformers.AutoModel
    )


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer saved in a directory. Raises InputError where there is none."""
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"no tokenizer could be loaded from {directory}: {error}. "
            "Save it there with tokenizer.save_pretrained, or name its directory: --tokenizer DIRECTORY."
        ) from error


@lru_cache(maxsize=1)
def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import transformers
    except ImportError:
        raise ModelError("a model directory needs transformers: pip install 'pullback[hf]'.") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
