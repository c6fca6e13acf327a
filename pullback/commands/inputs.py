"""Inputs named on the command line: an image, a ``.npy`` array, or text."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pullback.commands.models import NamedModel, load_tokenizer
from pullback.core.errors import InputError

__all__ = ["image_tensor", "named_input", "parse_size"]

# PIL modes of more than eight bits, and the value that stands for white
_DEEP = {"I;16": 65535.0, "I;16B": 65535.0, "I": 65535.0, "F": 1.0}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def named_input(
    model: NamedModel,
    path: Path | None,
    text: str | None,
    size: str | None,
    channels: int | None,
    tokenizer: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model's inputs, and the record of how they were made.

    An image becomes (1, C, H, W) in [0, 1] (then normalised as ``preprocessor_config.json`` says, where the
    model's directory has one); a ``.npy`` array is passed as it is, batch first; text is tokenized.

    Raises:
        InputError: there is no such file, it cannot be read, or it is of no known kind.
    """
    if (path is None) == (text is None):
        raise InputError('give one input: a file (image, .npy, .txt) or --text "...".')
    if path is not None and not path.is_file():
        raise InputError(f"no file {path}. Give an image, a .npy array or a .txt file.")
    record: dict[str, Any] = {} if path is None else {"sha256": sha256(path.read_bytes()).hexdigest()}
    if path is not None and path.suffix.lower() in IMAGES:
        settings = model.settings("preprocessor_config.json")
        record |= {
            "size": parse_size(size) or _saved_size(settings),
            "channels": channels or _saved_channels(model),
        }
        image = image_tensor(path, record["size"], record["channels"])
        if settings.get("do_normalize") and settings.get("image_mean"):
            record |= {"mean": settings["image_mean"], "std": settings["image_std"]}
            mean, std = (torch.tensor(record[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
            image = (image - mean) / std
        image = as_model_takes(image, model.model)
        return ({"pixel_values": image} if model.directory is not None else image), record
    if path is not None and path.suffix.lower() == ".npy":
        return as_model_takes(_array(path), model.model), record
    if path is not None and path.suffix.lower() != ".txt":
        raise InputError(
            f"{path} is of no known kind. Give an image ({' '.join(IMAGES)}), a .npy array or a .txt file."
        )
    written = text if path is None else path.read_text(encoding="utf-8", errors="replace").strip()
    if not written:
        raise InputError("the text is empty. Give at least one word.")
    if tokenizer is None:
        if model.directory is None:
            raise InputError("text needs a tokenizer, and a factory brings none: --tokenizer DIRECTORY.")
        tokenizer = load_tokenizer(model.directory)
    return tokenizer(written, return_tensors="pt"), record


def image_tensor(path: Path, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """An image file as float32 (1, C, H, W) in [0, 1].

    Args:
        size: (height, width) in pixels to resize to (bicubic, aspect not kept); None keeps the file's own.
        channels: 1 (grey) or 3 (RGB); None is 1 for grey files, else 3. Transparency is dropped.

    Raises:
        InputError: the file is no image that can be read, or too large to be one.
    """
    import numpy
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            opened: Image.Image = file
            deep = _DEEP.get(opened.mode)
            grey = channels == 1 if channels else opened.mode in ("1", "L", "LA") or deep is not None
            # PIL clips deeper pixels to bytes instead of scaling them
            opened = (
                Image.fromarray(numpy.asarray(opened, dtype=numpy.float32) * (255.0 / deep))
                if deep
                else opened
            )
            converted = opened.convert("L" if grey else "RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError) as error:
        raise InputError(f"{path} could not be read as an image: {error}. Give another file.") from None
    if size is not None:
        converted = converted.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(numpy.array(converted, dtype=numpy.float32) / 255.0)
    return (pixels[None] if grey else pixels.permute(2, 0, 1))[None].contiguous()


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels from "224" or "56x28". Raises InputError.

    >>> parse_size("224"), parse_size("56x28")
    ((224, 224), (56, 28))
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and 0 < int(part) <= 16384 for part in parts):
        raise InputError(f'--size is "224" or "HEIGHTxWIDTH" in pixels, such as "56x28"; got "{text}".')
    return int(parts[0]), int(parts[-1])


def as_model_takes(value: Tensor, model: Any) -> Tensor:
    """A value on the model's device, floating ones in the dtype of its parameters."""
    parameter = (
        next((p for p in model.parameters() if p.is_floating_point()), None)
        if isinstance(model, nn.Module)
        else None
    )
    if parameter is None:
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)


def _array(path: Path) -> Tensor:
    import numpy

    try:
        array = numpy.load(path, allow_pickle=False)
        return torch.from_numpy(numpy.ascontiguousarray(array))
    except (ValueError, OSError, EOFError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is no array of numbers: {error}. Write it with numpy.save, batch first."
        ) from None


def _saved_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    found = settings.get("crop_size") or settings.get("size")
    if isinstance(found, Mapping):
        edge = found.get("shortest_edge")
        found = (found.get("height", edge), found.get("width", edge))
    return (int(found[0]), int(found[1])) if isinstance(found, (tuple, list)) and all(found) else None


def _saved_channels(model: NamedModel) -> int | None:
    found = getattr(getattr(model.model, "config", None), "num_channels", None)
    return found if found in (1, 3) else None
