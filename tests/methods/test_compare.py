"""Configurations that fit, comparisons at equal parameters, and bad input of all methods."""

import numpy as np
import pytest
import torch

import rasa_theory as rt
from rasa_theory import methods
from tests.helpers import problems
from tests.helpers.problems import noise


@pytest.mark.slow
def test_configurations_fit_and_are_the_largest():
    small = rt.LayerStack(problems.decaying(4, 12, 8))
    limit = methods.lora_parameters(4, (12, 8), 2)
    for name, method in methods.METHODS.items():
        for settings in method.configurations(small, limit):
            found = method.solve(small, **settings)
            assert found.method == name
            assert found.settings == settings
            assert found.parameters <= limit, (name, settings)
        assert method.configurations(small, 1) == []
    s = rt.LayerStack(problems.decaying(4, 24, 16))
    limit = methods.lora_parameters(4, (24, 16), 3)
    assert {"rank": 3} in methods.METHODS["lora"].configurations(s, limit)
    assert methods.METHODS["allocated"].configurations(s, 2 * 40 + 39) == [{"terms": 2}]
    blocks = methods.METHODS["block_lora"]  # a rank of 2 x 2 blocks is as large as two ranks of LoRA
    assert blocks.configurations(s, limit) == [{"rank": 1, "rows": 2, "columns": 2}]
    sides = [{"rank": 4, "rows": 2, "columns": 2}, {"rank": 2, "rows": 4, "columns": 4}]
    assert blocks.configurations(s, methods.lora_parameters(4, (24, 16), 8)) == sides
    assert blocks.configurations(rt.LayerStack(noise(4, 24, 15)), limit) == []  # no grid has equal blocks
    assert methods.METHODS["allocated_blocks"].configurations(s, 3 * 20 + 9) == [
        {"terms": 3, "rows": 2, "columns": 2},
        {"terms": 6, "rows": 4, "columns": 4},
    ]
    assert {"rank": 7, "shared": "A"} in methods.METHODS["share_lora"].configurations(s, 7 * (16 + 4 * 24) + 111)
    own = {"rank": 3, "shared_rank": 1}  # L^2 k = 16 numbers of mixing beside those of LoRA
    assert own not in methods.METHODS["rasa"].configurations(s, limit + 15)
    assert own in methods.METHODS["rasa"].configurations(s, limit + 16)
    assert methods.METHODS["tied_lora"].configurations(s, 5 * 40 + 4 * (24 + 5)) == [{"rank": 5}]
    assert methods.METHODS["mos"].configurations(s, limit + 39) == [
        {"rank": 4, "pool_rank": 3, "private_rank": 2, "shards": 4},
        {"rank": 6, "pool_rank": 3, "private_rank": 1, "shards": 4},
    ]
    smallest = [{"rank": 2, "pool_rank": 1, "private_rank": 0, "shards": 4}]
    assert methods.METHODS["mos"].configurations(s, methods.lora_parameters(4, (24, 16), 1)) == smallest
    assert methods.METHODS["vera"].configurations(s, 4 * (24 + 6)) == [{"rank": 6}]
    assert methods.METHODS["joint_full"].configurations(s, 3 * 40 + 4 * 9) == [{"rank": 3, "core": "full"}]
    assert methods.METHODS["joint_diagonal"].configurations(s, 5 * 44) == [{"rank": 5, "core": "diagonal"}]


