"""The report of an extraction: its numbers are the errors of the adapter, its table, figure and files agree."""

import pytest
import torch
from safetensors.torch import save_file

from rasa_theory.commands.extract import main
from rasa_theory.extraction import ErrorTable, extraction_table, model_card
from rasa_theory.extraction import run as extraction_run
from tests.helpers.models import base_model, options, report_of, run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--k", "1"), "e_lora"),
        (("--format", "lora-exact-rasa", "--k", "2"), "e_rasa"),
        (("--format", "lora-exact-rasa", "--k", "3", "--dtype", "bfloat16"), "e_rasa"),
    ],
)
def test_the_report_says_how_far_the_merged_weights_are(llamas, tmp_path, more, error):
    folder, tuned = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "*mlp.down*")
    assert run(folder, tmp_path, "--rank", "3", "--sweeps", "8", *few, *more) == 0
    model = peft.PeftModel.from_pretrained(base_model(transformers.LlamaForCausalLM, folder).double(), tmp_path)
    merged, after = model.merge_and_unload().state_dict(), tuned.state_dict()
    for row in report_of(tmp_path)["stacks"]:
        for module in row["modules"]:
            name = f"{module['module']}.weight"
            missed = float(((merged[name] - after[name].double()) ** 2).sum())
            assert missed == pytest.approx(module["e_stored"], rel=1e-3)
            assert missed == pytest.approx(module[error], rel=1e-5 if "bfloat16" not in more else 2e-2)


def test_the_report_is_a_table_a_figure_and_files_that_agree(llamas, tmp_path, capsys):
    folder, _ = llamas
    assert run(folder, tmp_path, "--rank", "3", "--sweeps", "4", "--modules", "*self_attn*") == 0
    table = capsys.readouterr().out.partition("\nFiles:")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80
    report = report_of(tmp_path)
    assert [row["kind"] for row in report["stacks"]] == [f"self_attn.{x}_proj" for x in "koqv"]
    for row in report["stacks"]:
        assert row["e_rasa"] <= row["e_lora"] <= row["norm_squared"]
        assert row["lower_bound"] <= row["e_rasa"]
        for key in ("norm_squared", "e_lora", "e_rasa", "e_stored"):
            assert sum(m[key] for m in row["modules"]) == pytest.approx(row[key], rel=1e-12)
    lines = (tmp_path / "report.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: ")
    assert [line for line in table if line not in card] == []
    assert (tmp_path / "report.png").stat().st_size > 5000
    assert not (tmp_path / ".extract").exists()


def test_the_report_says_how_it_was_searched(llamas, tmp_path):
    folder, _ = llamas
    few = ("--rank", "3", "--k", "1", "--sweeps", "2", "--modules", "*self_attn.v*")
    assert run(folder, tmp_path / "quick", *few, "--effort", "quick", "--max-cancellation", "inf") == 0
    report = report_of(tmp_path / "quick")
    solver = report["plan"]["settings"]["solver"]
    assert (solver["effort"], solver["max_cancellation"]) == ("quick", "inf")
    assert 1 <= report["stacks"][0]["search"]["near_best"] <= report["stacks"][0]["search"]["starts"]
    assert report["stacks"][0]["search"]["moves"] == 0
    assert run(folder, tmp_path / "none", *few, "--k", "0") == 0
    assert report_of(tmp_path / "none")["stacks"][0]["search"] is None


def test_what_has_no_share_for_its_change_is_not_known_is_said(tmp_path, capsys):
    """Rows that only one vocabulary has, a head that only one model has, and entries that are not finite."""
    base = {f"h.{i}.q.weight": torch.ones(8, 6) for i in range(2)} | {"ln.weight": torch.ones(6)}
    base |= {"embed_tokens.weight": torch.ones(9, 6), "wpe.weight": torch.ones(9, 6)}
    tuned = {key: x + 0.1 for key, x in base.items()} | {"lm_head.weight": torch.ones(9, 6)}
    tuned |= {"embed_tokens.weight": torch.ones(10, 6), "wpe.weight": torch.full((9, 6), float("nan"))}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert run(tmp_path, tmp_path / "out", "--rank", "2") == 0
    table = " ".join(capsys.readouterr().out.split())
    assert "in no share, since the change is not known: embed_tokens, lm_head, wpe." in table
    assert "Left out, by share of the squared norm: ln " in table


