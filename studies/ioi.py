"""Indirect-object identification: generated sentences, and small language models trained to solve them.

"Then Mary and John went to the store . John gave a book to" is answered by Mary. A sentence is a template with two
names A and B, in that order or the other, a place and an object; the giver S is one of the two, the answer the other.
Held out: pairs of names and whole templates that training never shows. Every name is seen in training.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEMPLATES = [
    "then {a} and {b} went to the {place} . {s} gave a {thing} to",
    "when {a} and {b} were at the {place} , {s} handed the {thing} to",
    "after {a} met {b} near the {place} , {s} passed a {thing} to",
    "while {a} and {b} sat in the {place} , {s} offered one {thing} to",
    "{a} and {b} had fun at the {place} . later {s} brought the {thing} to",
    "at the {place} {a} talked with {b} . {s} decided to give this {thing} to",
    "once {a} and {b} worked at the {place} , {s} showed the {thing} to",
    "the {place} was where {a} and {b} met , and {s} sold a {thing} to",
    # held out
    "because {a} and {b} were in the {place} , {s} gave the {thing} to",
    "later {a} and {b} went to the {place} , and {s} handed a {thing} to",
]
HELD_OUT_TEMPLATES = (8, 9)
NAMES = [
    *("mary", "john", "tom", "james", "dan", "sid", "martin", "amy", "anna", "paul", "lucy", "mark", "emma"),
    *(
        "peter",
        "sarah",
        "david",
        "laura",
        "simon",
        "kate",
        "adam",
        "julia",
        "henry",
        "alice",
        "frank",
        "oscar",
    ),
]
PLACES = ["store", "park", "school", "house", "garden", "station", "office", "museum"]
THINGS = ["book", "ball", "drink", "apple", "letter", "ring", "map", "key"]
LENGTH = max(len(template.split()) for template in TEMPLATES) + 1  # a start token


def _vocabulary() -> dict[str, int]:
    words = [word for template in TEMPLATES for word in template.split() if not word.startswith("{")]
    return {
        word: number
        for number, word in enumerate(dict.fromkeys(["<pad>", "<start>", *NAMES, *PLACES, *THINGS, *words]))
    }


VOCABULARY = _vocabulary()


def held_out_pairs() -> set[frozenset[str]]:
    """A fifth of all pairs of names, never together in training."""
    pairs = [frozenset(pair) for pair in itertools.combinations(NAMES, 2)]
    return set(random.Random(0).sample(pairs, len(pairs) // 5))


@dataclass(frozen=True)
class Sentences:
    """Token ids (N, LENGTH), padded on the left, with their masks and answers; and the other name, which is wrong."""

    tokens: Tensor
    mask: Tensor
    answer: Tensor
    wrong: Tensor


def encode(sentences: list[tuple[str, str, str]]) -> Sentences:
    """(text, answer, wrong name) triples as tensors."""
    rows = [[VOCABULARY["<start>"]] + [VOCABULARY[word] for word in text.split()] for text, _, _ in sentences]
    tokens = torch.tensor([[0] * (LENGTH - len(row)) + row for row in rows])
    answer = torch.tensor([VOCABULARY[answer] for _, answer, _ in sentences])
    wrong = torch.tensor([VOCABULARY[wrong] for _, _, wrong in sentences])
    return Sentences(tokens, (tokens > 0).long(), answer, wrong)


def write(template: int, first: str, second: str, giver: str, place: str, thing: str) -> tuple[str, str, str]:
    """One sentence, its answer and the wrong name."""
    text = TEMPLATES[template].format(a=first, b=second, s=giver, place=place, thing=thing)
    return text, second if giver == first else first, giver


def training_batch(chance: random.Random, size: int) -> Sentences:
    """Sentences of training templates and training pairs."""
    held = held_out_pairs()
    templates = [number for number in range(len(TEMPLATES)) if number not in HELD_OUT_TEMPLATES]
    found = []
    while len(found) < size:
        first, second = chance.sample(NAMES, 2)
        if frozenset((first, second)) in held:
            continue
        words = chance.choice(PLACES), chance.choice(THINGS)
        found.append(write(chance.choice(templates), first, second, chance.choice((first, second)), *words))
    return encode(found)


def held_out(count: int, templates: tuple[int, ...], seed: int = 1) -> tuple[Sentences, Sentences]:
    """Clean sentences of held-out pairs, and corrupted ones in which the other name gives: equal but for one token."""
    chance = random.Random(seed)
    pairs = sorted(sorted(pair) for pair in held_out_pairs())
    clean, corrupted = [], []
    for number in range(count):
        first, second = chance.sample(chance.choice(pairs), 2)
        words = chance.choice(PLACES), chance.choice(THINGS)
        giver = chance.choice((first, second))
        other = second if giver == first else first
        template = templates[number % len(templates)]
        clean.append(write(template, first, second, giver, *words))
        corrupted.append(write(template, first, second, other, *words))
    return encode(clean), encode(corrupted)


def build(kind: str, seed: int, layers: int, width: int) -> nn.Module:
    """A GPT-2 or a Llama of that depth and width."""
    import transformers

    torch.manual_seed(seed)
    shared = {
        "vocab_size": len(VOCABULARY),
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.5 * width**-0.5,
    }
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=width, n_layer=layers, n_head=4, n_positions=LENGTH,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
            )
        )  # fmt: skip
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=width * 8 // 3, max_position_embeddings=LENGTH, **shared,
        )
    )  # fmt: skip


def logits(model: nn.Module, sentences: Sentences) -> Tensor:
    """(N, LENGTH, vocabulary) logits after each word."""
    places = (sentences.mask.cumsum(1) - 1).clamp_min(0)
    found: Tensor = model(
        input_ids=sentences.tokens, attention_mask=sentences.mask, position_ids=places
    ).logits
    return found


def loss_of(model: nn.Module, sentences: Sentences) -> tuple[Tensor, Tensor]:
    """The answer's cross-entropy, and that of every next word: without it deep GPT-2s stay on a plateau."""
    found = logits(model, sentences)
    words = sentences.tokens[:, 1:].masked_fill(sentences.mask[:, 1:] == 0, -100)
    every = F.cross_entropy(found[:, :-1].flatten(0, 1), words.flatten(), ignore_index=-100)
    return F.cross_entropy(found[:, -1], sentences.answer), every


