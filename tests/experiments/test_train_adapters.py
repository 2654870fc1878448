"""The experiment on RaSA's two claims: its protocol on a tiny random BERT, and its statistics against known answers."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import rasa_theory as rt
from experiments import adapter_claims as claims
from experiments.models import sentences
from experiments.models.data import TASKS
from experiments.models.encoder import Encoder
from experiments.support.rows import append_rows
from experiments.train_adapters import protocol, starts, training
from experiments.train_adapters import run as experiment
from rasa_theory.common import InputError
from rasa_theory.peft.library import PeftModel
from rasa_theory.peft.pools import Pool
from tests.experiments.test_finetune import tiny

SETTINGS = protocol.Settings(steps=3, batch=4, warmup=1, train_pairs=40, validation_pairs=20, test_pairs=20,
                               prose_pairs=8, every=2, short_steps=3, bfloat16=False)  # fmt: skip
CPU = torch.device("cpu")
METHODS = [("full", 0, 0), ("lora", 2, 0), ("rasa", 2, 1), ("rasa", 2, 2), ("lora", 3, 0)]


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiny BERT for the real checkpoint, which is an extra, and few sweeps."""
    monkeypatch.setattr(Encoder, "pretrained", staticmethod(tiny))
    quick, solve = rt.SolverOptions(start="allocation", max_sweeps=2), rt.solve_rasa
    monkeypatch.setattr(rt, "solve_rasa", lambda stack, budget, options=None: solve(stack, budget, quick))
    starts.kinds.cache_clear()
    yield
    starts.kinds.cache_clear()


@cache
def task() -> protocol.Task:
    return protocol.Task(SETTINGS, protocol.Data.collected(SETTINGS, None))


def run_of(method: str, rank: int, k: int, rate: float = 1e-3, seed: int = 0, start: str = "zero") -> protocol.Run:
    return protocol.Run(method, rank, k, rate, seed, start)


# ---- the protocol


@pytest.mark.slow
def test_every_method_sees_the_same_batches_and_dropout_masks() -> None:
    losses = []
    for method, rank, k in METHODS:  # at the rate 0 every model stays what all of them are at the start
        encoder = tiny()
        parameters, _ = experiment.prepared(encoder, run_of(method, rank, k), task())
        torch.manual_seed(len(losses))  # whatever was drawn before
        losses.append(training.train(encoder, parameters, task(), 0.0, 5, lambda _: None))
    assert len(set(losses[0])) == SETTINGS.steps
    assert losses == [losses[0]] * len(METHODS)


def test_batches_go_through_all_pairs_in_an_order_of_the_seed() -> None:
    source, pairs = training.batches(task(), 1), task().data.train
    epoch = [pair for _ in range(len(pairs) // SETTINGS.batch) for pair in next(source)]
    assert sorted(map(hash, epoch)) == sorted(map(hash, pairs))
    assert next(training.batches(task(), 1)) == epoch[:4] != next(training.batches(task(), 2))


def test_the_parts_of_the_data_are_of_disjoint_modules() -> None:
    data = task().data
    train, validation, test = ({pair.module for pair in part} for part in (data.train, data.validation, data.test))
    assert len(train | validation | test) == len(train) + len(validation) + len(test)
    assert [len(pairs) for pairs in data.prose.values()] == [8, 8]
    assert data.python == platform.python_version()


@pytest.mark.slow
def test_what_was_collected_is_kept_whole_for_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert protocol.Data.collected(SETTINGS, tmp_path) == task().data
    more = replace(SETTINGS, train_pairs=50, prose_pairs=9)
    data = protocol.Data.collected(more, None)
    monkeypatch.setitem(TASKS, "code", (list, ""))  # this machine has nothing else
    monkeypatch.setattr(protocol, "_reference", list)
    assert protocol.Data.collected(more, tmp_path) == data


@pytest.mark.slow
def test_sentences_of_docstrings_and_the_next_ones() -> None:
    first, second, last = "One sentence of six words stands.", "Then another with as many words.", "Too short."
    assert list(sentences.consecutive(f"{first}  {second}\n{last}\n\n{second}")) == [(first, second)]
    found = list(islice(sentences.of_docstrings(), 300))
    assert len({text for _, *both in found for text in both}) == 600


def some_factors(pool: Pool) -> rt.RasaFactors:
    """Of no particular scale."""
    (b, a), q, R = pool.shape, pool.budget.private_rank, pool.rank
    generator = torch.Generator().manual_seed(0)
    return rt.RasaFactors(*(3 * torch.randn(shape, generator=generator)
                            for shape in ((2, b, q), (2, q, a), (b, R), (R, a), (2, R))))  # fmt: skip


@pytest.mark.parametrize(("rank", "k"), [(2, 0), (2, 1), (2, 2)])
def test_starts_from_data(rank: int, k: int) -> None:
    encoder = tiny()
    adapter = starts.adapted(encoder, rt.RankBudget(rank, k), 0)
    for pool in adapter.base_model.pools("default"):
        layers = [adapter.base_model.layer(name) for name in pool.modules]
        mixing, factors = layers[0].rasa_mixing["default"].detach().clone(), some_factors(pool)
        starts.start_from(adapter, pool.name, factors, True)
        for i, layer in enumerate(layers):
            torch.testing.assert_close(layer.update("default"), factors.update(i), rtol=1e-4, atol=1e-4)
            rows = layer.terms_of("default")[2].detach()  # [A~_i; A_S]
            torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), 3**-0.5))  # as Kaiming
            assert bool((layer.rasa_mixing["default"].abs() <= mixing * (1 + 1e-6)).all())
    adapter = starts.adapted(other := tiny(), rt.RankBudget(rank, k), 0)
    for pool in adapter.base_model.pools("default"):
        starts.start_from(adapter, pool.name, some_factors(pool), False)
        assert not any(adapter.base_model.layer(name).update("default").any() for name in pool.modules)
    ids = torch.arange(6).reshape(1, 6)
    assert torch.equal(other.model.eval()(ids)[0], tiny().model.eval()(ids)[0])


