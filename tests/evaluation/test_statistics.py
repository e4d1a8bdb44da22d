"""The agreement measures against their definitions."""

import math

import numpy as np
import pytest
import torch

from lora.common.toml_json import without_nan
from lora.evaluation.statistics import pearson, ranks, spearman
from lora.model.heads import LMHead, MLPHead


def test_pearson_is_numpys_and_has_no_value_without_variation():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert math.isnan(pearson(a, np.ones(50)))


@pytest.mark.parametrize("value", [0.1, 0.2, 0.7, 0.8])
def test_equal_values_do_not_vary_though_their_variance_is_rounded(value):
    constant = np.full(3, value)
    assert constant.var() > 0 and math.isnan(pearson(constant, np.arange(3)))


def test_spearman_sees_order_only_and_ties_share_their_rank():
    a = np.array([3.0, 1.0, 2.0, 2.0, 5.0])
    assert ranks(a).tolist() == [4.0, 1.0, 2.5, 2.5, 5.0]
    assert spearman(a, np.exp(a)) == pytest.approx(1.0) and spearman(a, -(a**3)) == pytest.approx(
        -1.0
    )


def test_files_for_scripts_hold_null_where_a_number_is_not_finite():
    assert without_nan({"r2": math.nan, "norm": math.inf, "loss": 0.5}) == {
        "r2": None,
        "norm": None,
        "loss": 0.5,
    }


def test_the_metrics_of_scores_are_those_counted_by_hand():
    labels = torch.tensor([0.0, 1.0, 1.0, 0.5])
    assert MLPHead(2).metrics(labels, labels)["r2"] == 1.0
    said = MLPHead(2).metrics(torch.full((4,), labels.mean().item()), labels)
    assert said["r2"] == pytest.approx(0.0, abs=1e-6) and said["mse"] == pytest.approx(
        labels.var(correction=0).item()
    )
    assert said["mae"] == pytest.approx(0.375) and said["loss"] == said["mse"]


def test_perplexity_is_e_to_the_mean_loss_and_accuracy_the_share_of_right_tokens():
    lm = LMHead.metrics(torch.tensor([[0.0, 1.0], [2 * math.log(3), 0.0]]), None)
    assert lm["perplexity"] == pytest.approx(3.0) and lm["token_accuracy"] == 0.5
