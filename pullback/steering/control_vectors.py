"""Control vectors for llama.cpp."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pullback.core.errors import MethodError

if TYPE_CHECKING:
    from .vector import SteeringVector

__all__ = ["write_gguf"]


def write_gguf(vector: SteeringVector, path: str | os.PathLike[str], strength: float = 1.0) -> None:
    """Write ``strength * r_l v_l`` as a GGUF control vector, one float32 tensor ``direction.<block>`` per block.

    llama.cpp adds it to every token as it is (scale="fit" here, without preserving norms) and cannot steer block 0.
    Raises MethodError for a direction there, ImportError without the ``gguf`` package.
    """
    try:
        gguf: Any = import_module("gguf")
    except ImportError as error:
        raise ImportError("writing a GGUF control vector needs the gguf package: pip install gguf") from error
    if 0 in vector.directions:
        raise MethodError(
            "llama.cpp cannot steer block 0, where the vector has a direction. Leave it out: vector[1:].to_gguf(...)"
        )
    writer = gguf.GGUFWriter(os.fspath(path), "controlvector")
    known = vector.fingerprint
    writer.add_string("controlvector.model_hint", "" if known is None else known.model_class)
    writer.add_uint32("controlvector.layer_count", len(vector.layers))
    for layer, direction in vector.directions.items():
        writer.add_tensor(f"direction.{layer}", (strength * vector.scales[layer] * direction).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