@pytest.mark.slow
@pytest.mark.parametrize("start", ["gradient", "updates"])
def test_factors_of_data_are_of_every_kind(start: str) -> None:
    factors = starts.factors_of_data(run_of("rasa", 2, 1, start=start), task(), CPU)
    assert factors.keys() == starts.kinds().keys()
    assert all(float(f.update(0).norm()) > 0 for f in factors.values())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rank", "k"), METHODS[:3])
def test_a_run_is_a_row(method: str, rank: int, k: int, tmp_path: Path) -> None:
    run = run_of(method, rank, k, rate=0.1)  # so that three steps move more than rounding does
    row = json.loads(json.dumps(experiment.execute(run, task(), "cpu", False, tmp_path)))
    assert [look["step"] for look in row["looks"]] == [0, 2, 3]
    assert all(abs(x) < 1e-6 for x in row["looks"][0]["drift"].values())
    assert row["looks"][-1]["drift"]["reference"] > 1e-9
    assert len(row["losses"]) == 3
    assert len(row["updates"]) == 6
    assert all(norm > 0 for of in row["updates"].values() for norm in of["norms"])
    if method == "full":
        assert all(e["e_rasa"] <= e["e_lora"] <= 1 for of in row["reconstruction"].values() for e in of.values())
    else:
        assert max(len(s) for of in row["updates"].values() for s in of["sigma"]) == rank - k + 2 * k
        kept = PeftModel.from_pretrained(tiny().model, str(tmp_path / run.folder("code"))).base_model.model
        stack = torch.stack([kept.get_submodule(f"encoder.layer.{i}.attention.self.query").get_delta_weight("default")
                             for i in range(2)])  # fmt: skip
        found = row["updates"]["attention.self.query"]["norms"]
        assert found == pytest.approx(torch.linalg.vector_norm(stack, dim=(1, 2)).tolist(), rel=1e-3)
    short = experiment.execute(run, task(), "cpu", True)
    assert (short["losses"], [look["step"] for look in short["looks"]]) == (row["losses"], [3])


def test_the_methods_have_equal_parameters_or_the_largest_rank() -> None:
    names = [run.name for run in experiment.methods(2, False)]
    assert names == ["full", "lora(2)", "rasa(2,1)", "lora(3)"]  # of two layers: q + R = 1 + 2
    assert [run.name for run in experiment.methods(8, False)][-2:] == ["lora(9)", "lora(12)"]
    assert len({run.name for run in experiment.methods(2, True)}) == 4
    assert [run.name for run in experiment.methods(1, False)] == ["full", "lora(1)", "rasa(1,1)", "lora(2)"]


