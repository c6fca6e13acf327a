# %% [markdown]
# # Steer a model to another register
#
# A small language model learns documents whose answers depend on a register that only cues in a header tell. A vector
# fitted by GrAInS on twelve keys turns its answers on keys that were not fitted. About half a minute on one core.

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pullback import steering
from pullback.datasets import register_documents
from pullback.datasets.registers import BOS, EOS, KEYS, MASK, PAD, vocabulary_size

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=vocabulary_size(), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(200):
    documents = register_documents(64, seed=step)
    first = documents.prompts.shape[1]
    # masked words are in what it learns, so that masking them later is nothing new to it
    hidden = torch.rand(documents.x.shape) < 0.15 * (torch.rand(64, 1) < 0.5)
    hidden[:, 0] = False
    logits = model(documents.x.masked_fill(hidden, MASK)).logits[:, first - 1 : -1 : 2]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), documents.x[:, first::2].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
print(f"loss {loss.item():.3f}")

# %% [markdown]
# Prompts in register 1, in which the cues agree weakly; to be preferred is the answer of register 0. Twelve keys to
# fit, six to choose the strength, six to report.

# %%
order = torch.randperm(KEYS).tolist()


def pairs(count, keys, seed):
    documents = register_documents(count, queries=1, agreement=0.65, register=1, keys=keys, seed=seed)
    asked = zip(documents.prompts.tolist(), documents.answers[:, 0].tolist(), strict=True)
    return documents, [(prompt, yes, no) for prompt, (yes, no) in asked]


documents, to_fit = pairs(50, order[:12], 1001)
_, to_choose = pairs(60, order[12:18], 1002)
_, to_report = pairs(150, order[18:], 1003)


class Tokenizer:
    """Prompts are token ids: what is needed are the special ones."""

    pad_token_id, bos_token_id, eos_token_id, mask_token_id = PAD, BOS, EOS, MASK
    all_special_ids = (PAD, BOS, EOS, MASK)


vector = steering.fit(model, Tokenizer(), to_fit, method="grains", k=3, steps=16)
print(vector)

# %% [markdown]
# Were the planted cues found? Of the cues for register 0 in each prompt, at most three, the share among the tokens
# chosen.

# %%
chosen = vector.provenance["chosen"]
hits = sum(
    int(documents.cues[row, place] == 1) for row, each in enumerate(chosen) for place, *_ in each["positive"]
)
planted = int((documents.cues == 1).sum(1).clamp(max=3).sum())
gap = vector.provenance["completeness"]["relative_gap"]
print(f"{hits} of {planted} planted cues found, completeness gap {gap:.3f}")
assert hits >= 0.9 * planted

# %% [markdown]
# Strength and blocks are chosen on keys of their own, under a budget: documents of register 0 are to stay as likely.

# %%
neutral = register_documents(40, register=0, agreement=1.0, seed=1004).x.tolist()
swept = steering.sweep(
    model, Tokenizer(), vector, to_choose, neutral=neutral, strengths=(0.2, 0.4, 0.8), budget=1.5
)
print("chosen:", swept.best)
found = steering.evaluate(
    model, Tokenizer(), vector, to_report, setting=swept, fit_pairs=to_fit, neutral=neutral, budget=1.5
)
for flag in found.flags:
    print(flag.severity, flag.name, flag.text)
for name in ("none", "grains", "mean_grad", "mean_diff", "random_tokens", "random", "prompt"):
    print(
        f"{name:<14} right {found.value(name, 'mc1'):.2f}   margin moved by {found.value(name, 'margin_shift'):+.2f}"
    )

# %% [markdown]
# It moves held-out keys more than random directions do, and no failure is flagged. The mean gradient, one backward
# pass per answer, does as much or more here, and the mean difference of hidden states about as much
# (studies/steering_register.py, five seeds): both are in every evaluation.

# %%
band = next(row for row in found.rows if row.condition == "random" and row.measure == "margin_shift")
assert found.value("grains", "margin_shift") > band.high
assert not any(flag.severity == "failure" for flag in found.flags)
vector.save("register.safetensors")
