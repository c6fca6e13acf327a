"""Data with known ground truth, some of it embedded; nothing is ever downloaded."""

# Imported here and not on first use, because functions and files share names: importing the file
# pullback.datasets.mnist first would otherwise leave the module where the function is expected.
from pullback.datasets.block_mnist import BlockMNIST, block_mnist
from pullback.datasets.cifar import Photographs, cifar10
from pullback.datasets.coloured_patches import PatchDocuments, coloured_patches
from pullback.datasets.idx import load_idx
from pullback.datasets.mnist import Digits, fashion_mnist, mnist
from pullback.datasets.registers import Registers, register_documents
from pullback.datasets.series import Windows, ecg5000, ecg_noise_stress, ppg
from pullback.datasets.shakespeare import Characters, shakespeare
from pullback.datasets.text import (
    QuestionSplit,
    TruthfulQuestion,
    load_truthfulqa,
    neutral_sentences,
    split_questions,
)
from pullback.datasets.theory import Signals, block_signal, signal_coordinates
from pullback.datasets.windowing import cut_windows

__all__ = [
    "BlockMNIST",
    "Characters",
    "Digits",
    "PatchDocuments",
    "Photographs",
    "QuestionSplit",
    "Registers",
    "Signals",
    "TruthfulQuestion",
    "Windows",
    "block_mnist",
    "block_signal",
    "cifar10",
    "coloured_patches",
    "cut_windows",
    "ecg5000",
    "ecg_noise_stress",
    "fashion_mnist",
    "load_idx",
    "load_truthfulqa",
    "mnist",
    "neutral_sentences",
    "ppg",
    "register_documents",
    "shakespeare",
    "signal_coordinates",
    "split_questions",
]