def test_only_takes_names_that_there_are() -> None:
    runs = experiment.methods(2, False)
    assert experiment.named(runs, None) == runs
    assert [run.name for run in experiment.named(runs, ["rasa(2,1)", "lora(2)"])] == ["lora(2)", "rasa(2,1)"]
    with pytest.raises(InputError, match=r"--only 'lora\(4\)' is none of full, lora\(2\), rasa"):
        experiment.named(runs, ["lora(2)", "lora(4)"])


def test_finished_runs_are_found_again_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = experiment.Runs(tmp_path / "rows.jsonl", SETTINGS)
    base, scores = run_of("lora", 2, 0), dict(zip(experiment.GRID, (0.05, 0.1, 0.3, 0.5, 0.4, 0.2), strict=True))
    for rate, score in scores.items():
        for seed, shift in ((experiment.TUNING_SEED, 0.0), (0, 1.0 * (rate == 1e-2))):
            run = replace(base, learning_rate=rate, seed=seed)
            tuning = seed == experiment.TUNING_SEED
            rows.add({"run": asdict(run), "tuning": tuning, "settings": asdict(SETTINGS),
                      "looks": [{"validation_mrr": score + shift}]})  # fmt: skip
    again = experiment.Runs(tmp_path / "rows.jsonl", SETTINGS)
    assert again.rows == rows.rows
    trials = experiment.trials(base, experiment.GRID, 1)
    assert experiment.best_rate(again.find(trial, True) for trial in trials) == 1e-3
    monkeypatch.setattr(experiment.multiprocessing, "get_context", lambda _: pytest.fail("a finished run is run again"))
    experiment.perform(trials, True, again, task(), "cpu", 1, None)
    assert again.find(trials[0], False) is None
    assert experiment.Runs(tmp_path / "rows.jsonl", replace(SETTINGS, steps=4)).rows == []


def trial(rate: float, seed: int, mrr: float) -> dict[str, Any]:
    return {"run": asdict(run_of("lora", 2, 0, rate=rate, seed=seed)), "looks": [{"validation_mrr": mrr}]}


def test_the_rate_is_chosen_by_the_mean_over_tuning_seeds() -> None:
    lucky, steady = [trial(1e-3, 100, 0.9), trial(1e-3, 101, 0.1)], [trial(3e-3, 100, 0.6), trial(3e-3, 101, 0.6)]
    assert experiment.best_rate(lucky[:1] + steady[:1]) == 1e-3
    assert experiment.best_rate(lucky + steady) == 3e-3
    assert experiment.best_rate([trial(3e-3, 100, 0.5), trial(1e-3, 100, 0.5)]) == 1e-3
    for trials, seeds in ((lucky + steady[:1], "1 and 2"), ([], "no")):
        with pytest.raises(InputError, match=f"tried with {seeds} tuning seeds"):
            experiment.best_rate(trials)
    runs = experiment.trials(run_of("lora", 2, 0), (1e-3, 3e-3), 2)
    assert [(run.learning_rate, run.seed) for run in runs] == [(1e-3, 100), (1e-3, 101), (3e-3, 100), (3e-3, 101)]


