"""Numbers on pages are the numbers of the data, and a page that says otherwise is found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.pages import crossings, fill, training, training_runs, words
from experiments.pages.__main__ import main
from experiments.pages.__main__ import pages as all_pages
from experiments.pages.blocks import BLOCKS, block
from experiments.support.rows import append_rows, of_models, read_rows, write_rows

PAGE = "The gain is <!-- data: gain -->1 %<!-- end -->.\n\n<!-- data: rows -->\n\nold\n\n<!-- end -->\n"
TEXTS = {"gain": "2 %", "rows": "| a |\n| --- |\n| 1 |"}


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of figures/."""
    monkeypatch.setattr(words, "FIGURES", tmp_path)
    words.rows.cache_clear()
    yield tmp_path
    words.rows.cache_clear()


# ----------------------------------------------------------------------------------------- the pages of this checkout


def test_every_number_on_the_pages_is_the_one_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, f"run python -m experiments.pages: {capsys.readouterr().out}"


def test_every_block_is_on_a_page() -> None:
    used = {name for path in all_pages(words.ROOT) for name in fill.names(fill.read(path))}
    assert used == BLOCKS.keys(), "delete what no page shows"


def test_the_gallery_shows_every_picture() -> None:
    text = (words.ROOT / "docs/results/gallery.md").read_text(encoding="utf-8")
    missing = [path.name for path in words.FIGURES.glob("*.png") if f"](../../figures/{path.name})" not in text]
    assert missing == []


# ------------------------------------------------------------------------------------------------------------- blocks


def test_a_table_gets_lines_of_its_own_and_a_number_stays_in_its_sentence() -> None:
    text = fill.filled(PAGE, TEXTS.__getitem__)
    assert text == PAGE.replace("1 %", "2 %").replace("old", TEXTS["rows"])
    assert fill.filled(text, TEXTS.__getitem__) == text


@pytest.mark.parametrize(
    "text",
    [
        "a <!-- data: gain -->1",
        "a <!-- data: gain --> <!-- data: rows -->1<!-- end -->",
        "a <!-- data: no name -->1<!-- end -->",
    ],
)
def test_a_marker_without_a_partner_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs an <!-- end -->"):
        fill.filled(text, TEXTS.__getitem__)


def test_a_number_at_the_beginning_of_a_line_is_refused() -> None:
    with pytest.raises(ValueError, match="the number gain begins a line"):
        fill.filled("a\n<!-- data: gain -->1<!-- end --> b", TEXTS.__getitem__)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no block gane"):
        block("gane")


def test_a_notebook_changes_in_its_text_alone(tmp_path: Path) -> None:
    cells: list[dict[str, Any]] = [
        {"cell_type": kind, "metadata": {}, "source": PAGE.splitlines(keepends=True)} for kind in ("markdown", "code")
    ]
    path = tmp_path / "book.ipynb"
    path.write_text(json.dumps({"cells": cells, "nbformat": 4}, indent=1) + "\n", encoding="utf-8")
    assert fill.names(fill.read(path)) == ["gain", "rows"]
    path.write_text(fill.refreshed(path, TEXTS.__getitem__), encoding="utf-8")
    first, second = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert "".join(first["source"]) == fill.filled(PAGE, TEXTS.__getitem__)
    assert second == cells[1]
    assert fill.refreshed(path, TEXTS.__getitem__) == path.read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- the command


