"""A bench that cannot fail proves nothing: every law is broken here, and the command must name it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import rasa_theory as rt
from rasa_theory.commands import verify
from rasa_theory.verification import (
    FAMILIES,
    LAWS,
    Subject,
    Trial,
    VerificationSettings,
    draw_instance,
    run_trial,
    suitable_jobs,
)

SCHEMA = json.loads((Path(rt.__file__).parent / "data" / "verify.schema.json").read_text(encoding="utf-8"))
HONEST = Subject()
FEW = VerificationSettings(sweeps=2)


# ---- subjects with one thing wrong each


def solver(change: Callable[[rt.LayerStack, rt.RankBudget, Any, rt.RasaSolution], dict[str, Any]]) -> Subject:
    """Solutions of the package with some fields changed."""

    def solve(stack: rt.LayerStack, budget: rt.RankBudget, options: rt.SolverOptions) -> rt.RasaSolution:
        solution = rt.solve_rasa(stack, budget, options)
        return dataclasses.replace(solution, **change(stack, budget, options, solution))

    return Subject(solve_rasa=solve)


def at_factors(stack: rt.LayerStack, factors: rt.RasaFactors) -> dict[str, Any]:
    """What a solver that ends at `factors` says, with no lie in it."""
    errors = rt.layer_errors(stack, factors)
    return {"factors": factors, "error": math.fsum(errors), "layer_errors": errors, "history": [math.fsum(errors)]}


def worse_than_lora(stack: Any, budget: Any, options: Any, solution: rt.RasaSolution) -> dict[str, Any]:
    return at_factors(stack, solution.factors.scaled(0.0))


def only_lora(stack: Any, budget: Any, options: Any, solution: Any) -> dict[str, Any]:
    return at_factors(stack, rt.RasaFactors.from_lora(rt.solve_lora(stack, budget.rank).factors, budget))


def rising(start: str, sweep: str) -> Subject:
    def change(stack: Any, budget: Any, options: Any, solution: rt.RasaSolution) -> dict[str, Any]:
        if (options.start, options.sweep) != (start, sweep):
            return {}
        first, *rest = solution.history
        return {"history": [first, first * (1 + 1e-9), *rest]}

    return solver(change)


def last_digit(stack: rt.LayerStack, budget: Any, options: Any, solution: rt.RasaSolution) -> dict[str, Any]:
    """A tolerance that is not relative."""
    return {"error": solution.error * (1 + 2.3e-16 if stack.norm_squared > 1e9 else 1)}


def lora(change: Callable[[rt.LayerStack, rt.LoraSolution], float]) -> Subject:
    def solve(stack: rt.LayerStack, rank: int) -> rt.LoraSolution:
        solution = rt.solve_lora(stack, rank)
        return dataclasses.replace(solution, error=solution.error * change(stack, solution))

    return Subject(solve_lora=solve)


def allocation(factor: Callable[[rt.LayerStack, rt.RankBudget], float]) -> Subject:
    return Subject(
        allocation_bound=lambda stack, budget: rt.Bound(
            rt.allocation_bound(stack, budget).value * factor(stack, budget), "allocation"
        )
    )


def floor(name: str, factor: float = 1.01) -> Subject:
    """A closed floor that is 1 % too high."""
    return Subject(
        closed_floors=lambda stack, budget: [
            rt.Bound(bound.value * (factor if bound.name == name else 1), bound.name)
            for bound in HONEST.closed_floors(stack, budget)
        ]
    )


def floors_by_shape(axis: int) -> Subject:
    """Floors that are lower the longer one axis is."""
    return Subject(
        closed_floors=lambda stack, budget: [
            rt.Bound(bound.value * (1 - 1e-3 * stack.shape[axis]), bound.name)
            for bound in HONEST.closed_floors(stack, budget)
        ]
    )


def certificate(factor: float) -> Subject:
    return Subject(lower_bound=lambda *asked: rt.Bound(rt.lower_bound(*asked).value * factor, "scaled"))


def drop(factor: float, where: Callable[[rt.RasaFactors], bool] = lambda factors: True) -> Subject:
    def resolve(stack: rt.LayerStack, factors: rt.RasaFactors) -> tuple[rt.RasaFactors, float]:
        solved, found = HONEST.resolve_mixing(stack, factors)
        return solved, found * (factor if where(factors) else 1)

    return Subject(resolve_mixing=resolve)


def path(change: Callable[[dict[int, rt.RasaSolution]], dict[int, rt.RasaSolution]]) -> Subject:
    return Subject(solve_path=lambda *asked: change(rt.solve_path(*asked)))


def counting(shift: int) -> Subject:
    def attempt(*asked: Any) -> rt.Attempt:
        found = rt.random_attempt(*asked)
        return dataclasses.replace(found, iterations=found.iterations + shift if found.iterations else None)

    return Subject(random_attempt=attempt)


def fails(*arguments: Any) -> Any:
    raise ArithmeticError("no such number")


def entry(stack: rt.LayerStack) -> float:
    return float(stack.values[0, 0, 0]) / math.sqrt(stack.norm_squared)


def swapped(kind: str) -> Subject:
    """The embedding of this kind with the layers' mixing in the wrong order."""

    def embed(factors: rt.LoraFactors, budget: rt.RankBudget, pooled: str) -> rt.RasaFactors:
        right = rt.RasaFactors.from_lora(factors, budget, pooled)
        return dataclasses.replace(right, mixing=right.mixing.flip(0)) if pooled == kind else right

    return Subject(embed=embed)


