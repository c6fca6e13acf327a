# %% [markdown]
# # A text model
#
# A tiny language model, built from a config and trained on made-up sentences for some seconds; nothing is
# downloaded. Needs the extra `hf` (`pip install 'pullback[hf]'`).

# %%
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import pullback as pb

COUNTRIES = {"france": "paris", "italy": "rome", "spain": "madrid", "japan": "tokyo"}
words = ["<pad>", "the", "capital", "of", "is", "old", "and", "big", *COUNTRIES, *COUNTRIES.values()]
vocabulary = {word: number for number, word in enumerate(words)}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<pad>", pad_token="<pad>")

# %%
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=32, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
llm = LlamaForCausalLM(config)
texts = [
    f"the {adjective} capital of {country} is {city}"
    for country, city in COUNTRIES.items()
    for adjective in ("old", "big", "old and big")
]
batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
optimizer = torch.optim.Adam(llm.parameters(), lr=1e-2)
for _ in range(80):
    optimizer.zero_grad()
    llm(**batch, labels=labels).loss.backward()
    optimizer.step()
llm.eval()

# %% [markdown]
# Token ids have no gradient, so the site moves to the embeddings by itself. `Contrast` asks why one continuation
# rather than the other. The baseline is the mean embedding, because this model has no mask token.

# %%
prompt = tokenizer("the old capital of france is", return_tensors="pt", return_token_type_ids=False)
a = pb.explain(llm, prompt, target=pb.Contrast("paris", "rome", tokenizer=tokenizer))
print(a)
per_token = a.sum(-1).values[0]
for token, value in zip(a.tokens[0], per_token.tolist(), strict=True):
    print(f"{token:>8} {value:+.3f}")
assert a.tokens[0][int(per_token.argmax())] == "france"

# %%
a.plot().figure.savefig("token_strip.png")
a.to_html("contrast.html")

# %% [markdown]
# Generation: one row for each generated token, all from one teacher-forced forward. Row j explains output token j by
# the prompt and the output before it; later tokens get nothing.

# %%
start = tokenizer("the big capital", return_tensors="pt", return_token_type_ids=False)
length = start["input_ids"].shape[1]
output = llm.generate(**start, max_new_tokens=4, do_sample=False)[0, length:]
print("generated:", tokenizer.decode(output))
g = pb.explain_generation(llm, start, output, tokenizer=tokenizer)
values = g.sum(-1).values
print("read:", g.tokens[0])
for label, row in zip(g.labels, values, strict=True):
    print(f"{label:<40}", [round(value, 2) for value in row.tolist()])
assert all(bool((row[length + number :] == 0).all()) for number, row in enumerate(values))
