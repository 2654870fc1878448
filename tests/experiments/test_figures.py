"""Every figure is drawn from the data beside it, says what its axes are, and looks as the others do: no pixels."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import shlex
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

import rasa_theory as rt
from experiments import adapter_claims, figures, floors, iteration_count, neighbours, registry
from experiments.best_found.compare import excess
from experiments.models.update_sets import FIRST_MODEL, MODEL_NAMES, OVERLAPS
from experiments.pages import words
from experiments.support.rows import of_models, read_rows, write_rows
from rasa_theory.plotting import style
from tests.experiments.test_train_adapters import row as adapter_row

FIGURES = figures.ROOT / "figures"


# -------------------------------------------------------------------------------------- the registry of pictures


def test_every_picture_has_an_entry_and_its_data() -> None:
    assert {path.stem for path in FIGURES.glob("*.png")} <= figures.PICTURES.keys()
    for name, picture in figures.PICTURES.items():
        if (FIGURES / f"{name}.png").exists():
            assert (FIGURES / picture.data).exists(), f"{name}.png is there without {picture.data}"


def test_commands_are_modules_and_make_the_data_of_the_pictures() -> None:
    for experiment in figures.EXPERIMENTS.values():
        for command in experiment.commands:
            flag, module, *_ = shlex.split(command)
            assert flag == "-m"
            assert importlib.util.find_spec(module) is not None, command
        made = {file if isinstance(file, str) else file[1] for file in experiment.data}
        for picture in experiment.pictures.values():
            assert picture.data in made
            assert 0 <= picture.command < len(experiment.commands)


def flag(command: list[str], name: str, default: list[str]) -> list[str]:
    """The words after a flag, up to the next one."""
    if name not in command:
        return default
    return list(itertools.takewhile(lambda word: not word.startswith("--"), command[command.index(name) + 1 :]))


STACKS_OF = {"minilm": list(words.KINDS), "mpnet": list(words.KINDS), "synthetic": list(OVERLAPS)}
"""The stacks of a model that a command takes without --kinds. Of mpnet it needs the runs for that."""


def test_the_commands_of_an_experiment_make_the_rows_of_every_model_and_kind_in_its_data() -> None:
    """Else the data that `--from-scratch` makes would lack those that are published."""
    seen = set()
    for experiment in figures.EXPERIMENTS.values():
        from_commands = set()
        for command in map(shlex.split, experiment.commands):
            (model,) = flag(command, "--model", ["minilm"])
            from_commands |= {(MODEL_NAMES[model], kind) for kind in flag(command, "--kinds", STACKS_OF[model])}
        for file in experiment.data:
            rows = read_rows(FIGURES / file) if isinstance(file, str) and file.endswith(".csv") else []
            stacks = {(row["model"], row["stack"]) for row in rows if row.get("model") and row.get("stack")}
            published = {(model, stack) for model, stack in stacks if stack in {*words.KINDS, *OVERLAPS}}
            assert published <= from_commands, file
            seen |= published
    assert {model for model, _ in seen} == set(MODEL_NAMES.values())


@pytest.mark.parametrize("file", ["train_adapters.jsonl", "train_adapters_cpu.jsonl"])
def test_runs_at_another_rate_than_the_chosen_one_have_a_command(file: str) -> None:
    from_commands = set()
    for command in map(shlex.split, figures.EXPERIMENTS["train_adapters"].commands):
        if f"{{out}}/{file}" in command:
            names, rates = flag(command, "--only", []), flag(command, "--at-rate", [])
            from_commands |= {f"{name} at {float(rate):g}" for name, rate in itertools.product(names, rates)}
    assert {name for name in adapter_claims.read(FIGURES / file) if " at " in name} <= from_commands


def test_from_scratch_leaves_out_no_experiment_unless_pictures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(figures, "perform", lambda name, *given: done.append(name) or True)
    figures.main(["--from-scratch", "--figures", str(tmp_path)])
    assert done == [name for name, experiment in figures.EXPERIMENTS.items() if experiment.can_run()]
    done.clear()
    figures.main(["recovery", "--from-scratch", "--figures", str(tmp_path)])
    assert done == ["recovery"]


def test_every_file_is_of_an_experiment_or_described_beside_the_data() -> None:
    made = {file if isinstance(file, str) else file[1] for one in figures.EXPERIMENTS.values() for file in one.data}
    known = made | {f"{name}.png" for name in figures.PICTURES} | {"README.md"}
    text = (FIGURES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in FIGURES.iterdir() if path.name not in known and path.name not in text] == []


def test_a_command_is_written_as_one_types_it() -> None:
    written = {
        name: experiment.written_command(picture)
        for experiment in figures.EXPERIMENTS.values()
        for name, picture in experiment.pictures.items()
    }
    assert written["iterations"] == "python -m rasa_theory.reconstruct --rank 8 --k 1"
    assert written["adapter_updates"].endswith("train_adapters --float32 --rank 8 --rates 3e-4 1e-3 3e-3")
    assert not any("--out" in command or "{" in command for command in written.values())


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_the_attempts_in_the_folder_are_those_that_the_command_makes(model: str) -> None:
    """All attempts on the bundled updates; of other models some may be missing."""
    rows = read_rows(FIGURES / "iteration_count.csv")
    name = None if model == "synthetic" else MODEL_NAMES[model]
    made = [iteration_count.case_of(row) for row in rows if row["model"] == name]
    assert len(made) == len(set(made))
    every = set(iteration_count.cases(iteration_count.SEEDS, model))
    assert set(made) == every if model == "minilm" else set(made) <= every


# ------------------------------------------------------------------------------------------- all of the figures


def adapter_runs() -> dict[str, dict[int, Any]]:
    """Runs as `adapter_claims.read` gives them."""
    errors = {"query": {"e_lora": 0.4, "e_rasa": 0.2}, "key": {"e_lora": 0.5, "e_rasa": 0.5}}
    names = ["full", "lora(2)", "rasa(2,1)", "lora(7)", "lora(2) from gradient", "rasa(2,1) from updates"]
    return {
        name: {
            seed: adapter_row(name, seed, [0.2, 0.4, 0.6 + 0.02 * n], [0.0, 0.1, 0.3], reconstruction={"2,1": errors})
            for seed in range(3)
        }
        for n, name in enumerate(names)
    }


def made_up(name: str, folder: Path) -> Path:
    """Data of the kind that a figure is drawn from, where those of a run are not there yet."""
    data = folder / figures.PICTURES[name].data
    if name == "iteration_count":
        counts = itertools.cycle((3, 12, None, 40, 9))
        made = [
            {key: getattr(case, key) for key in iteration_count.Case.__dataclass_fields__}
            | {"iterations": count, "e_alloc": 0.99}
            for model in ("minilm", "synthetic")
            for case, count in zip(iteration_count.cases(3, model), counts, strict=False)
        ]
        write_rows(data, iteration_count.COLUMNS, made)
    elif name == "passes":
        made = [
            {"k": k, "method": method, "passes": 2 * 3**n * (n > 0), "seconds": 0.01 * 4**n, "error": 1 - 0.001 * n / k}
            for k in (1, 8)
            for method in ("joint sweeps", "core sweeps", *(["pyttb cp_als"] if k == 8 else []))
            for n in range(7)
        ]
        write_rows(data, ("k", "method", "passes", "seconds", "error"), made)
    else:
        rows = [run for of in adapter_runs().values() for run in of.values()]
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return data


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each figure, drawn once: its name -> data file and figure."""
    folder = tmp_path_factory.mktemp("figures")

    @cache
    def draw(name: str) -> tuple[Path, Figure]:
        picture = figures.PICTURES[name]
        path = FIGURES / picture.data if (FIGURES / picture.data).exists() else made_up(name, folder)
        figure = picture.draw(path)
        if figure is None:  # the file is there, but none of its runs is of this kind yet
            path = made_up(name, folder)
            figure = picture.draw(path)
        assert figure is not None
        figure.draw_without_rendering()
        return path, figure

    return draw


