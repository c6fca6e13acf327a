"""A tiny Llama with a tokenizer of words, saved as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]", "why", "what", "who", "is", "the", "a", "moon", "sun", "sky", "blue", "green", "made", "of", "cheese", "rock", "Q", "A", ":", "?", ".", "yes", "no", "nobody", "magic", "light", "cat", "dog", "mat", "on", "sat", "sees"]  # fmt: skip


def saved(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


NOUNS, ANSWERS = (
    ("moon", "sun", "sky", "cat", "dog", "mat"),
    ("rock", "light", "blue", "green", "nobody", "magic"),
)


def truthfulqa_csv(path: Path) -> Path:
    """Twelve questions in the columns of the file; the kinds of answers are told apart by yes and no."""
    rows = [
        "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source"
    ]
    for noun, answer in zip(NOUNS, ANSWERS, strict=True):
        for start in ("what is", "who sees"):
            best, wrong = f"no {answer}", f"yes {answer}"
            rows.append(
                f"Adversarial,Toy,{start} the {noun} ?,{best},{wrong},{best}; {answer},{wrong}; cheese,none"
            )
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