def all_share(factors: rt.RasaFactors) -> bool:
    """So at a random pool; at an embedding every pool term serves one layer."""
    return bool((factors.mixing != 0).all())


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


@pytest.mark.parametrize(("law", "family", "broken"), BROKEN, ids=[f"{i}-{row[0]}" for i, row in enumerate(BROKEN)])
def test_a_broken_law_is_noticed_and_an_honest_one_holds(law: str, family: str, broken: Subject) -> None:
    assert honest(family).outcomes[law].holds
    assert not run_trial(draw_instance(family, 0, seed=0), broken, FEW, [law]).outcomes[law].holds


def test_every_law_is_broken_above() -> None:
    """But for the one that only a wrong optimum can break: see the next."""
    assert {law for law, _, _ in BROKEN} | {"answer_above_optimum"} == set(LAWS)


# ---- the command


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], subject: Subject = HONEST) -> tuple[int, Any, str]:
    status = verify.main([*arguments, "--json", "--quiet"], subject)
    out, err = capsys.readouterr()
    if not out:
        return status, None, err
    jsonschema.validate(json.loads(out), SCHEMA)
    return status, json.loads(out), err


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


@pytest.mark.parametrize(
    ("law", "family", "broken"),
    [
        ("answer_below_lora", "gaussian", solver(worse_than_lora)),
        ("rank_floor", "equal", floor("rank")),
        ("joint_falls", "gaussian", rising("random", "joint")),
        ("drop_measured", "gaussian", drop(1.01)),
        ("allocation_below_lora", "gaussian", allocation(lambda stack, budget: 2.0)),
        ("error_is_residual", "gaussian", solver(lambda *given: {"error": given[3].error * (1 - 1e-9)})),
    ],
)
def test_a_violation_is_exit_status_1_and_a_file_that_reproduces_it(
    law: str, family: str, broken: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--families", family, "--instances", "1", "--sweeps", "2", "--out", str(tmp_path / "with space")]
    status, found, err = run(arguments, capsys, broken)
    (failure,) = found["failures"]
    assert (status, found["verdict"]) == (1, "violated")
    assert law in {broken_law["name"] for broken_law in failure["laws"]}
    assert f"FAILED on {family} 0" in err
    assert f"again: {failure['replay']}" in err
    python, dash_m, module, *again = shlex.split(failure["replay"])
    assert (python, dash_m, module) == ("python", "-m", "rasa_theory.verify")
    status, repeated, err = run(again, capsys, broken)
    assert status == 1
    assert repeated["failures"] == [failure]
    assert f"again: {failure['replay']}" in err
    status, repeated, _ = run(again, capsys)
    assert (status, repeated["verdict"]) == (0, "holds")
    assert {held["name"] for held in repeated["families"][0]["laws"]} == {held["name"] for held in failure["laws"]}


def test_what_is_raised_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--families", "thin", "--instances", "1", "--out", "none"]
    status, found, err = run(arguments, capsys, Subject(solve_rasa=fails))
    assert status == 1
    assert "power_of_two (ArithmeticError: no such number)" in err
    assert "again: no file was written; run with --out DIR" in err
    assert found["failures"][0]["replay"] is None


def test_a_violation_whose_file_cannot_be_written_is_told_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failures").write_text("a file in the place of the folder", encoding="utf-8")
    arguments = ["--families", "thin", "--instances", "1", "--out", str(tmp_path)]
    status, found, err = run(arguments, capsys, Subject(solve_rasa=fails))
    assert (status, found["verdict"]) == (1, "violated")
    assert found["failures"][0]["file"] is None
    sentence = f"--out {tmp_path / 'failures'} is not a folder that can be made: File exists; name another folder"
    assert err.startswith(f"rasa_theory.verify: {sentence}\n")
    assert "again: no file was written; run with --out DIR" in err
    assert json.loads((tmp_path / "verify.json").read_text(encoding="utf-8")) == found


def test_a_file_made_by_hand_is_tried_on_every_law_and_a_wrong_optimum_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).standard_normal((2, 5, 4))
    np.savez(tmp_path / "mine.npz", values=values, r=2, k=1)
    status, found, _ = run(["--replay", str(tmp_path / "mine.npz"), "--sweeps", "3"], capsys)
    assert (status, found["sweeps"], found["families"][0]["name"]) == (0, 3, "replay")
    assert {law["name"] for law in found["families"][0]["laws"]} == {n for n in LAWS if "optimum" not in n}
    optimum = rt.solve_lora(rt.LayerStack(values), 2).error
    np.savez(tmp_path / "wrong.npz", values=values, r=2, k=0, optimum=optimum * 1.01, law="answer_above_optimum")
    status, found, _ = run(["--replay", str(tmp_path / "wrong.npz")], capsys)
    assert status == 1
    assert [law["name"] for law in found["failures"][0]["laws"]] == ["answer_above_optimum"]


