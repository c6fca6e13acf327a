# %% [markdown]
# # A vector that fails, and the evaluation that says so
#
# The negative control of `06_steer_a_register.py`: both registers answer with the same words, so that no direction
# stands for a register at a key that was not fitted. Attribution works, one direction does not. About half a minute.

# %%
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pullback import steering
from pullback.datasets import register_documents
from pullback.datasets.registers import BOS, EOS, KEYS, MASK, PAD, vocabulary_size

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=vocabulary_size(shared_answers=True), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 450)
for step in range(450):
    documents = register_documents(64, shared_answers=True, seed=step)
    first = documents.prompts.shape[1]
    # masked words are in what it learns, so that masking them later is nothing new to it
    hidden = torch.rand(documents.x.shape) < 0.15 * (torch.rand(64, 1) < 0.5)
    hidden[:, 0] = False
    logits = model(documents.x.masked_fill(hidden, MASK)).logits[:, first - 1 : -1 : 2]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), documents.x[:, first::2].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
model.eval()
print(f"loss {loss.item():.3f}")

# %% [markdown]
# The answer of register 1 to key i is that of register 0 to key i + 5: what is up at one key is down at another.

# %%
order = torch.randperm(KEYS).tolist()


def pairs(count, keys, seed):
    documents = register_documents(
        count, queries=1, agreement=0.65, register=1, keys=keys, shared_answers=True, seed=seed
    )
    asked = zip(documents.prompts.tolist(), documents.answers[:, 0].tolist(), strict=True)
    return documents, [(prompt, yes, no) for prompt, (yes, no) in asked]


documents, to_fit = pairs(50, order[:12], 1001)
_, to_report = pairs(150, order[12:], 1002)


class Tokenizer:
    """Prompts are token ids: what is needed are the special ones."""

    pad_token_id, bos_token_id, eos_token_id, mask_token_id = PAD, BOS, EOS, MASK
    all_special_ids = (PAD, BOS, EOS, MASK)


vector = steering.fit(model, Tokenizer(), to_fit, method="grains", k=3, steps=16)
chosen = vector.provenance["chosen"]
hits = sum(
    int(documents.cues[row, place] == 1) for row, each in enumerate(chosen) for place, *_ in each["positive"]
)
planted = int((documents.cues == 1).sum(1).clamp(max=3).sum())
print(f"{hits} of {planted} planted cues found: the tokens are right")
assert hits >= 0.9 * planted

# %% [markdown]
# Its evaluation on keys that were not fitted, at a strength that turns each token by about 20 degrees.

# %%
neutral = register_documents(40, register=0, agreement=1.0, shared_answers=True, seed=1004).x.tolist()
found = steering.evaluate(
    model, Tokenizer(), vector, to_report, setting=steering.Setting(0.4, (1, 2)), fit_pairs=to_fit, neutral=neutral,
    budget=1.5,
)  # fmt: skip
for flag in found.flags:
    print(flag.severity, flag.name, flag.text)
for name in ("none", "grains", "mean_grad", "mean_diff", "random"):
    wrong = found.value(name, "anti_steerable")
    print(f"{name:<10} right {found.value(name, 'mc1'):.2f}   moved the wrong way {wrong:.2f}")

# %% [markdown]
# A failure is a reason to discard a vector. More pairs do not help: docs/concepts/steering-with-one-direction.md.

# %%
failures = {flag.name for flag in found.flags if flag.severity == "failure"}
print("failures:", ", ".join(sorted(failures)))
assert found.failed
found.to_csv("control.csv")