def test_the_seeds_run_at_the_rate_that_the_tuning_seeds_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[protocol.Run, bool]] = []

    def perform(runs: list[protocol.Run], tuning: bool, rows: experiment.Runs, *given: object) -> None:
        done.extend((run, tuning) for run in runs)
        for run in runs:
            score = 0.9 if (run.learning_rate, run.seed) == (1e-3, 100) else 0.6 if run.learning_rate == 3e-3 else 0.1
            rows.add({"run": asdict(run), "tuning": tuning, "settings": asdict(protocol.Settings()),
                      "looks": [{"validation_mrr": score}]})  # fmt: skip

    monkeypatch.setattr(experiment, "perform", perform)
    monkeypatch.setattr(experiment.Data, "collected", lambda settings, folder: None)
    options = ["--only", "lora(2)", "--rates", "1e-3", "3e-3", "--seeds", "2", "--device", "cpu"]
    experiment.main([*options, "--tuning-seeds", "2", "--out", str(tmp_path / "rows.jsonl")])
    final = [(run.learning_rate, run.seed) for run, tuning in done if not tuning]
    assert (len(done), final) == (6, [(3e-3, 0), (3e-3, 1)])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rank", "0"], "--rank must be at least 1, not 0"),
        (["--seeds", "0"], "--seeds must be at least 1, not 0"),
        (["--tuning-seeds", "0"], "--tuning-seeds must be at least 1, not 0"),
        (["--jobs", "-1"], "--jobs must be at least 1, not -1"),
        (["--rates", "1e-3", "0"], "--rates must be positive and finite, not 0"),
        (["--rates", "nan"], "--rates must be positive and finite, not nan"),
        (["--rates", "1e-3", "0.001", "3e-3"], "--rates names a rate twice: 0.001 0.001 0.003"),
        (["--at-rate", "inf"], "--at-rate must be positive and finite, not inf"),
        (["--out", "rows.csv"], "--out rows.csv must be a .jsonl file"),
        (["--device", "abacus"], "abacus"),
        (["--only", "lora(9)"], "--only 'lora(9)' is none of full, lora(2)"),
        (["--out", "."], "--out . must be a .jsonl file, such as train_adapters.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiment.Data, "collected", lambda *given: pytest.fail("data were collected"))
    with pytest.raises(SystemExit, match="2"):
        experiment.main(words)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("seeds", "sentence"), [([], "has no runs"), ([100, 101, 100], "with 1 and 2 tuning seeds")])
def test_claims_refuse_no_runs_and_rates_that_cannot_be_compared(
    seeds: list[int], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [trial(rate, seed, 0.5) for rate, seed in zip((1e-3, 1e-3, 3e-3), seeds, strict=False)]
    append_rows(tmp_path / "rows.jsonl", [row | {"name": "lora(2)", "tuning": True, "settings": {}} for row in trials])
    with pytest.raises(SystemExit, match="2"):
        claims.main(["--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("notes.md", "# Notes\n", "notes.md has no runs of experiments.train_adapters"),
        ("rows.jsonl", '{"a": 1}\n', "rows.jsonl has no runs of experiments.train_adapters"),
        ("rows.jsonl", '{"settings": {\n', "rows.jsonl has a line that is no JSON"),
    ],
)
def test_claims_refuse_files_of_other_things(
    name: str, text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        claims.main(["--rows", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err


def test_trained_adapters_have_folders_that_say_what_they_are() -> None:
    assert run_of("lora", 2, 0).folder("code") == "lora-2-seed-0"
    assert run_of("rasa", 8, 4, seed=3).folder("prose") == "rasa-8-4-prose-seed-3"


def test_mrr() -> None:
    answers = torch.eye(4)
    queries = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.5, 0, 0], [0.9, 0.8, 0.1, 0.7], [0, 0, 0, 1]])
    assert training.mrr(queries, answers) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1) / 4)
    for collapsed in (torch.ones(5, 4), torch.full((5, 4), torch.nan)):
        assert training.mrr(collapsed, collapsed) == pytest.approx(1 / 5)


# ---- the statistics


def row(name: str, seed: int, mrrs: list[float], drifts: list[float], **more: Any) -> dict[str, Any]:
    looks = [{"step": 50 * n, "validation_mrr": m, "drift": {"a": d, "b": 3 * d}, "prose_mrr": {"a": 0.5, "b": 0.7}}
             for n, (m, d) in enumerate(zip(mrrs, drifts, strict=True))]  # fmt: skip
    sigma = {"query": {"norms": [2.0, 1.0], "sigma": [[2.0], [0.8, 0.6]]}, "key": {"norms": [1.0], "sigma": [[1.0]]}}
    common = {"name": name, "run": {"seed": seed, "learning_rate": 1e-3}, "tuning": False, "losses": [1.0] * 40,
              "looks": looks, "test_mrr": mrrs[-1] + 0.01 * seed, "updates": sigma, "trained_parameters": 10,
              "settings": {"short_steps": 30}}  # fmt: skip
    return common | more


def test_intervals_are_those_of_scipy() -> None:
    x, y = [0.51, 0.53, 0.48, 0.55, 0.50], [0.50, 0.49, 0.47, 0.56, 0.46]
    mean, half = claims.paired(*({s: {"v": v} for s, v in enumerate(of)} for of in (x, y)), lambda r: r["v"])
    low, high = stats.ttest_rel(x, y).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert claims.paired({0: {"v": 2}, 1: {"v": 5}}, {1: {"v": 1}, 2: {"v": 9}}, lambda r: r["v"])[0] == 4
    assert math.isnan(claims.interval([1.0])[1])


