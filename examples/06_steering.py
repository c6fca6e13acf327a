# %% [markdown]
# # Steering by attribution, where it works and where it cannot
#
# A small Llama answers keys in one of two registers, which only the cues of a header tell. A vector is fitted on some
# keys to prefer register 0, its setting is chosen on others, and it is reported on keys that it has not seen, beside
# every control. Then the same where both registers use the same words: no single direction can work, and the
# evaluation has to say so.

# %%
import warnings

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import pullback as pb
from pullback.datasets import register_documents
from pullback.datasets.registers import BOS, EOS, MASK, PAD, vocabulary_size


class Tokenizer:
    """Prompts are token ids; the special ones are never masked."""

    pad_token_id, bos_token_id, eos_token_id, mask_token_id = PAD, BOS, EOS, MASK
    all_special_ids = (PAD, BOS, EOS, MASK)


def trained(shared_answers: bool, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size(shared_answers), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=True,
            pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        documents = register_documents(64, shared_answers=shared_answers, seed=step)
        # a masked prompt must not be news to the model, or masking measures its surprise
        hidden = (torch.rand(documents.x.shape) < 0.15) & (torch.rand(64, 1) < 0.5)
        hidden[:, 0] = False
        first = documents.prompts.shape[1]
        logits = model(documents.x.masked_fill(hidden, MASK)).logits[:, first - 1 : -1 : 2]
        loss = F.cross_entropy(logits.flatten(0, 1), documents.x[:, first::2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def pairs_of(keys: range, count: int, shared_answers: bool) -> list[pb.steering.Pair]:
    """Prompts in register 1; the answer of register 0 is preferred."""
    documents = register_documents(
        count,
        queries=1,
        agreement=0.65,
        register=1,
        keys=keys,
        shared_answers=shared_answers,
        seed=10**6 + keys[0],
    )
    rows = zip(documents.prompts.tolist(), documents.answers[:, 0].tolist(), strict=True)
    return [pb.steering.Pair(prompt, yes, no) for prompt, (yes, no) in rows]


# %%
for name, shared_answers in (("words of their own", False), ("the same words", True)):
    model = trained(shared_answers, 250)
    fitting, validation, held_out = (
        pairs_of(keys, count, shared_answers)
        for keys, count in ((range(12), 40), (range(12, 18), 100), (range(18, 24), 200))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pairs that do not agree, which the evaluation flags
        vector = pb.steering.fit(model, Tokenizer(), fitting, k=3, steps=16, batch_size=40)
    neutral = register_documents(60, shared_answers=shared_answers, seed=7).x.tolist()
    swept = pb.steering.sweep(
        model, Tokenizer(), vector, validation, neutral=neutral, budget=2.0, smallest_mass=0.9, batch_size=128
    )
    found = pb.steering.evaluate(
        model,
        Tokenizer(),
        {"grains": vector},
        held_out,
        setting=swept,
        fit_pairs=fitting,
        neutral=neutral,
        budget=2.0,
        batch_size=256,
        random_draws=20,
    )
    print(f"\nThe registers have {name}; {swept.best}\n{found}")
    page = f"steering-{'control' if shared_answers else 'toy'}.html"
    pb.steering.write_steering_report(
        page, found, vector, sweep=swept, pairs=fitting, tokenizer=Tokenizer(), model=model
    )
    failed = {flag.name for flag in found.flags} & {"within_random_band", "no_gain", "anti_steerable"}
    if shared_answers:
        assert failed, "one direction does not stand for a register here, and the evaluation must say so"
    else:
        assert not failed
        assert found.value("grains", "mc1") > found.value("none", "mc1") + 0.3
        assert found.value("grains", "margin_shift") > (found.row("random", "margin_shift").high or 0.0)