def test_a_stale_page_is_named_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    (tmp_path / "README.md").write_text("No numbers.\n", encoding="utf-8")
    page.write_text("Of <!-- data: attempts -->7<!-- end --> attempts.\n", encoding="utf-8")
    assert main(["--check", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "docs/page.md: stale\n"
    assert main(["--root", str(tmp_path)]) == 0
    rows = of_models(read_rows(words.FIGURES / "iteration_count.csv"), words.FIRST_MODEL)
    real = [row for row in rows if row["part"] == "real"]
    assert page.read_text(encoding="utf-8") == f"Of <!-- data: attempts -->{len(real)}<!-- end --> attempts.\n"
    assert main(["--check", "--root", str(tmp_path)]) == 0


def test_an_unknown_block_is_a_usage_error_that_names_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("a <!-- data: gane -->1<!-- end -->", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["--root", str(tmp_path)])
    assert stopped.value.code == 2
    assert "README.md: there is no block gane" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- their text


def cells(text: str) -> list[list[str]]:
    """The cells of a table without its rule."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()]
    return [lines[0], *lines[2:]]


def floor_row(stack: str, best: float, **more: Any) -> dict[str, Any]:
    return {"stack": stack, "k": 1, "best_found": best, "allocation": 0.992, "two_sided": 0.95} | more


def attempt(stack: str, iterations: int | None, **more: Any) -> dict[str, Any]:
    return {"part": "real", "stack": stack, "rank": 8, "k": 1, "iterations": iterations} | more


def test_the_summary_has_gain_limit_share_and_crossings(figures: Path) -> None:
    write_rows(figures / "floors.csv", ("stack", "k", "best_found", "allocation", "two_sided"),
               [floor_row("attention_output", 0.99), floor_row("attention_output", 0.5, k=2)])  # fmt: skip
    counts = [attempt("attention_output", n) for n in (10, 11, 60, 61, None)]
    others = [attempt("attention_output", 1, rank=4), attempt("attention_output", 1, part="pool")]
    write_rows(figures / "iteration_count.csv", ("part", "stack", "rank", "k", "iterations"), counts + others)
    assert cells(block("summary"))[1:] == [
        ["attention output", "1.00 %", "5.00 %", "80 %", "1 of 5", "2 of 5", "3 of 5", "4 of 5"]
    ]


def test_a_second_model_gets_a_column_and_rows_of_its_own(figures: Path) -> None:
    models = [floor_row("query", 0.99, model=""), floor_row("query", 0.96, model="mpnet")]
    write_rows(figures / "floors.csv", ("model", "stack", "k", "best_found", "allocation", "two_sided"), models)
    counts = [attempt("query", 5, model="mpnet"), attempt("query", None, model="")]
    write_rows(figures / "iteration_count.csv", ("model", "part", "stack", "rank", "k", "iterations"), counts)
    header, *lines = cells(block("summary"))
    assert header[:2] == ["model", "r = 8, k = 1"]
    assert [line[:3] + line[5:6] for line in lines] == [
        [words.FIRST_MODEL, "query", "1.00 %", "0 of 1"], ["mpnet", "query", "4.00 %", "1 of 1"],
    ]  # fmt: skip
    assert block("gain_k1") == "1.00 %", "a number in a sentence is of the first model"


def test_the_grid_of_ranks_has_gains_before_and_after_rounding(figures: Path) -> None:
    common = {"r": 8, "effort": "quick", "lora_bfloat16": 1.01, "allocation": 0.98, "floor": 0.75}
    points = [
        common
        | {"k": 1, "best_found": 0.96, "bfloat16": 0.98, "uncancelled": 0.97, "by_loss": 1.25, "cancellation": 2},
        common | {"k": 8, "best_found": 0.92, "bfloat16": 0.99, "by_loss": 2.0, "cancellation": 3.5},
    ]
    with_kinds = [
        point | {"model": model, "stack": stack}
        for model in (words.FIRST_MODEL, "all-mpnet-base-v2")
        for stack in ("query", "attention_output")
        for point in points
    ]
    file = figures / "ranks_and_pools.csv"
    write_rows(file, tuple(with_kinds[0]), with_kinds)
    header, first, _ = cells(block("gains_by_rank"))
    assert (header, first) == (["model", "r", "k = 1", "k = 8"], [words.FIRST_MODEL, "8", "4.00 %", "8.00 %"])
    assert cells(block("rounded_gains_by_rank"))[2] == ["all-mpnet-base-v2", "8", "3.00 %", "2.00 %"]
    assert cells(block("best_in_bfloat16"))[1][1:] == ["8", "8", "1", "3.5"]
    assert cells(block("at_eighth"))[1][1:] == ["8", "1", "50 %", "50 %", "25 %", "75 %", "1.25", "25.0 %"]
    assert (block("sharing_k8"), block("sharing_k8_mpnet"), block("allocation_k8_mpnet")) == (
        "6.00 %",
        "6.00 %",
        "25 %",
    )
    write_rows(file, tuple(with_kinds[0]), with_kinds[:1])
    words.rows.cache_clear()
    with pytest.raises(ValueError, match="no r and k with rows of query and attention_output"):
        block("at_eighth")


def test_synthetic_stacks_have_a_table_of_their_own(figures: Path) -> None:
    row = {"model": "synthetic", "stack": "half common bases", "k": 1, "allocation": 0.99, "best_found": 0.96,
           "floor": 0.9, "by_loss": 2.5}  # fmt: skip
    write_rows(
        figures / "ranks_and_pools.csv", ("r", *row), [row | {"r": 8}, row | {"r": 4}, row | {"r": 8, "model": "m"}]
    )
    assert cells(block("synthetic_layers"))[1:] == [
        ["half common bases", "1", "4.00 %", "25 %", "3.00 %", "2.50", "10.00 %"]
    ]


def trained(name: str, rank: int, rate: float, seed: int, mrr: float, tuning: bool) -> dict[str, Any]:
    return {"name": name, "run": {"rank": rank, "learning_rate": rate, "seed": seed}, "tuning": tuning,
            "settings": {}, "looks": [{"validation_mrr": mrr, "drift": {"prose": mrr / 10}}], "test_mrr": mrr / 2,
            "losses": [1.0]}  # fmt: skip


def test_rates_of_two_tuning_seeds_stand_with_their_mean_and_the_best_is_marked(
    figures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_runs, "FIGURES", figures)
    trials = [("lora(8)", 1e-3, (0.5, 0.6)), ("lora(8)", 2e-3, (0.4, 0.8)), ("rasa(8,1)", 1e-3, (0.5, 0.5))]
    own = [trained(name, 8, rate, 100 + n, mrr, True) for name, rate, both in trials for n, mrr in enumerate(both)]
    own += [trained("lora(2)", 2, 1e-3, 100, 0.5, True)]
    own += [trained("lora(8)", 8, rate, seed, 0.5 + 100 * rate + 0.1 * seed, False) for rate in (1e-3, 2e-3)
            for seed in (0, 1)]  # fmt: skip
    append_rows(figures / "train_adapters_cpu.jsonl", own)
    training_runs.runs_of.cache_clear()
    assert cells(block("finer_rates")) == [
        ["rate", "LoRA(8)", "RaSA(8, 1)"],
        ["0.001", "0.5500 (0.5000, 0.6000)", "**0.5000** (0.5000, 0.5000)"],
        ["0.002", "**0.6000** (0.4000, 0.8000)", ""],
    ]
    assert block("lora_rate_validation") == "+0.1000 ± 0.0000"
    assert (block("lora_rate_mrr"), block("lora_rate_drift")) == ("+0.0500 ± 0.0000", "+0.010 ± 0.000")
    training_runs.runs_of.cache_clear()


def test_rates_that_are_compared_are_those_of_the_data(figures: Path) -> None:
    rates = {"rasa(8,1)": 1e-3, "lora(8)": 2e-3, "rasa(2,1)": 3e-3, "lora(2)": 3e-3}
    write_rows(figures / "train_adapters.csv", ("method", "rate"), [{"method": m, "rate": r} for m, r in rates.items()])
    ours = {row["method"]: row for row in words.rows("train_adapters.csv")}
    compared = [
        training.compared_rates("train_adapters.csv", ours[name], suffix)
        for name, suffix in (("rasa(8,1)", ""), ("rasa(8,1)", "_at_equal_rate"), ("rasa(2,1)", ""))
    ]
    assert compared == ["RaSA at 0.001, LoRA at 0.002, as chosen", "both at 0.001", "both at 0.003, as chosen"]


def test_numbers_of_the_second_model_are_its_own_and_none_is_invented(figures: Path) -> None:
    model = {"model": "all-mpnet-base-v2"}
    counts = [attempt("query", n, **model) for n in (9, 10, 11, None)]
    file, columns = figures / "iteration_count.csv", ("model", "part", "stack", "rank", "k", "layers", "iterations")
    write_rows(file, columns, [*counts, attempt("query", 1), attempt("query", 1, k=2, **model)])
    assert (block("mpnet_by_10"), block("mpnet_never")) == ("2 of 4", "1 of 4")
    pool = {"part": "pool", "source": "updates", "stack": "query", "k": 1} | model
    errors = [("allocation", 0.97), ("best_found", 0.96), ("floor", 0.9)]
    values = [*errors, ("by_loss", 1.0), ("by_loss", 3.0), ("by_weight", 1.0)]
    own = [pool | {"item": item, "value": value} for item, value in values]
    write_rows(figures / "why_sharing_pays.csv", tuple(own[0]), own)
    assert (block("allocation_mpnet"), block("median_owners_mpnet")) == ("75 %", "2.00")
    assert cells(block("owners"))[1:] == [["updates", "2.00", "1 of 2", "1.00"]]
    write_rows(file, columns, [attempt("query", 1)])
    words.rows.cache_clear()
    with pytest.raises(ValueError, match=r"iteration_count\.csv has no rows of all-mpnet-base-v2 with"):
        block("mpnet_by_10")


def rows_over_kinds(model: str, stack: str, k: int) -> list[dict[str, Any]]:
    """Four terms in each way: two that serve 2.5 matrices, query and value, and two that serve 1.4, key and value."""
    ways = {"a pool for each kind": 0.98, "as they are": 0.96, "attention output transposed": 0.95,
            "turned apart": 0.97, "a pool for each layer": 0.94, "a pool over different layers": 0.93,
            "a pool for each layer, turned apart": 0.92}  # fmt: skip
    found: list[dict[str, Any]] = []
    for way, best in ways.items():
        items: list[tuple[str, Any, Any]] = [("allocation", None, 0.99), ("best_found", None, best - 0.01 * k)]
        for j in range(4):
            items += [
                ("by_loss", j, 2.5 if j < 2 else 1.4),
                ("two_kinds", j, f"{'query' if j < 2 else 'key'} and value"),
            ]
        if not way.startswith("a pool"):
            items.append(("by_loss_of_kinds", 0, 1.25))
        found += [{"model": model, "part": "kinds", "source": way, "stack": stack, "k": k, "item": item, "index": index,
                   "value": value} for item, index, value in items]  # fmt: skip
    return found


def test_pools_over_kinds_stand_beside_each_other_for_every_model_and_run(figures: Path) -> None:
    first, second = words.FIRST_MODEL, "all-mpnet-base-v2"
    own = [*rows_over_kinds(first, "all kinds", 1), *rows_over_kinds(first, "all kinds", 2)]
    own += [*rows_over_kinds(first, "all kinds, prose", 1), *rows_over_kinds(second, "all kinds", 1)]
    write_rows(figures / "why_sharing_pays.csv", tuple(own[0]), own)
    lines = cells(block("pooled_kinds"))[1:]
    assert [line[:2] for line in lines[::7]] == [[first, "1"], [first, "2"], [second, "1"]]
    assert [line[5:] for line in lines[:2]] == [["1.95", ""], ["1.95", "1.25"]]
    assert [line[4] for line in lines[:7]] == ["2.00 %", "4.00 %", "5.00 %", "3.00 %", "6.00 %", "7.00 %", "8.00 %"]
    assert block("layer_sharing") == "2.00 %, 6.00 % and 7.00 %"
    shared = ["2.000 %", "6.000 %", "7.000 %", "8.000 %", "1.95", "2.50"]
    assert cells(block("layer_pools"))[1:] == [
        [model, run, *shared]
        for model, run in ((first, "code, seed 0"), (first, "prose, seed 0"), (second, "code, seed 0"))
    ]
    assert cells(block("two_kinds"))[1:] == [
        [first, "4 of 8", "0", "4", "0", "0", "0", "0"],
        [second, "2 of 4", "0", "2", "0", "0", "0", "0"],
    ]


def test_synthetic_rows_are_of_no_model(figures: Path) -> None:
    synthetic = attempt("power:0.7", 2, part="layers", layers=12)
    real = [attempt("query", 5, part="layers", layers=3, model=model) for model in ("", "all-mpnet-base-v2")]
    columns = ("model", "part", "stack", "rank", "k", "layers", "iterations")
    write_rows(figures / "iteration_count.csv", columns, [synthetic, *real])
    assert [line[:3] for line in cells(block("crossings_layers"))[1:]] == [
        [words.FIRST_MODEL, "query", "3"], ["all-mpnet-base-v2", "query", "3"],
        ["synthetic", "half of the bases common", "12"],
    ]  # fmt: skip


def test_the_summary_has_gain_limit_and_crossings_of_each_model(figures: Path) -> None:
    write_rows(figures / "floors.csv", ("model", "stack", "k", "best_found", "allocation", "two_sided"),
               [floor_row("query", 0.99, model=""), floor_row("query", 0.96, model="mpnet")])  # fmt: skip
    write_rows(figures / "iteration_count.csv", ("model", "part", "stack", "rank", "k", "iterations"),
               [attempt("query", 5, model="mpnet")])  # fmt: skip
    assert cells(block("summary"))[1:] == [
        [words.FIRST_MODEL, "query", "1.00 %", "5.00 %", "80 %", "", "", "", ""],
        ["mpnet", "query", "4.00 %", "5.00 %", "20 %", *["1 of 1"] * 4],
    ]


def test_methods_are_compared_on_the_kinds_that_a_model_has(figures: Path) -> None:
    rows = [
        {"model": model, "stack": stack, "r": 8, "method": method, "settings": "rank=8", "error": error,
         "evidence": "closed form"}
        for model, kinds in ((words.FIRST_MODEL, words.KINDS), ("mpnet", ("query",)))
        for stack in kinds
        for method, error in (("lora", 0.5), ("allocated", 0.49))
    ]  # fmt: skip
    write_rows(figures / "neighbours.csv", tuple(rows[0]), rows)
    assert cells(block("neighbours"))[3][3:] == ["-2.0", "", "", "", "minimum"]


@pytest.mark.parametrize("value", [-1e-9, 0.0, 1e-9])
def test_zero_has_no_sign(value: float) -> None:
    assert (words.percent(value, 0), words.percents([value, value], 2), words.span([value], ".1f")) == (
        "0 %", "0.00 %", "0.0",
    )  # fmt: skip
    assert words.percents([-0.02, 0.01]) == "-2.00 to 1.00 %"


def test_what_sets_share_is_beside_its_controls(figures: Path) -> None:
    columns = ("model", "part", "relation", "how", "stack", "item", "index", "value")
    pools = {
        ("pool", "seed", "as they are"): 0.96,
        ("pool", "seed", "one set turned"): 0.98,
        ("pool", "seed", "a pool each"): 0.985,
        ("pool", "none", "a pool each"): 0.97,
        ("pair", "seed", "same layer"): 0.95,
        ("pair", "seed", "other layer"): 0.989,
        ("depth", "groups of 3", "neighbours"): 0.94,
        ("depth", "groups of 3", "distant"): 0.98,
    }
    own = [
        dict(zip(columns, ("m", *key, "query", item, None, value), strict=True))
        for key, best in pools.items()
        for item, value in (("allocation", 0.99), ("best_found", best))
    ]
    own += [
        dict(zip(columns, ("m", "pool", "seed", "as they are", "query", "by_loss_of_sets", j, served), strict=True))
        for j, served in enumerate((1.4, 1.6, 2.0))
    ]
    own += [
        dict(zip(columns, ("m", "overlap", "seed", None, "query", item, index, value), strict=True))
        for item in ("cosine", "columns", "rows")
        for index, value in (("same layer", 0.5), ("other layer", 0.02))
    ]
    write_rows(figures / "seeds_and_tasks.csv", columns, own)
    assert cells(block("pooled_sets"))[1:] == [["two seeds", "query", "3.00 %", "1.00 %", "0.50 %", "", "2 of 3"]]
    assert cells(block("pooled_pairs"))[1:] == [["two seeds", "query", "4.00 %", "0.10 %"]]
    assert cells(block("pooled_groups"))[1:] == [["query", "3", "5.00 %", "1.00 %", "2.00 %"]]
    assert cells(block("overlaps_of_sets"))[1:] == [["two seeds", "query", "50 %", "2 %", "50 %", "2 %", "50 %", "2 %"]]


def test_a_missing_file_is_named(figures: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"figures/floors\.csv is missing"):
        block("floors")


@pytest.mark.parametrize(("counts", "median"), [((3, None, 9), "9"), ((3, None), "3"), ((None, None, 4), "never")])
def test_an_attempt_that_never_crosses_counts_as_infinity(counts: tuple[int | None, ...], median: str) -> None:
    assert crossings.median([{"iterations": n} for n in counts]) == median


def test_ranges_are_one_number_where_both_ends_look_the_same() -> None:
    assert words.percents([0.561, 0.889], 0) == "56 to 89 %"
    assert words.percents([0.561, 0.562], 0) == "56 %"


def test_a_line_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        words.table(["a", "b"], [["1"]])


@pytest.mark.parametrize(("method", "rank"), [("lora(7)", 7), ("rasa(2,1)", 7), ("rasa(8,1)", 13), ("rasa(8,4)", 28)])
def test_the_rank_that_an_update_may_have(method: str, rank: int) -> None:
    assert training.most_rank(method) == rank