@torch.no_grad()
def accuracy(model: nn.Module, sentences: Sentences) -> float:
    """How often the answer's logit is above the wrong name's and every other word's."""
    return float((logits(model, sentences)[:, -1].argmax(1) == sentences.answer).double().mean())


def trained(
    kind: str,
    seed: int,
    *,
    layers: int = 8,
    width: int = 64,
    steps: int = 2000,
    rows: int = 64,
    checkpoint: Path | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """A model trained until it solves held-out pairs and templates, or for ``steps``; resumed from ``checkpoint``.

    Returns the model in eval mode and its accuracies: on training-like sentences, held-out pairs, held-out templates.
    """
    from safetensors.torch import load_model, save_model

    model = build(kind, seed, layers, width)
    if checkpoint is not None and checkpoint.exists():
        load_model(model, checkpoint)
        return model.eval(), accuracies(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    chance = random.Random(seed)
    streak = 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100)
        batch = training_batch(chance, rows)
        model.train()
        loss, every = loss_of(model, batch)
        optimizer.zero_grad()
        (loss + every).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            found = accuracies(model.eval())
            print(f"{kind} seed {seed} step {step + 1}: loss {loss.item():.3f}, {found}", flush=True)
            streak = streak + 1 if min(found.values()) >= 0.99 else 0
            if streak == 3:
                break
    model.eval()
    if checkpoint is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(checkpoint))
    return model, accuracies(model)


def accuracies(model: nn.Module) -> dict[str, float]:
    """Accuracy on held-out pairs of names in known templates, and in templates never seen."""
    known = tuple(number for number in range(len(TEMPLATES)) if number not in HELD_OUT_TEMPLATES)
    return {
        "pairs": accuracy(model, held_out(256, known, seed=2)[0]),
        "templates": accuracy(model, held_out(256, HELD_OUT_TEMPLATES, seed=3)[0]),
    }
