"""BlockMNIST against a slow rebuild, image by image, from its definition; positions, null blocks, errors."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from pullback.core.errors import InputError
from pullback.datasets import BlockMNIST, Digits, block_mnist, mnist
from tests.data_root import data_root

ROOT = data_root()
TEN = tuple(range(10))


def box_by_hand() -> torch.Tensor:
    """A pixel of the square is drawn if it is on the edge or on a diagonal, pixel by pixel."""
    image = torch.zeros(28, 28)
    for row in range(4, 24):
        for column in range(4, 24):
            edge = row in (4, 23) or column in (4, 23)
            if edge or row == column or row - 4 == 23 - column:
                image[row, column] = 1.0
    return image


def halves(data: BlockMNIST) -> tuple[torch.Tensor, torch.Tensor]:
    """(signal block, null block) of each image of a vertical layout, cut out by position."""
    top, bottom = data.x[:, 0, :28], data.x[:, 0, 28:]
    down = data.position.bool()[:, None, None]
    return torch.where(down, bottom, top), torch.where(down, top, bottom)


@pytest.mark.parametrize("layout", ["vertical", "horizontal"])
def test_every_image_is_the_digit_next_to_the_box_and_the_mask_is_on_the_digit(layout: str) -> None:
    digits = mnist(split="test")
    data = block_mnist(split="test", classes=(3, 1), layout=layout)
    chosen = [index for index, label in enumerate(digits.y.tolist()) if label in (3, 1)]
    assert len(data) == len(chosen)
    ones, zeros = torch.ones(28, 28, dtype=torch.bool), torch.zeros(28, 28, dtype=torch.bool)
    for row, index in enumerate(chosen):
        assert data.y[row] == (3, 1).index(int(digits.y[index]))
        parts, masks = [digits.x[index, 0], box_by_hand()], [ones, zeros]
        if data.position[row] == 1:
            parts, masks = parts[::-1], masks[::-1]
        dimension = 0 if layout == "vertical" else 1
        assert torch.equal(data.x[row, 0], torch.cat(parts, dimension))
        assert torch.equal(data.signal_mask[row, 0], torch.cat(masks, dimension))


def test_golden_18_positions_are_fair_and_independent_of_the_label() -> None:
    data = block_mnist(classes=TEN)
    assert abs(data.position.double().mean() - 0.5) < 0.03  # 3.8 standard deviations at n = 4,000
    from scipy.stats import chi2_contingency

    table = torch.zeros(10, 2).index_put_((data.y, data.position), torch.ones(len(data)), accumulate=True)
    assert chi2_contingency(table.numpy()).pvalue > 0.001


def test_golden_18_the_null_block_is_the_same_in_every_image() -> None:
    _, null = halves(block_mnist(classes=TEN))
    assert torch.equal(null, box_by_hand().expand_as(null))
    assert int(box_by_hand().sum()) == 4 * 19 + 2 * 18  # the outline and two diagonals without their ends


@pytest.mark.parametrize(
    ("seed", "sha256"),
    [
        (0, "2af44309d38a54a9926d2552cd1834546433596622061796ed54cc1bdf23c0f9"),
        (1, "484651ba18d49a5e0aee45b32ddc29a34a45a4aa6dc4c22f1828d27184227283"),
    ],
)
def test_golden_18_the_first_hundred_images_are_fixed_per_seed(seed: int, sha256: str) -> None:
    x = block_mnist(classes=TEN, n=100, seed=seed).x
    assert hashlib.sha256(x.numpy().tobytes()).hexdigest() == sha256


@pytest.mark.skipif(ROOT is None, reason="the full data: neither PULLBACK_DATA nor ../shared/data exists")
def test_golden_18_on_the_full_set_and_the_embedded_part_lies_as_in_the_full_set() -> None:
    full = block_mnist(ROOT, n=12665)
    assert abs(full.position.double().mean() - 0.5) < 0.03
    embedded = block_mnist()
    assert torch.equal(full.x[: len(embedded)], embedded.x)
    assert torch.equal(full.position[: len(embedded)], embedded.position)


def test_other_classes_n_and_null_leave_every_digit_where_it_was() -> None:
    everything = block_mnist(classes=TEN)
    of_class = {label: everything.position[everything.y == label] for label in TEN}
    pair = block_mnist(classes=(7, 2), null="noise")
    assert torch.equal(pair.position[pair.y == 0], of_class[7])
    assert torch.equal(pair.position[pair.y == 1], of_class[2])
    assert torch.equal(block_mnist(classes=TEN, n=50).position, everything.position[:50])
    assert not torch.equal(block_mnist(classes=TEN, seed=1).position, everything.position)


@pytest.mark.parametrize(("position", "expected"), [("top", 0), ("bottom", 1)])
def test_fixed_positions(position: str, expected: int) -> None:
    data = block_mnist(n=20, position=position)
    assert data.position.tolist() == [expected] * 20
    digits = mnist()
    source = digits.x[(digits.y < 2).nonzero()[:20, 0], 0]
    rows = slice(0, 28) if expected == 0 else slice(28, 56)
    assert torch.equal(data.x[:, 0, rows], source)
    assert bool(data.signal_mask[:, 0, rows].all())
    assert int(data.signal_mask.sum()) == 20 * 784


def test_zeros_and_mean() -> None:
    assert halves(block_mnist(n=10, null="zeros"))[1].abs().max() == 0
    train = mnist()
    mean = train.x[train.y < 2].double().mean((0, 1)).float()
    for split in ("train", "test"):  # the test images too get the mean of the training images
        null = halves(block_mnist(split=split, n=10, null="mean"))[1]
        assert torch.equal(null, mean.expand_as(null))


def test_noise_is_uniform_and_new_in_every_image() -> None:
    null = halves(block_mnist(null="noise", n=100))[1]
    assert abs(null.mean() - 0.5) < 5 * math.sqrt(1 / 12 / null.numel())
    assert abs(null.var() - 1 / 12) < 0.002
    assert (null[0] - null[1]).abs().max() > 0.5
    assert torch.equal(halves(block_mnist(null="noise", n=50))[1], null[:50])


def test_digit_is_a_real_digit_of_the_other_classes_independent_of_the_label() -> None:
    data = block_mnist(split="test", classes=(0, 1), null="digit")
    digits = mnist(split="test")
    label_of = {image.numpy().tobytes(): int(y) for image, y in zip(digits.x[:, 0], digits.y, strict=True)}
    labels = [label_of[image.numpy().tobytes()] for image in halves(data)[1]]
    assert set(labels) == set(range(2, 10))
    with pytest.warns(UserWarning, match="every class of the source chosen.*cannot be told"):
        block_mnist(split="test", classes=TEN, null="digit")


def test_scramble_is_one_permutation_for_all_images_and_both_splits() -> None:
    orders = []
    for split in ("train", "test"):
        digits = mnist(split=split)
        null = halves(block_mnist(split=split, null="scramble", n=60))[1].flatten(1)
        ordered = {tuple(sorted(image)): image for image in digits.x.flatten(1).tolist()}
        sources = torch.tensor(
            [ordered[tuple(sorted(image))] for image in null.tolist()]
        )  # KeyError: no digit
        # Pixel j of every scrambled image equals pixel order[j] of its source.
        agree = (null[:, :, None] == sources[:, None, :]).all(0)
        assert bool(agree.any(1).all())
        orders.append(agree)
    assert bool((orders[0] & orders[1]).any(1).all())


def test_other_block_sizes_are_area_averages() -> None:
    large, small = block_mnist(n=30), block_mnist(n=30, block=(14, 14))
    assert small.x.shape == (30, 1, 28, 14)
    pooled = torch.nn.functional.avg_pool2d(large.x, 2)
    torch.testing.assert_close(small.x, pooled, rtol=0, atol=1e-6)
    assert torch.equal(
        small.signal_mask.float(), torch.nn.functional.avg_pool2d(large.signal_mask.float(), 2)
    )


def test_arrays_and_digits_as_source() -> None:
    digits = mnist(split="test")
    pixels = (digits.x[:, 0] * 255).round().to(torch.uint8)
    reference = block_mnist(split="test")
    for source in (digits, (pixels, digits.y), (digits.x, digits.y.int())):
        data = block_mnist(source, split="test")
        assert torch.equal(data.x, reference.x)
        assert torch.equal(data.y, reference.y)


def test_meta_says_what_it_is_made_of() -> None:
    data = block_mnist(n=5, seed=3)
    assert data.meta["sha256"] == mnist().meta["sha256"]
    assert data.meta["seed"] == 3
    assert data.meta["parameters"] == {
        "split": "train", "classes": (0, 1), "n": 5, "position": "random", "null": "box", "block": (28, 28),
        "layout": "vertical",
    }  # fmt: skip


def test_indexing_and_the_global_generator() -> None:
    before = torch.get_rng_state()
    data = block_mnist(null="scramble")
    assert torch.equal(torch.get_rng_state(), before)
    x, y = data[4]
    assert torch.equal(x, data.x[4])
    assert y == data.y[4]
    down = data[data.position == 1]
    assert isinstance(down, BlockMNIST)
    assert len(down) == int(data.position.sum())
    assert bool(down.signal_mask[:, :, 28:].all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ()}, "Expected distinct labels"),
        ({"classes": (1, 1)}, "Expected distinct labels"),
        ({"classes": (0, 12)}, r"has no \[12\]"),
        ({"n": 100_000}, r"has 823 digits of the classes \(0, 1\).*full MNIST"),
        ({"n": 0}, "n=0 was given"),
        ({"position": "left"}, "position='left' was given. Expected one of 'random', 'top', 'bottom'"),
        ({"null": "cross"}, "null='cross'"),
        ({"layout": "diagonal"}, "layout='diagonal'"),
        ({"block": (28, 0)}, "Expected \\(height, width\\)"),
        ({"root_or_arrays": (torch.rand(3, 32, 32), torch.tensor([0, 1, 0]))}, "Images of shape"),
        ({"root_or_arrays": (torch.rand(3, 28, 28) * 9, torch.tensor([0, 1, 0]))}, "Expected \\[0, 1\\]"),
        ({"root_or_arrays": Digits(torch.rand(3, 1, 28, 28), torch.tensor([0]))}, "labels of shape"),
    ],
)
def test_errors_say_what_was_given(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        block_mnist(**arguments)
