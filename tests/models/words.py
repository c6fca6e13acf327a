"""A small local word tokenizer for the tiny models, built without any download."""

from __future__ import annotations

from typing import Any

__all__ = ["WORDS", "tokenizer"]

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
WORDS = [
    "the", "capital", "of", "France", "Italy", "is", "Paris", "Rome", "city", "New", "York", "a", "good", "bad",
    "film", "very", "not", "it", "was", "and",
]  # fmt: skip


def tokenizer(padding_side: str = "right", mask: bool = True) -> Any:
    """Words split at spaces; ids below 40, as the vocabulary of the tiny models; a mask token if asked for."""
    import tokenizers
    import transformers

    ids = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]",
        mask_token="[MASK]" if mask else None, padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