@pytest.mark.slow
def test_at_parameters_takes_the_best_configuration_of_every_method():
    s = rt.LayerStack(problems.decaying(4, 24, 16))
    limit = methods.lora_parameters(4, (24, 16), 3)
    found = methods.at_parameters(s, limit)
    assert list(found) == list(methods.METHODS)
    assert all(fit.parameters <= limit + limit // 10 for fit in found.values())
    assert found["rasa"].error <= found["lora"].error
    assert found["rasa"].settings["rank"] == 3
    shares = [
        methods.fit_share_lora(s, **c) for c in methods.METHODS["share_lora"].configurations(s, limit + limit // 10)
    ]
    assert found["share_lora"].error == min(fit.error for fit in shares)
    flipped = methods.at_parameters(s.transpose(), limit, ["share_lora"])["share_lora"]
    assert flipped.error == pytest.approx(found["share_lora"].error)
    assert flipped.settings["shared"] != found["share_lora"].settings["shared"]
    assert methods.at_parameters(s, 1) == {}


def test_what_is_allowed_is_enough_for_the_mixing_of_rasa():
    for shape, r, k in (((6, 384, 384), 8, 8), ((5, 9, 4), 3, 2)):
        s = rt.LayerStack(np.ones(shape, np.float32))
        parameters = methods.lora_parameters(shape[0], shape[1:], r)
        assert methods.allowed(s, parameters) >= parameters + shape[0] ** 2 * k
        assert methods.allowed(s, parameters, 0.0) == parameters
    assert methods.allowed(rt.LayerStack(np.ones((6, 384, 384), np.float32)), 36864) == 36864 + 288


def test_pareto_is_at_parameters_of_each_rank():
    s = rt.LayerStack(problems.decaying(3, 8, 6))
    front = methods.pareto(s, (1, 2), ["lora", "share_lora"])
    assert front[2]["lora"].error == methods.fit_lora(s, 2).error
    assert front[1]["share_lora"].parameters <= 3 * (8 + 6) + 3 * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: methods.fit_lora(s, 0), "rank must be at least 1, got 0"),
        (lambda s: methods.fit_lora(s, 7), r"rank 7 exceeds min\(b, a\) = 6"),
        (lambda s: methods.fit_allocated(s, 2.5), "terms must be a whole number, got 2.5"),
        (lambda s: methods.fit_allocated(s, 19), "terms 19 exceeds 18"),
        (
            lambda s: methods.fit_block_lora(s, 4),
            r"rank 4 exceeds 3, all that can be of use to stack 'stack, 2 x 2 blocks' \(12 layers of 4 x 3\)",
        ),
        (
            lambda s: methods.fit_block_lora(s, 1, 3),
            "rows 3 does not divide the 8 rows of a layer of 'stack'; give a divisor",
        ),
        (lambda s: methods.fit_allocated_blocks(s, 1, 2, 4), "columns 4 does not divide the 6 columns"),
        (lambda s: methods.fit_block_lora(s, 1, 2, 0), "columns must be at least 1, got 0"),
        (lambda s: methods.fit_block_lora(s, 0), "rank must be at least 1, got 0"),
        (lambda s: methods.fit_allocated_blocks(s, 37), "terms 37 exceeds 36"),
        (lambda s: methods.fit_rasa(s, 2, 3), "shared_rank 3 exceeds rank 2"),
        (lambda s: methods.fit_share_lora(s, 2, "C"), "unknown shared 'C'; known: A, B, both"),
        (lambda s: methods.fit_share_lora(s, 7, "A"), r"rank 7 exceeds 6, all that can be of use to stack 'stack'"),
        (lambda s: methods.fit_tied_lora(s, True), "rank must be a whole number, got True"),
        (lambda s: methods.fit_tied_lora(s, 2, max_sweeps=0), "max_sweeps must be at least 1, got 0"),
        (lambda s: methods.fit_vera(s, -1), "rank must be at least 1, got -1"),
        (
            lambda s: methods.fit_vb_lora(s, 2, 8, 5),
            "length 5 does not divide the layers of 8 x 6; give a divisor of 2",
        ),
        (lambda s: methods.fit_vb_lora(s, 2, 2, 2, 3), "topk 3 exceeds the 2 vectors of the bank"),
        (lambda s: methods.fit_mos(s, 2, 1, 0, 4), "shards 4 does not divide the layers of 8 x 6; give a divisor of 2"),
        (lambda s: methods.fit_mos(s, 2, 3, 3, 2), "private_rank 3 exceeds 2, the smaller of rank and pool_rank"),
        (lambda s: methods.fit_mos(s, 7, 3, 0, 2), "rank 7 exceeds 6"),
        (
            lambda s: methods.fit_mos(s, 3, 2, 2, 2),
            "rank 3 needs 1 vectors a layer beside the private ones, and the shared part of the pool has 0",
        ),
        (lambda s: methods.fit_mos(s, 2, 1, 0, 2, max_sweeps=0), "max_sweeps must be at least 1, got 0"),
        (lambda s: methods.fit_joint(s, 7), "rank 7 exceeds 6"),
        (lambda s: methods.fit_joint(s, 2, "sparse"), "unknown core 'sparse'; known: full, diagonal"),
        (lambda s: methods.fit_one_sided(s, 0, 0), r"private_rank \+ shared_rank must be at least 1, got 0"),
        (lambda s: methods.fit_one_sided(s, 1, 7, "rows"), "shared_rank 7 exceeds 6"),
        (lambda s: methods.fit_one_sided(s, 1, 1, "both"), "unknown side 'both'; known: columns, rows"),
        (lambda s: methods.fit_share_basis(s, 2, 4, "whole"), "components 4 exceeds 3"),
        (
            lambda s: methods.fit_share_basis(
                s, 3, 2, "columns", rt.LoraFactors(torch.zeros(4, 12, 2), torch.zeros(4, 2, 10))
            ),
            "the LoRA factors have shapes",
        ),
        (lambda s: methods.at_parameters(s, 0), "parameters must be at least 1, got 0"),
        (lambda s: methods.at_parameters(s, 99, ["dora"]), "unknown method 'dora'; known: lora, allocated"),
        (lambda s: methods.at_parameters(s, 99, slack=1), "slack must be at least 0 and below 1, got 1"),
        (lambda s: methods.pareto(s, [9]), r"rank 9 exceeds min\(b, a\) = 6"),
    ],
)
def test_bad_input_is_a_sentence(call, message):
    with pytest.raises(rt.InputError, match=message):
        call(rt.LayerStack(noise(3, 8, 6)))