def test_an_interruption_tallies_what_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def bound(*given: Any) -> rt.Bound:
        asked.append(given[0].name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rt.lower_bound(*given)

    arguments = ["--families", "thin", "--instances", "9", "--out", str(tmp_path)]
    status, found, err = run(arguments, capsys, Subject(lower_bound=bound))
    assert status == 130
    assert (found["instances"], found["finished"], found["verdict"]) == (9, 2, "undecided")
    assert "UNDECIDED: 0 violations in" in err
    assert err.rstrip().splitlines()[-2].endswith("interrupted, the rest was not run.")
    assert json.loads((tmp_path / "verify.json").read_text(encoding="utf-8")) == found


def test_two_processes_find_what_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers, the instances in the same order."""
    arguments = ["--families", "thin,planted", "--instances", "6", "--seed", "7", "--out", "none", "--json", "--quiet"]
    found = []
    for jobs in ("1", "2"):
        assert verify.main([*arguments, "--jobs", jobs]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["families"] == found[1]["families"]
    assert found[0]["finished"] == found[1]["finished"] == 6


def test_processes_are_as_many_as_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert [suitable_jobs(n) for n in (1, 49, 50, 99, 1000)] == [1, 1, 2, 3, 4]


def test_an_instance_depends_on_seed_family_and_number_alone(capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = (draw_instance("planted", 3, seed).draw for seed in (5, 5, 6))
    assert torch.equal(one.values, same.values)
    assert one.values.shape != other.values.shape or not torch.equal(one.values, other.values)
    arguments = ["--families", "thin", "--instances", "2", "--seed", "7", "--out", "none"]
    first, second = (run(arguments, capsys)[1] for _ in range(2))
    assert first["families"] == second["families"]


def test_the_list_and_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in (*FAMILIES, *LAWS))
    assert verify.main(["--families", "thin", "--instances", "1", "--out", "none", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(f"\n{law} " in out for law in LAWS)
    assert max(map(len, out.splitlines())) <= 120


def test_the_readme_counts_them() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"The first draws {len(FAMILIES)} families" in readme
    assert f"tries {len(LAWS)} laws on each" in readme


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--instances", "0"], "--instances must be at least 1, got 0"),
        (["--instances", "many"], "argument --instances: invalid int value: 'many'"),
        (["--seed", "-1"], "seed must be at least 0, got -1 (--seed)"),
        (["--families", "gaussian,odd"], "--families: 'odd' is none of gaussian, decaying"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--families", ""], "--families: '' is none of gaussian"),
        (["--sweeps", "0"], "sweeps must be at least 1, got 0 (--sweeps)"),
        (["--certificate", "best"], "argument --certificate: invalid choice: 'best'"),
        (["--out", ""], "--out '' names no folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--replay", "missing.npz"], "missing.npz does not exist"),
        (["--replay", "."], ".: not a sound .npz file"),
        (["--replay", "any.npz", "--jobs", "2"], "--replay tries one instance; --jobs does not go with it"),
        (["--replay", "any.npz", "--sweeps", "0"], "verify: sweeps must be at least 1, got 0 (--sweeps)"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = verify.main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("rasa_theory.verify: ")
    assert sentence in err
    assert err.count("\n") == 1


GOOD: dict[str, Any] = {"values": np.ones((2, 4, 3)), "r": 2, "k": 1}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"values": None}, "it holds no 'values'; values (L, b, a), r and k are needed"),
        ({"values": np.full((2, 4, 3), np.nan)}, "layer 0, entry (0, 0) is nan"),
        ({"values": np.ones((4, 3))}, "expected three axes (layers, b, a), found shape (4, 3)"),
        ({"r": 4}, "rank 4 exceeds min(b, a) = 3"),
        ({"k": 3}, "shared_rank 3 exceeds rank 2"),
        ({"k": "one"}, "k must be a whole number, got 'one'"),
        ({"r": 2.7}, "r must be a whole number, got 2.7"),
        ({"r": math.inf}, "r must be a whole number, got inf"),
        ({"r": np.ones(2)}, "an entry is of the wrong kind"),
        ({"law": "gravity"}, "unknown law 'gravity'; --list names those that there are"),
        ({"law": np.array([], str)}, "its 'law' is empty"),
        ({"sweeps": 1.5}, "sweeps must be a whole number, got 1.5"),
        ({"optimum": -1.0}, "optimum must be a finite number, at least 0, got -1.0"),
        ({"optimum": math.nan}, "optimum must be a finite number, at least 0, got nan"),
        ({"certificate": "best"}, "certificate 'best' is none of closed"),
        ({"optimum": 0.0, "met_by": ["luck"]}, "met_by holds ['luck']"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"values": np.ones((2, 4, 3), object)}, "not a sound .npz file"),
    ],
)
def test_bad_replays_are_one_sentence_and_exit_status_2(
    changed: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: value for name, value in (GOOD | changed).items() if value is not None})
    status, found, err = run(["--replay", str(path)], capsys)
    assert (status, found) == (2, None)
    assert err.startswith(f"rasa_theory.verify: {path}: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_damaged_files_and_those_of_another_kind_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "array.npy", GOOD["values"])
    np.savez_compressed(tmp_path / "whole.npz", **GOOD)
    whole = (tmp_path / "whole.npz").read_bytes()
    for n in range(0, len(whole), 7):
        (tmp_path / f"{n}.npz").write_bytes(whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :])
    unsound = 0
    for path in tmp_path.iterdir():
        status, _, err = run(["--replay", str(path), "--sweeps", "1"], capsys)
        assert status in (0, 2)  # some bytes, such as times, do not matter
        if status == 2:
            unsound += 1
            assert err.startswith(f"rasa_theory.verify: {path}: ")
            assert err.count("\n") == 1
    assert unsound > 10


def test_where_no_law_applies_nothing_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "none.npz", **GOOD, law="floor_below_optimum")  # but no optimum
    status, found, err = run(["--replay", str(tmp_path / "none.npz")], capsys)
    assert (status, found["verdict"], found["families"][0]["checks"]) == (0, "undecided", 0)
    assert "UNDECIDED: 0 violations in 0 checks on 1 instances" in err
