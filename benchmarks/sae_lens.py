"""A training step of a sparse autoencoder: ours against SAELens' TopK trainer, alternating in one process.

SAELens wants an environment of its own:

    python -m venv saelens && saelens/bin/pip install torch==2.13.0 sae-lens
    OMP_NUM_THREADS=1 PYTHONPATH=. saelens/bin/python -m benchmarks.sae_lens

Both take the same steps on the same activations: TopK, plain Adam on their side, no AuxK where no latent is dead.
Theirs also clips the gradient's norm and counts how often each latent fires; ours keeps decoder rows at norm 1. Their
sparse tensors of latents (``use_sparse_activations``) have no kernel for this step on a CPU, so theirs are dense.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.sae import seconds_of
from pullback.steering.sae import SparseAutoencoderConfig, Trainer, TrainingConfig


def theirs(width: int, latents: int, k: int, batch: int) -> Callable[[Tensor], object]:
    """A step of SAELens' trainer."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    config = TopKTrainingSAEConfig(d_in=width, d_sae=latents, k=k)
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=1000 * batch, train_batch_size_samples=batch, lr_end=3e-5),
        TopKTrainingSAE(config),
        data_provider=iter(()),
    )
    return lambda x: trainer._train_step(trainer.sae, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--latents", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(options.batch, options.width, generator=torch.Generator().manual_seed(0))
    shape = SparseAutoencoderConfig(options.width, options.latents, options.k, "topk")
    settings = {"tokens": 1000 * options.batch, "batch_tokens": options.batch, "memory_budget": 8 * 2**20}
    ours = {
        dtype: Trainer(TrainingConfig(shape, score_dtype=dtype, **settings))  # type: ignore[arg-type]
        for dtype in ("exact", "bfloat16")
    }
    dense = theirs(options.width, options.latents, options.k, options.batch)
    ways: dict[str, Callable[[], object]] = {
        "SAELens": lambda: dense(x),
        "pullback, float32": lambda: ours["exact"].step(x),
        "pullback, bfloat16 scores": lambda: ours["bfloat16"].step(x),
    }
    seconds = seconds_of(ways, options.rounds)
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(seconds["SAELens"], each, strict=True)]
        print(
            f"{name}: {1000 * median(each):.0f} ms, {options.batch / median(each):,.0f} tokens/s, "
            f"{median(ratios):.2f} times SAELens [{min(ratios):.2f}, {max(ratios):.2f}]"
        )


if __name__ == "__main__":
    main()
