"""What patching refuses, and what its errors say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pullback as pb
from pullback.attribution.patching import patching_scores
from tests.attribution.patching_models import gpt2, logit_difference, prompts, two_layers

PAIR = (torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64))


def test_prompts_of_unequal_length() -> None:
    clean, corrupted = prompts()
    with pytest.raises(
        pb.InputError,
        match=r'input "input_ids" has shape \(2, 5\) in the clean and \(2, 4\) in the corrupted inputs: patching '
        r"exchanges values position by position.*equal token length: swap words for words of as many tokens",
    ):
        patching_scores(gpt2(), clean, corrupted[:, :4], logit_difference, ["embeddings"])
    with pytest.raises(pb.InputError, match="as many examples"):
        patching_scores(gpt2(), clean, corrupted[:1], logit_difference, ["embeddings"])


def test_unequal_masks() -> None:
    clean, corrupted = prompts()
    mask = torch.ones_like(clean)
    shorter = mask.clone()
    shorter[1, 4] = 0
    with pytest.raises(
        pb.InputError, match=r"example 1 has 5 real tokens in the clean and 4 in the corrupted"
    ):
        patching_scores(
            gpt2(),
            {"input_ids": clean, "attention_mask": mask},
            {"input_ids": corrupted, "attention_mask": shorter},
            logit_difference,
            ["embeddings"],
        )
    with pytest.raises(pb.InputError, match="Give both the same tensors"):
        patching_scores(
            gpt2(), {"input_ids": clean, "attention_mask": mask}, {"input_ids": corrupted}, 0, ["embeddings"]
        )


def test_nothing_to_normalise_by() -> None:
    model = two_layers()
    with pytest.raises(pb.InputError, match=r"example 1 is .* nothing to normalise by.*normalised=False"):
        corrupted = PAIR[0].clone()
        corrupted[0] = 0
        patching_scores(model, PAIR[0], corrupted, 0, ["0"], normalised=True)


def test_names_and_numbers_out_of_range() -> None:
    model = two_layers()
    with pytest.raises(pb.MethodError, match="'exact', 'atp', 'relp', 'ig'"):
        patching_scores(model, *PAIR, 0, ["0"], "eap")  # type: ignore[arg-type]
    with pytest.raises(pb.MethodError, match='"denoise" or "noise"'):
        patching_scores(model, *PAIR, 0, ["0"], direction="noising")  # type: ignore[arg-type]
    with pytest.raises(pb.MethodError, match="at least 1; got 0"):
        patching_scores(model, *PAIR, 0, ["0"], "ig", steps=0)
    with pytest.raises(pb.MethodError, match='settings of method="relp"'):
        patching_scores(model, *PAIR, 0, ["0"], "atp", attention="detach")
    with pytest.raises(pb.MethodError, match='"error" or "gradient"'):
        patching_scores(model, *PAIR, 0, ["0"], "relp", uncovered="no")
    with pytest.raises(pb.MethodError, match=r'6 features at "0" do not divide into 4 heads'):
        patching_scores(model, *PAIR, 0, ["0"], per_head=4)
    with pytest.raises(pb.MethodError, match=r'names "7", which is none of the sites'):
        patching_scores(model, *PAIR, 0, ["0"], per_head={"7": 2})
    with pytest.raises(pb.MethodError, match="at least 1"):
        patching_scores(model, *PAIR, 0, ["0"], per_head=0)


def test_sites_that_do_not_exist() -> None:
    model = two_layers()
    with pytest.raises(pb.SiteError, match="no sites given"):
        patching_scores(model, *PAIR, 0, [])
    with pytest.raises(pb.SiteError, match='no module "3"'):
        patching_scores(model, *PAIR, 0, ["3"])
    with pytest.raises(pb.SiteError, match='no token ids, so there are no "embeddings"'):
        patching_scores(model, *PAIR, 0, ["embeddings"])
    with pytest.raises(pb.SiteError, match="is not one floating input"):
        patching_scores(gpt2(), *prompts(), logit_difference, ["input"])
    with pytest.raises(pb.SiteError, match=r"has shape \(1, 5, 12\), expected 2 rows first"):
        patching_scores(gpt2(), *prompts(), logit_difference, ["transformer.wpe"])


def test_a_metric_that_is_no_number_per_example() -> None:
    with pytest.raises(pb.TargetError, match=r"returned shape \(2, 3\)"):
        patching_scores(two_layers(), *PAIR, lambda output: output, ["0"])


def test_a_metric_that_is_not_differentiable() -> None:
    def metric(output: Tensor) -> Tensor:
        return output.detach()[:, 0]

    patching_scores(two_layers(), *PAIR, metric, ["0"])
    with pytest.raises(pb.SiteError, match=r'Use method="exact"'):
        patching_scores(two_layers(), *PAIR, metric, ["0"], "atp")


def test_a_text_of_several_tokens() -> None:
    class Letters:
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return [1] * len(text)

        def decode(self, tokens: list[int]) -> str:
            return "a" * len(tokens)

    with pytest.raises(pb.TargetError, match="use texts of one token"):
        patching_scores(gpt2(), *prompts(), pb.LogProb("aa", tokenizer=Letters()), ["embeddings"])


def test_a_plain_callable_has_its_input_only() -> None:
    net = two_layers()
    found = patching_scores(lambda x: net(x), *PAIR, 0, ["input"], "atp")["input"]
    assert torch.equal(found, patching_scores(net, *PAIR, 0, ["input"], "atp")["input"])
    with pytest.raises(pb.SiteError, match=r'"0" needs an nn\.Module'):
        patching_scores(lambda x: net(x), *PAIR, 0, ["0"])
    with pytest.raises(pb.MethodError, match=r"rules need a torch\.nn\.Module"):
        patching_scores(lambda x: net(x), *PAIR, 0, ["input"], "relp")


def test_a_model_in_train_mode_is_refused() -> None:
    with pytest.raises(pb.ModelError, match=r"allow_train=True"):
        patching_scores(nn.Sequential(nn.Linear(4, 2), nn.Dropout()).double(), *PAIR, 0, ["0"])
