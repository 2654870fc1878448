"""A verification that cannot fail proves nothing: every law is broken here, and must be named."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest

from rasa_theory import Bound, LayerStack, RankBudget, RasaSolution, SolverOptions, lower_bound, solve_rasa
from rasa_theory.verification import (
    FAMILIES,
    LAWS,
    Subject,
    Trial,
    VerificationSettings,
    draw_instance,
    run_trial,
)
from tests.helpers.subjects import (
    HONEST,
    all_share,
    allocation,
    certificate,
    counting,
    drop,
    entry,
    fails,
    floor,
    floors_by_shape,
    last_digit,
    lora,
    only_lora,
    path,
    rising,
    run,
    solver,
    swapped,
    worse_than_lora,
)

FEW = VerificationSettings(sweeps=2)


BROKEN: list[tuple[str, str, Subject]] = [
    ("answer_below_lora", "gaussian", solver(worse_than_lora)),
    ("answer_below_allocation", "orthogonal-columns", solver(only_lora)),
    ("allocation_below_lora", "equal", allocation(lambda stack, budget: 1 + 1e9 * budget.shared_rank)),
    ("rank_floor", "equal", floor("rank")),
    ("stack_floor", "orthogonal-columns", floor("stack")),
    ("clipped_floor", "orthogonal-columns", floor("clipped")),
    ("split_floor", "shared-bases", floor("split")),
    ("certificate", "equal", certificate(1.01)),
    ("certificate_is_the_best", "equal", certificate(0.99)),
    ("probable_floor", "equal", Subject(probable_floor=lambda *given: Bound(1.01 * lower_bound(*given).value, "x"))),
    ("allocation_nested", "gaussian", allocation(lambda stack, budget: 1.0 + (budget.shared_rank > 0))),
    ("path_nested", "gaussian", path(lambda found: dict(zip(found, reversed(found.values()), strict=True)))),
    ("path_begins_at_lora", "gaussian", path(lambda found: found | {0: found[max(found)]})),
    ("lora_factors", "gaussian", lora(lambda stack, solution: 1 - 1e-9)),
    ("embedding", "gaussian", swapped("smallest")),
    ("embedding", "gaussian", swapped("largest")),
    ("drop_nonnegative", "gaussian", drop(-1.0)),
    ("drop_measured", "gaussian", drop(1.01)),
    ("drop_measured", "gaussian", drop(0.99)),
    ("drop_measured", "gaussian", drop(1.01, all_share)),
    ("drop_measured", "gaussian", drop(1.01, lambda factors: not all_share(factors))),
    ("answer_falls", "gaussian", rising("best", "core")),
    ("joint_falls", "gaussian", rising("random", "joint")),
    ("paper_falls", "gaussian", rising("random", "paper")),
    (
        "history_ends_at_error",
        "gaussian",
        solver(lambda *given: {"history": [*given[3].history, 0.99 * given[3].error]}),
    ),
    ("error_is_residual", "gaussian", solver(lambda *given: {"error": given[3].error * (1 - 1e-9)})),
    ("error_is_residual", "gaussian", solver(lambda *given: {"layer_errors": given[3].layer_errors[::-1]})),
    ("error_is_residual", "gaussian", solver(lambda *given: {"error": math.nan})),
    ("crossing", "gaussian", counting(1)),
    ("crossing", "gaussian", counting(-1)),
    ("power_of_two", "gaussian", solver(last_digit)),
    ("floor_below_optimum", "shared-bases", floor("stack")),
    ("floor_below_optimum", "equal", certificate(1.01)),
    ("floor_meets_optimum", "shared-bases", certificate(0.99)),
    ("allocation_meets_optimum", "no-sharing", allocation(lambda stack, budget: 1 - 1e-9)),
    ("answer_meets_optimum", "orthogonal-columns", solver(only_lora)),
    ("scaled", "gaussian", lora(lambda stack, solution: 1 + 1e-9 * stack.norm_squared)),
    ("rotated", "gaussian", lora(lambda stack, solution: 1 + 1e-9 * entry(stack))),
    ("permuted", "gaussian", lora(lambda stack, solution: 1 + 1e-9 * solution.layer_errors[0] / solution.error)),
    ("transposed", "gaussian", allocation(lambda stack, budget: 1 + 1e-9 * stack.shape[0])),
    ("transposed", "decaying", floors_by_shape(0)),
    ("transposed", "decaying", floors_by_shape(1)),
    ("padded", "gaussian", allocation(lambda stack, budget: 1 + 1e-9 * sum(stack.shape))),
    ("answer_below_lora", "gaussian", Subject(solve_rasa=fails)),
]


@functools.cache
def honest(family: str) -> Trial:
    return run_trial(draw_instance(family, 0, seed=0), HONEST, FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "family", "broken"), BROKEN, ids=[f"{i}-{row[0]}" for i, row in enumerate(BROKEN)])
def test_a_broken_law_is_noticed_and_an_honest_one_holds(law: str, family: str, broken: Subject) -> None:
    assert honest(family).outcomes[law].holds
    assert not run_trial(draw_instance(family, 0, seed=0), broken, FEW, [law]).outcomes[law].holds


def test_answers_take_the_least_effort_so_that_an_instance_stays_quick() -> None:
    efforts = []

    def solve(stack: LayerStack, budget: RankBudget, options: SolverOptions) -> RasaSolution:
        if options.start == "best":
            efforts.append(options.effort)
        return solve_rasa(stack, budget, options)

    run_trial(draw_instance("gaussian", 0, seed=0), Subject(solve_rasa=solve), FEW, list(LAWS))
    assert set(efforts) == {"quick"}


def test_every_law_is_broken_above() -> None:
    """But for the one that only a wrong optimum can break: see the next."""
    assert {law for law, _, _ in BROKEN} | {"answer_above_optimum"} == set(LAWS)


@pytest.mark.slow
def test_every_law_holds_on_an_instance_of_every_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instances", str(len(FAMILIES)), "--sweeps", "1", "--out", str(tmp_path)]
    status, found, err = run(arguments, capsys)
    assert status == 0, err
    assert [family["name"] for family in found["families"]] == list(FAMILIES)
    assert {law["name"] for family in found["families"] for law in family["laws"]} == set(LAWS)
    assert all(law["worst_margin"] <= 1 for family in found["families"] for law in family["laws"])
    assert found["verdict"] == "holds"
    assert f"HOLDS: 0 violations in {sum(family['checks'] for family in found['families'])} checks" in err
    assert [path.name for path in tmp_path.iterdir()] == ["verify.json"]
    assert json.loads((tmp_path / "verify.json").read_text(encoding="utf-8")) == found
    strict = {family["name"]: family["strict"] for family in found["families"]}
    assert (strict["gaussian"], strict["no-sharing"], strict["orthogonal-rows"]) == (1, 0, 0)