@pytest.mark.parametrize(
    ("mrrs", "mrr", "expected"),
    [
        ([0.2, 0.4, 0.6], 0.5, 2 * 0.2), ([0.2, 0.4, 0.6], 0.6, 2 * 0.3), ([0.2, 0.4, 0.6], 0.1, 0.0),
        ([0.2, 0.6, 0.4], 0.4, 2 * 0.05), ([0.2, 0.2, 0.4], 0.3, 2 * 0.2), ([0.2, 0.4, 0.6], 0.7, math.nan),
    ],
)  # fmt: skip
def test_drift_at_equal_mrr_is_interpolated_where_it_is_first_reached(
    mrrs: list[float], mrr: float, expected: float
) -> None:
    assert claims.drift_at(row("x", 0, mrrs, [0.0, 0.1, 0.3]), mrr) == pytest.approx(expected, nan_ok=True)


def test_entropy_ranks_are_of_all_layers_kinds_and_seeds() -> None:
    p = [0.36, 0.64]  # of the energy of one layer; the others have one term
    two = math.exp(-sum(x * math.log(x) for x in p))
    rows = [row("lora(2)", seed, [0.2], [0.0]) for seed in range(2)]
    for each in rows:
        each["updates"]["query"]["sigma"][1] = [0.8, 0.6]
    assert claims.entropy_ranks(rows) == pytest.approx([1, two, 1] * 2)


def test_lora_of_equal_parameters_is_what_rasa_is_compared_with() -> None:
    runs = {name: {} for name in ("full", "lora(2)", "lora(8)", "lora(7)", "rasa(2,1)", "rasa(8,4)")}
    assert claims.reference("rasa(8,4)", runs) == "lora(8)"
    assert claims.reference("rasa(2,1) from gradient", runs) == "lora(2)"
    assert claims.reference("rasa(2,1) from gradient", runs | {"lora(2) from gradient": {}}) == "lora(2) from gradient"
    assert claims.reference("lora(7)", runs) is None


def test_tables_and_figures_of_all_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"query": {"e_lora": 0.4, "e_rasa": 0.2}, "key": {"e_lora": 0.5, "e_rasa": 0.5}}
    names = ["full", "lora(2)", "rasa(2,1)", "lora(7)", "lora(8)", "rasa(8,1)", "rasa(8,4)", "lora(13)", "lora(28)",
             "lora(2) from gradient", "rasa(2,1) from updates"]  # fmt: skip
    rows = [row(name, seed, [0.2, 0.4, 0.6 + 0.02 * n], [0.0, 0.1, 0.3], reconstruction={"2,1": errors})
            for n, name in enumerate(names) for seed in range(3)]  # fmt: skip
    tuned = rows[0] | {"tuning": True, "run": rows[0]["run"] | {"seed": 100}}
    file = tmp_path / "train_adapters.jsonl"
    file.write_text("\n".join(map(json.dumps, [tuned, *rows])))
    claims.main(["--rows", str(file), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"^rasa\(2,1\) +10 +0.001 +0.\d{4} +\+0\.0200", printed, re.MULTILINE), printed
    for name in (
        "train_adapters.csv",
        "train_adapters.png",
        "adapter_updates.png",
        "adapter_gains.png",
        "adapter_starts.png",
    ):
        assert (tmp_path / name).stat().st_size > 0
    runs = claims.read(file)
    line = claims.table(runs)[2]
    assert runs["full"].keys() == {0, 1, 2}
    assert (line["method"], line["seeds"]) == ("rasa(2,1)", 3)
    assert line["test_mrr_minus_lora"] == pytest.approx(0.02)
    assert line["drift_at_equal_mrr"] == pytest.approx(2 * (0.1 + 0.2 * 0.2 / 0.24))
    (gains,) = claims.predicted(runs).values()
    assert gains == [(pytest.approx(1 - (0.2 * 5 + 0.5) / (0.4 * 5 + 0.5)), pytest.approx(0.02))] * 3
    file.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"settings": {"short_steps": 1}}])))
    with pytest.raises(InputError, match="runs of different settings"):
        claims.read(file)