def axes_of(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.get_axes() if ax.axison]


EVERY = pytest.mark.parametrize("name", figures.PICTURES)


def has_names(axis: Axis) -> bool:
    """Whether names stand at the ticks of an axis."""
    return any(character.isalpha() for tick in axis.get_ticklabels() for character in tick.get_text())


@EVERY
def test_a_title_asks_or_says_something(name: str, drawn: Any) -> None:
    figure = drawn(name)[1]
    title = figure.get_suptitle()
    assert len(title.split()) >= 4
    assert title[0].isupper()


@EVERY
def test_axes_hold_data_and_say_what(name: str, drawn: Any) -> None:
    """Where panels of a line share an axis, the first of them says it; where those of a column do, the last."""
    figure = drawn(name)[1]
    axes = axes_of(figure)
    assert axes
    for ax in axes:
        assert (
            ax.collections
            or ax.containers
            or ax.images
            or any(len(line.get_xdata()) > 2 or line.get_marker() != "None" for line in ax.get_lines())
        )
        box = ax.get_position()
        line = [other for other in axes if abs(other.get_position().y0 - box.y0) < 0.01]
        column = [other for other in axes if abs(other.get_position().x0 - box.x0) < 0.01]
        assert figure.get_supylabel() or any(other.get_ylabel() or has_names(other.yaxis) for other in line)
        assert any(other.get_xlabel() or has_names(other.xaxis) for other in column)
        assert not ax.spines["top"].get_visible()
        assert not ax.spines["right"].get_visible()