def test_the_share_of_what_is_left_out_is_said(tmp_path, monkeypatch, capsys):
    """Of an embedding that lies on disk, of what is no weight of a module; not of what is 0 or cannot be read."""
    generator = torch.Generator().manual_seed(0)
    updates = {f"h.{i}.q.weight": torch.randn(8, 6, generator=generator) for i in range(2)}
    updates |= {"wte.weight": torch.randn(300, 6, generator=generator), "gate": torch.ones(2, 2)}
    updates |= {"wpe.weight": torch.zeros(9, 6), "embed.weight": torch.full((9, 6), float("nan"))}
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "0", "--quiet"]
    arguments += ["--memory", str(128 * 8 * 6), "--out", str(tmp_path / "out")]
    real, asked = extraction_run.plain_norms, []

    def stops(job, source):
        asked.append(source.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(job, source)

    monkeypatch.setattr(extraction_run, "plain_norms", stops)
    assert main(arguments) == 130
    assert "1 of 1 stacks finished" in capsys.readouterr().err
    assert main(arguments) == 0
    assert sorted(asked) == sorted([*(key for key in updates if key[:2] != "h."), asked[2]])
    left_out = {one["name"]: one for one in report_of(tmp_path / "out")["left_out"]}
    assert [key for key in left_out if "norm_squared" not in left_out[key]] == ["embed.weight"]
    energy = {key: float((M.double() ** 2).sum()) for key, M in updates.items() if key != "embed.weight"}
    for key in ("wte.weight", "gate", "wpe.weight"):
        assert left_out[key]["norm_squared"] == pytest.approx(energy[key], rel=1e-12)
    share, gate = (100 * energy[key] / sum(energy.values()) for key in ("wte.weight", "gate"))
    line = f"Left out, by share of the squared norm: wte {share:.3g}%, gate {gate:.3g}%."
    assert line in capsys.readouterr().out.splitlines()
    assert line in (tmp_path / "out" / "README.md").read_text().splitlines()


def test_kinds_that_are_too_long_are_told_apart(llamas, tmp_path):
    """As those of adapters are, whose names are whole: in 80 columns, and not by their ends alone."""
    folder, _ = llamas
    assert run(folder, tmp_path, *options()) == 0
    report = report_of(tmp_path)
    prefix = "model.language_model.encoder.layers."
    names = [f"{prefix}{i}.self_attn.{x}_proj" for i in (3, 10) for x in "qv"]
    for row, name in zip(report["stacks"], names, strict=True):
        row["kind"] = name
    lines = extraction_table(report).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == [name.removeprefix(prefix) for name in names]
    assert f"All kinds begin with {prefix!r}, which is not shown." in lines
    assert max(map(len, lines)) <= 80
    assert extraction_table({**report, "stacks": report["stacks"][:1]}).splitlines()[2].startswith("q_proj ")


def test_ranges_of_ranks_stay_on_one_line():
    """As 112..384 with --rank auto, whose width is not known when the first row is printed."""
    module = {"rank_90": 300}
    row = {"name": "q", "kind": "q", "layers": 2, "shape": [384, 384], "rank": None, "k": 0, "norm_squared": 2.0}
    row |= {"e_lora": 1.0, "e_rasa": 1.0, "e_stored": 1.0, "modules": [module | {"rank": rank} for rank in (112, 384)]}
    (line,) = ErrorTable([row], None, False).rows(row)
    assert line.split() == ["q", "2", "384x384", "-", "112..384", "0.5000", "0.5000", "300"]


@pytest.mark.slow
def test_the_card_says_what_is_chosen_and_every_rank_that_is_written(llamas, tmp_path):
    folder, _ = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "lm_head*", "--rank", "3", "--sweeps", "2")
    few += ("--format", "lora-exact-rasa")
    assert run(folder, tmp_path / "one", *few, "--k", "1") == 0
    report = report_of(tmp_path / "one")
    report["stacks"] += [{**report["stacks"][0], "ranks": {"lm_head": 3}}]
    assert "RaSA of rank 3 with k = 1, written exactly as a LoRA of rank 3 or 5, stored" in model_card(report)
    assert run(folder, tmp_path / "auto", *few, "--k", "auto") == 0
    assert "with k = chosen for each kind of module, written" in (tmp_path / "auto" / "README.md").read_text()