def test_runs_at_another_rate_than_the_tuned_one_are_told_apart(tmp_path: Path) -> None:
    def runs_at(name: str, rate: float, mrr: float, tuning: bool = False) -> list[dict[str, Any]]:
        made = [row(name, seed, [0.2, mrr], [0.0, 0.1]) for seed in range(2)]
        return [r | {"tuning": tuning, "run": r["run"] | {"learning_rate": rate}} for r in made]

    rows = runs_at("rasa(2,1)", 3e-3, 0.5, True) + runs_at("rasa(2,1)", 1e-3, 0.4, True)
    rows += runs_at("lora(2)", 3e-3, 0.3, True) + runs_at("lora(2)", 1e-3, 0.4, True)
    for name, rate, mrr in (("lora(2)", 1e-3, 0.5), ("lora(2)", 3e-3, 0.55), ("rasa(2,1)", 3e-3, 0.6),
                            ("rasa(2,1)", 1e-3, 0.7)):  # fmt: skip
        rows += runs_at(name, rate, mrr)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = claims.read(tmp_path / "rows.jsonl")
    assert list(runs) == ["lora(2)", "lora(2) at 0.003", "rasa(2,1)", "rasa(2,1) at 0.001"]
    assert (claims.reference("rasa(2,1)", runs), claims.at_equal_rate("rasa(2,1)", runs)) == (
        "lora(2)",
        "lora(2) at 0.003",
    )
    assert claims.at_equal_rate("rasa(2,1) at 0.001", runs) == "lora(2)"
    assert claims.at_equal_rate("lora(2)", runs) is None
    labels = [pair.label for pair in claims.differences(runs)]
    assert labels == ["(2, 1), 3e-3", "(2, 1), 3e-3 / 1e-3", "(2, 1), 1e-3"]
    assert claims.common_mrr(runs, 0) == 0.5
    begun = {s: row("", s, [0.2, 0.1], [0.0, 0.1]) for s in range(2)}  # from data, at 1e-3
    assert claims.common_mrr(runs | {"lora(2) from gradient": begun}, 0) == 0.5
    others = {"rasa(2,1)": runs["rasa(2,1) at 0.001"], "lora(2) from gradient": begun}
    assert claims.at_equal_rate("rasa(2,1)", others) is None


def test_measures_are_those_of_the_whole_run_of_its_end_and_of_both_kinds_of_prose(tmp_path: Path) -> None:
    def run(name: str, seed: int, rate: float, shift: float) -> dict[str, Any]:
        losses = [9.0, *[2.0 + shift] * 19, *[1.0 + shift] * 20]
        made = row(name, seed, [0.2, 0.4 + shift], [0.0, 0.1 + shift], losses=losses)
        made["looks"][-1]["prose_mrr"] = {"a": 0.5 + shift, "b": 0.7 + shift}
        return made | {"run": {"seed": seed, "learning_rate": rate}}

    rows = [run("lora(2)", s, 1e-3, 0.0) | {"tuning": s == 100} for s in (100, 0, 1)]
    rows += [run("rasa(2,1)", s, 3e-3, 0.1 + 0.02 * s) | {"tuning": s == 100} for s in (100, 0, 1)]
    rows += [run("lora(2)", s, 3e-3, 0.3) for s in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = {line["method"]: line for line in claims.table(claims.read(tmp_path / "rows.jsonl"))}
    lora, rasa = lines["lora(2)"], lines["rasa(2,1)"]
    expected = {"final_loss": 1.0, "mean_loss": (9 + 2 * 19 + 20) / 40, "drift": 0.2, "prose_mrr": 0.6}
    assert {key: lora[key] for key in expected} == pytest.approx(expected)
    moved = {"final_loss": 0.11, "mean_loss": 0.11 * 39 / 40, "drift": 0.22, "prose_mrr": 0.11, "test_mrr": 0.11}
    assert {key: rasa[f"{key}_minus_lora"] for key in moved} == pytest.approx(moved)
    equal = {"final_loss": -0.19, "mean_loss": -0.19 * 39 / 40, "drift": -0.38, "prose_mrr": -0.19, "test_mrr": -0.19}
    assert {key: rasa[f"{key}_minus_lora_at_equal_rate"] for key in equal} == pytest.approx(equal)
    half = stats.t.ppf(0.975, 1) * 0.01  # of two differences 0.02 apart
    assert rasa["final_loss_minus_lora_interval"] == pytest.approx(half)