@EVERY
def test_colours_are_of_the_palette(name: str, drawn: Any) -> None:
    used: set[str] = set()
    for ax in axes_of(drawn(name)[1]):
        for line in ax.get_lines():
            used |= {line.get_color(), line.get_markerfacecolor(), line.get_markeredgecolor()}
        for collection in ax.collections:
            used |= set(map(tuple, (*collection.get_facecolor(), *collection.get_edgecolor())))
        used |= {color for patch in ax.patches for color in (patch.get_facecolor(), patch.get_edgecolor())}
        used |= {text.get_color() for text in ax.texts}
    solid = {to_hex(color).upper() for color in used if to_rgba(color)[3] > 0}
    assert solid <= {color.upper() for color in style.PALETTE}


@EVERY
def test_text_can_be_read(name: str, drawn: Any) -> None:
    """One column wide, text of eight points or more, all of it within the figure, and no two labels over each other."""
    figure = drawn(name)[1]
    assert figure.get_figwidth() <= style.WIDTH
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    unseen = set().union(*map(ticks_out_of_view, figure.get_axes()))
    texts = [text for text in texts if text not in unseen]
    assert min(text.get_fontsize() for text in texts) >= style.SMALL
    page, boxes = figure.bbox, [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    for said, box in boxes:
        assert box.x0 >= page.x0 - 1, said
        assert box.x1 <= page.x1 + 1, said
        assert box.y0 >= page.y0 - 1, said
        assert box.y1 <= page.y1 + 1, said
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        over = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(over) < 3, f"{one!r} lies on {other!r}"


def ticks_out_of_view(ax: Axes) -> set[Text]:
    """Labels that axes have made, and do not show."""
    found: set[Text] = set()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - slack <= tick.get_loc() <= high + slack:
                found |= {tick.label1, tick.label2}
    return found


# --------------------------------------------------------------------------- what is drawn is what the data say


SIDEWAYS = ("gpu_scale", "neighbours", "pool_owners", "pool_scope", "train_adapters")
"""Figures whose numbers run along the width."""


def drawn_numbers(figure: Figure, sideways: bool) -> list[float]:
    """Every height at which something is drawn, and all cells; if `sideways`, every place along the width."""
    lines = [line.get_data()[0 if sideways else 1] for ax in axes_of(figure) for line in ax.get_lines()]
    corners = [patch.get_corners()[2] for ax in axes_of(figure) for patch in ax.patches if isinstance(patch, Rectangle)]
    bars = [corner[0 if sideways else 1] for corner in corners]
    cells = [image.get_array().flatten().tolist() for ax in axes_of(figure) for image in ax.images]
    return sorted(float(y) for line in (*lines, bars, *cells) for y in line if y is not None and math.isfinite(y))


def expected_heights(name: str, path: Path) -> list[float]:
    """Numbers that stand in the data, each of which is to be in the figure."""
    if name == "iterations":
        stacks = json.loads(path.read_text())["stacks"]
        runs = [(stack["e_lora"], run) for stack in stacks for run in stack["runs"]]
        whole = [e / unit for unit, run in runs for attempt in run["attempts"] for e in attempt["history"][1:]]
        return [*whole, *(run[key] / unit for unit, run in runs for key in ("e_rasa", "e_allocation", "lower_bound"))]
    if name == "gpu_scale":
        full = [record for record in json.loads(path.read_text())["records"] if not record["tf32"]]
        parts = [[record[f"{part}_seconds"] for part in ("lora_fast", "start", "solve")] for record in full]
        return [*(seconds[0] for seconds in parts), *map(sum, parts)]
    if name == "train_adapters":
        tables = [
            adapter_claims.table(adapter_claims.read(file)) for file in (path, path.with_stem(f"{path.stem}_cpu"))
        ]
        lines = [line for table in tables for line in table if " from " not in line["method"]]
        keys = ["test_mrr_minus_lora_at_equal_rate", "drift_minus_lora_at_equal_rate"]
        keys += ["test_mrr_minus_lora", "drift_minus_lora"]
        tuned = [line for line in lines if " at " not in line["method"]]
        return [line[key] for key in keys for line in (tuned if key.endswith("_lora") else lines) if key in line]
    if path.suffix == ".jsonl":
        runs = adapter_claims.read(path)
        if name == "adapter_updates":
            return []
        if name == "adapter_gains":
            return [better for points in adapter_claims.predicted(runs).values() for _, better in points]
        shown = [run for run in runs if run.startswith(("lora(2)", "rasa(2,")) and " at " not in run]
        return [statistics.fmean(map(adapter_claims.validation, runs[run].values())) for run in shown]
    if name == "layers_left":
        return []  # its numbers are texts: see `test_the_heat_map_says_every_number`
    if name == "ranks_and_pools":
        gains: dict[tuple[Any, ...], list[float]] = {}
        for row in read_rows(path):
            if row["stack"] in ("query", "attention_output"):
                point = row["model"], row["r"], row["k"]
                gains.setdefault((*point, "exact"), []).append(1 - row["best_found"])
                gains.setdefault((*point, "rounded"), []).append(row["lora_bfloat16"] - row["bfloat16"])
        assert {len(pair) for pair in gains.values()} == {2}
        return [100 * statistics.fmean(pair) for pair in gains.values()]
    rows = of_models(read_rows(path), FIRST_MODEL)
    if name == "updates":
        return [
            row[key] for row in rows for key in ("relative_norm", "stable_rank", "entropy_rank", "energy_in_rank_8")
        ]
    if name == "pool_start":
        return [row["iterations"] for row in rows if row["iterations"] is not None]
    if name == "recovery":
        groups: dict[tuple[Any, ...], list[Any]] = {}
        for row in rows:
            groups.setdefault((row["layers"], row["noise"], row["start"]), []).append(row)
        return [100 * statistics.fmean(row["recovered"] for row in group) for group in groups.values()]
    if name == "at_size":
        four = [row for row in rows if row["layers"] == 4]
        return [row["seconds"] for row in four] + [row["lora_seconds"] for row in four if row["n"] == 2048]
    if name == "best_found":
        return [100 * excess(row, column) for row in rows for column in ("error", "best_of_24")]
    if name == "passes":
        return [row["error"] for row in rows if row["k"] in (1, 8)]
    if name == "growth":
        return [row["seconds_min"] for row in rows if row["part"] == "growth"]
    if name == "sweep_cost":
        sweeps = {(r["b"], r["rank"], r["dtype"], r["method"]): r["seconds_min"] for r in rows if r["part"] == "sweep"}
        return [
            seconds / sweeps[*setting, "its two products"]
            for (*setting, method), seconds in sweeps.items()
            if method != "its two products"
        ]
    if name == "neighbours":
        lora = {row["stack"]: row["error"] for row in rows if row["method"] == "lora" and row["r"] == neighbours.SHOWN}
        ratios = [row["error"] / lora[row["stack"]] for row in rows if row["r"] == neighbours.SHOWN]
        return [ratio for ratio in ratios if ratio <= neighbours.FARTHEST]
    if name == "compression":  # means over the kinds of the first set
        own = [
            row for row in rows if row["set"] == rows[0]["set"] and row["layer"] == "all" and row["share"] is not None
        ]
        lines = {("allocated", "trained"), ("share_columns", "trained"), ("joint_diagonal", "trained")}
        lines.add(("joint_diagonal", "random"))
        groups = {}
        for row in own:
            if (row["method"], row["source"]) in lines:
                groups.setdefault((row["method"], row["source"], row["share"]), []).append(row["error"])
        return list(map(statistics.fmean, groups.values()))
    if name == "sharing_gain":
        real = [row for row in rows if row["source"] in ("updates", "turned apart") and row["part"] == "pool"]
        gains = [row for row in real if row["item"] == "best_found"]
        gains += [row for row in real if row["item"] == "allocation" and row["source"] == "updates"]
        return [100 * (1 - row["value"]) for row in gains]
    if name == "pool_owners":
        return [row["value"] for row in rows if row["part"] == "pool" and row["k"] == 1 and row["item"] == "by_loss"]
    if name == "pool_scope":
        kinds = [row for row in rows if row["part"] == "kinds" and row["stack"] == "all kinds"]
        shown = [row for row in kinds if row["source"] != "as they are"]
        wide = [row for row in [*shown, *(row for row in rows if row["part"] == "tasks")] if row["k"] == 1]
        return [100 * (1 - row["value"]) for row in wide if row["item"] in ("allocation", "best_found")]
    if name == "iteration_count":
        eight = [row for row in rows if row["part"] == "real" and row["rank"] == 8]
        return [row["iterations"] for row in eight if row["iterations"] is not None]
    if name == "scaling":
        return [row[key] for row in rows for key in ("seconds", "predicted") if row[key] is not None]
    raise AssertionError(f"say what of the data is to be in {name}")


@pytest.mark.parametrize("name", [name for name in figures.PICTURES if name != "floors"])
def test_the_data_are_what_is_drawn(name: str, drawn: Any) -> None:
    path, figure = drawn(name)
    found = np.array(drawn_numbers(figure, name in SIDEWAYS))
    missing = [y for y in expected_heights(name, path) if np.min(np.abs(found - y)) > 1e-9 * max(abs(y), 1e-12)]
    assert missing == [], f"{len(missing)} numbers of {path.name} are not in the figure"


def test_floors_lie_across(drawn: Any) -> None:
    path, figure = drawn("floors")
    found = {float(x) for ax in axes_of(figure) for line in ax.get_lines() for x in line.get_xdata()}
    for row in of_models(read_rows(path), FIRST_MODEL):
        assert {row[key] for key in ("closed", "dual", "two_sided", "best_found")} <= found


def test_the_heat_map_says_every_number(drawn: Any) -> None:
    """A text in the cell of each layer and kind, in the panels of its model."""
    path, figure = drawn("layers_left")
    rows, axes = read_rows(path), axes_of(figure)
    models = list(dict.fromkeys(row["model"] for row in rows))
    assert len(axes) == 3 * len(models)
    for row in rows:
        own = axes[3 * models.index(row["model"]) :][:3]
        taken = 100 * (1 - row["rasa_leaves"] / row["lora_leaves"])
        expected = (f"{row['entropy_rank']:.0f}", f"{100 * row['lora_leaves']:.0f}", f"{taken:.0f}")
        kinds = list(dict.fromkeys(other["stack"] for other in rows if other["model"] == row["model"]))
        for ax, said in zip(own, expected, strict=True):
            cell = (row["layer"], kinds.index(row["stack"]))
            assert said in [text.get_text() for text in ax.texts if text.xy == cell]


def test_median_and_range_are_those_of_the_seeds(drawn: Any) -> None:
    path, figure = drawn("pool_start")
    middle = axes_of(figure)[1].get_lines()[0].get_ydata()
    bars = axes_of(figure)[1].collections[0].get_segments()
    group = sorted(r["error_after_joint_sweeps"] for r in read_rows(path) if (r["stack"], r["size"]) == ("query", 0.3))
    assert middle[4] == group[2]
    assert bars[4][:, 1] == pytest.approx([group[0], group[-1]])


# ------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_draws_what_has_data_and_says_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "benchmark.csv").write_bytes((FIGURES / "benchmark.csv").read_bytes())
    assert figures.main(["growth", "--figures", str(folder), "--formats", "png", "svg"]) == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {"benchmark.csv", "growth.png", "growth.svg"}
    assert figures.main(["growth", "--figures", str(folder), "--formats", "svg"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert figures.main(["growth", "recovery", "--figures", str(folder)]) == 1
    assert "recovery: no data for it" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        figures.main(["no_such_picture"])
    assert "'no_such_picture' is none of iterations, updates" in capsys.readouterr().err


def test_from_scratch_runs_the_commands_and_keeps_the_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data of a command that failed stay as they were; what lacks something here is not run."""
    calls: list[list[str]] = []

    def call(words: list[str], **more: Any) -> int:
        calls.append(words[1:])
        write_rows(Path(words[-1]) / "recovery.csv", ["x"], [{"x": len(calls)}])
        return 0 if len(calls) == 1 else 3

    folder, options = tmp_path / "figures", ["--scratch", str(tmp_path / "scratch"), "--from-scratch", "recovery"]
    folder.mkdir()
    monkeypatch.setattr(figures.subprocess, "call", call)
    monkeypatch.setitem(figures.PICTURES, "recovery", registry.Picture("recovery.csv", lambda data: Figure(), ""))
    assert figures.main([*options, "--figures", str(folder)]) == 0
    assert calls == [["-m", "experiments.recovery", "--out", str(tmp_path / "scratch" / "recovery")]]
    assert (folder / "recovery.png").exists()
    assert "last time: no record" in capsys.readouterr().out
    assert json.loads((folder / "seconds.json").read_text())["recovery"]["seconds"] == 0
    assert not (tmp_path / "scratch" / "recovery").exists()
    assert figures.main([*options, "--figures", str(folder)]) == 1
    assert "last time: 0 s in all" in capsys.readouterr().out
    assert read_rows(folder / "recovery.csv") == [{"x": 1}]
    needy = registry.Experiment((), (), {"recovery": figures.PICTURES["recovery"]}, "a moon", lambda: False)
    monkeypatch.setitem(figures.EXPERIMENTS, "recovery", needy)
    assert figures.main([*options, "--figures", str(folder)]) == 0
    assert "recovery: not run, it needs a moon" in capsys.readouterr().out
    assert len(calls) == 2


def test_names_in_quotes_reach_a_command_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(figures.subprocess, "call", lambda words, **more: calls.append(words[1:]) or 1)
    command = "-m experiments.train_adapters --only 'rasa(2,1)' 'lora(2)' --out {out}"
    monkeypatch.setitem(figures.EXPERIMENTS, "recovery", registry.Experiment((command,), (), {}))
    scratch = tmp_path / "with space"
    assert not figures.perform("recovery", tmp_path, scratch)
    assert calls == [
        ["-m", "experiments.train_adapters", "--only", "rasa(2,1)", "lora(2)", "--out", str(scratch / "recovery")]
    ]


# ----------------------------------------------------------------------------------------------------- the style


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.52, 0.9], [0.46, 0.56, 0.9]),
        ([0.0, 0.0], [0.0, 0.1]),
        ([1.0, 1.0, 1.0], [0.8, 0.9, 1.0]),
        ([0.2, 0.29, 0.29], [0.16, 0.26, 0.36]),
        ([], []),
    ],
)
def test_labels_move_as_little_as_they_must(wanted: list[float], found: list[float]) -> None:
    assert style.apart(wanted, 0.1) == pytest.approx(found)


def test_lines_to_labels_do_not_cross() -> None:
    figure = style.new_figure(3)
    ax = style.panels(figure)[0, 0]
    ends = [(1.0, y, str(y), style.BLUE) for y in (0.5, 0.1, 0.52, 0.53, 0.9)]
    ax.plot([0, 1], [0, 1])
    style.label_ends(ax, ends)
    texts = sorted(ax.texts, key=lambda text: text.xy[1])
    tops = [text.xyann[1] for text in texts]
    assert tops == sorted(tops)
    assert min(np.diff(tops)) > 0.09 - 1e-9


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_files_are_the_same_each_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(epoch: str) -> bytes:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)  # what a date in the file would follow
        figure = style.new_figure(2)
        style.panels(figure)[0, 0].plot([0, 1], [0, 1])
        target = io.BytesIO()
        style.save(figure, target, kind)
        return target.getvalue()

    assert file("0") == file("1000000000")
    assert b"atplotlib" not in file("0") or kind == "svg"


def test_a_figure_of_results_without_attempts_says_so() -> None:
    figure = rt.plot_iterations({"stacks": []})
    assert [text.get_text() for text in figure.axes[0].texts] == ["no random attempts in these results"]


@pytest.mark.slow
def test_floors_stay_what_they_are_beside_a_solver_that_has_changed() -> None:
    sizes = np.array([1, 2, 4])[:, None, None]
    stack = rt.LayerStack(sizes * np.random.default_rng(0).standard_normal((3, 12, 10)), "q")
    e_lora = rt.solve_lora(stack, 2).error
    allocation = rt.allocation_bound(stack, rt.RankBudget(2, 1)).value / e_lora
    row = {"stack": "q", "r": 2, "k": 1, "best_found": 2.0, "allocation": allocation, "two_sided": 0.25, "gap": 1.75}
    (changed,) = floors.solved_anew({"q": stack}, [row], rt.SolverOptions())
    assert changed["best_found"] == pytest.approx(rt.solve_rasa(stack, rt.RankBudget(2, 1)).error / e_lora)
    assert (changed["two_sided"], changed["gap"]) == (0.25, changed["best_found"] - 0.25)
    with pytest.raises(ValueError, match="of another rank than 3, or other updates"):
        list(floors.solved_anew({"q": stack}, [row | {"r": 3}], rt.SolverOptions()))
