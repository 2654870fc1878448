"""The table of a study: known lines for 80 columns, long names and a narrow terminal; sentences that stay short."""

from __future__ import annotations

from typing import Any

import pytest

from rasa_theory.reconstruction import StudyTable, explanation_lines, table, verdict_lines

GATE, DENSE = "model.layers.*.mlp.gate_proj.weight", "encoder.layer.*.attention.output.dense.weight"


def run(k: int, e_rasa: float, floor: float, counts: list[int | None], **more: Any) -> dict[str, Any]:
    return {
        "k": k,
        "e_rasa": e_rasa,
        "e_allocation": 0.99857 if k else 1.0,
        "lower_bound": floor,
        "lower_bound_name": "split",
        "attempts": [{"iterations": count} for count in counts],
        "mixing_drop": 1.0,
        "start": "near-allocation",
        "stop_reason": "SWEEP_LIMIT",
        "search": {"starts": 33, "near_best": 7} if k else None,
        "checks": {"answer_is_not_above_e_lora": True, "floor_is_not_above_answer": True},
        "theorem_3_1": "holds",
    } | more


def stack(name: str, *runs: dict[str, Any], norm: float = 1 / 0.6412, e_lora: float = 1.0) -> dict[str, Any]:
    return {"name": name, "norm_squared": norm, "e_lora": e_lora, "shape": [384, 384], "runs": list(runs)}


ONE = run(1, 0.99745, 0.96176, [None, 11, 35, 20, None])
PATH = (run(0, 1.0, 1.0, []), ONE, run(16, 0.8, 0.0, [None] * 5))


def results(*stacks: dict[str, Any]) -> dict[str, Any]:
    return {"rank": 8, "theorem_3_1": "holds", "environment": None, "stacks": list(stacks)}


EXPLANATION = [
    "Misses: share of ||M||^2. Gains: share of LoRA's error, never above the limit.",
    "By ranks alone: unequal ranks, nothing shared. In brackets: iterations needed.",
]


def test_80_columns() -> None:
    assert table(results(stack("query", *PATH), stack("attention_output", ONE))).splitlines() == [
        "                          LoRA      RaSA  by ranks  certified  random starts",
        "stack              k    misses     gains     alone      limit  below LoRA",
        "--------------------------------------------------------------------------------",
        "query              0   64.12 %   0.000 %   0.000 %    0.000 %  -",
        "                   1   64.12 %   0.255 %   0.143 %    3.824 %  3 of 5 (11 to 35)",
        "                  16   64.12 %   20.00 %   0.143 %   100.00 %  none of 5",
        "attention_output   1   64.12 %   0.255 %   0.143 %    3.824 %  3 of 5 (11 to 35)",
        *EXPLANATION,
    ]


def test_names_that_do_not_fit_are_whole_on_lines_of_their_own() -> None:
    assert table(results(stack(GATE, *PATH), stack(DENSE, ONE))).splitlines() == [
        "stack      LoRA      RaSA  by ranks  certified  random starts",
        "    k    misses     gains     alone      limit  below LoRA",
        "-----------------------------------------------------------------",
        "model.layers.*.mlp.gate_proj.weight",
        "    0   64.12 %   0.000 %   0.000 %    0.000 %  -",
        "    1   64.12 %   0.255 %   0.143 %    3.824 %  3 of 5 (11 to 35)",
        "   16   64.12 %   20.00 %   0.143 %   100.00 %  none of 5",
        "encoder.layer.*.attention.output.dense.weight",
        "    1   64.12 %   0.255 %   0.143 %    3.824 %  3 of 5 (11 to 35)",
        *EXPLANATION,
    ]


def test_a_narrow_terminal_draws_columns_together_and_folds_the_last() -> None:
    assert table(results(stack("query", ONE)), 56).splitlines() == [
        "stack     LoRA     RaSA by ranks certified random starts",
        "    k   misses    gains    alone     limit below LoRA",
        "--------------------------------------------------------",
        "query",
        "    1  64.12 %  0.255 %  0.143 %   3.824 % 3 of 5 (11 to",
        "                                           35)",
        "Misses: share of ||M||^2. Gains: share of LoRA's error,",
        "never above the limit.",
        "By ranks alone: unequal ranks, nothing shared. In",
        "brackets: iterations needed.",
    ]


@pytest.mark.parametrize(("names", "width"), [(["query", "attention_output"], 80), ([GATE], 99), ([DENSE, GATE], 109)])
def test_names_that_fit_stand_beside_the_numbers(names: list[str], width: int) -> None:
    lines = table(results(*(stack(name, ONE) for name in names)), width).splitlines()
    assert [line.split()[0] for line in lines[3 : 3 + len(names)]] == names
    assert all("0.255 %" in line for line in lines[3 : 3 + len(names)])
    assert max(map(len, lines)) == width


def test_rows_are_made_one_by_one_as_in_the_whole_table() -> None:
    stacks = [stack("query", *PATH), stack(GATE, ONE)]
    text = StudyTable([one["name"] for one in stacks], 5)
    rows = [line for one in stacks for point in one["runs"] for line in text.rows(one, point)]
    assert [*text.head(), *rows] == table(results(*stacks)).splitlines()[: -len(EXPLANATION)]


def test_verbose_says_where_a_row_comes_from() -> None:
    lines = table(results(stack("query", run(0, 1.0, 1.0, []), ONE)), verbose=True).splitlines()
    assert lines[4] == "  start: near-allocation; stop: sweep limit; limit by floor: split"
    assert " ".join(lines[6:8]).endswith("limit by floor: split; starts near   the lowest: 7 of 33")


def test_a_limit_is_rounded_up_and_a_stack_without_an_error_has_no_gain() -> None:
    (row,) = table(results(stack("query", run(1, 0.88, 0.8799999, [])))).splitlines()[3:4]
    assert row.split()[2:] == ["64.12", "%", "12.00", "%", "0.143", "%", "12.01", "%", "-"]
    exact, zero = (
        table(results(stack("query", ONE, norm=norm, e_lora=0.0))).splitlines()[3].split()[2:] for norm in (1.0, 0.0)
    )
    assert exact == ["0.000", "%", "-", "-", "-", "3", "of", "5", "(11", "to", "35)"]
    assert zero[:4] == ["-"] * 4


def test_a_lonely_search_and_a_probable_floor_are_said_once_for_all_stacks() -> None:
    lonely = run(1, 0.9, 0.8, [], search={"starts": 33, "near_best": 1}, lower_bound_failure=1e-10)
    lines = explanation_lines(results(*(stack(f"stack_{n}", lonely) for n in range(65))))
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 7
    assert "on stack_0 (k = 1), stack_1 (k = 1), stack_2 (k = 1) and 62 more; --effort thorough" in " ".join(lines)
    assert "holds but for a probability of 1e-10" in " ".join(lines)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"theorem_3_1": "violated", "checks": {"floor_is_not_above_answer": False}}, "FAILED on"),
        ({"theorem_3_1": "undecided", "start": "random"}, "the start random ended above e_lora"),
    ],
)
def test_what_is_wrong_with_many_stacks_is_one_sentence(change: dict[str, Any], said: str) -> None:
    many = [stack(f"stack_{n}", run(1, 0.9, 0.8, [], **change)) for n in range(65)]
    lines = verdict_lines(results(*many))
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).count(said) == 1
    assert "stack_2 (k = 1) and 62 more" in " ".join(lines)
    zeros = [stack(f"stack_{n}", ONE, norm=0.0, e_lora=0.0) for n in range(65)]
    assert "stack_2 and 62 more: all updates are zero" in " ".join(verdict_lines(results(*zeros)))
