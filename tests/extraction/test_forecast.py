"""The forecast of an extraction: sizes, memory, disk space, reads per stack and time, as the run itself has them."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from rasa_theory.bounds import RankTarget
from rasa_theory.commands.extract import main
from rasa_theory.extraction import ExtractSettings, Job, duration, extract_settings
from rasa_theory.extraction import job as job_module
from rasa_theory.problem import storage
from rasa_theory.solvers import SolverOptions
from rasa_theory.sources import Catalogue, StackSource, synthetic_stack
from tests.helpers.models import run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_a_dry_run_says_what_and_how_large(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    monkeypatch.setattr(job_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=7 * 2**30))
    assert run(folder, tmp_path / "out", "--dry-run", "--rank", "4", "--k", "1") == 0
    text = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.weight: 3 x 24 x 24" in text
    said = re.search("LoRA takes less than 1 s here, .*; solver and floors less than (.*) s more", text)
    assert said
    assert float(said[1]) > 7 * 4  # each of 7 stacks takes 4 s or more, whatever LoRA takes on a busy machine
    assert "  left out: 7 norms: the weight of a norm, by the model class LlamaForCausalLM" in text
    assert "\nk concerns the report alone: format lora holds no pool. --k 0 takes less time.\n" in text
    assert "\nAll factors have rank 4 in the file.\n" in text
    assert (
        f"the adapter takes at most about 0.0 MiB, twice that while it is made; 7 GiB are free in {tmp_path / 'out'}."
        in text
    )
    assert text.splitlines()[-1].startswith("One stack is in memory at a time: about 0 MiB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fmt", "copies", "there"), [("lora", 2, 0), ("diff", 1, 0), ("diff", 1, 1000)])
def test_a_disk_that_is_too_small_is_said_before_any_work(llamas, tmp_path, monkeypatch, capsys, fmt, copies, there):
    """To the byte; less what an interrupted run has left there."""
    folder, _ = llamas
    numbers = 3 * 24 * 24 if fmt == "diff" else 3 * 2 * (24 + 24)
    wanted = copies * 4 * numbers - there
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".kept.safetensors").write_bytes(bytes(there))
    more = ("--rank", "2", "--k", "0", "--modules", "*self_attn.v*", "--format", fmt)
    monkeypatch.setattr(job_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=wanted - 1))
    assert run(folder, tmp_path / "out", *more) == 2
    assert f"--out {tmp_path / 'out'} needs {wanted / 2**30:.3g} GiB, of which" in capsys.readouterr().err
    monkeypatch.setattr(job_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=wanted))
    assert run(folder, tmp_path / "out", *more) == 0


def test_the_dry_run_counts_dense_updates_and_the_norm_of_an_embedding_as_memory(tmp_path, capsys):
    n, b, a = 60, 96, 64
    updates = {f"h.{i}.q.weight": torch.randn(b, a) for i in range(n)}
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "0", "--out", str(tmp_path)]
    arguments += ["--format", "dense", "--dry-run"]
    work = 8 * (n * b * a + n * min(b, a) * (b + a) + 4 * b * a) + 4 * n * b * a

    def said():
        assert main(arguments) == 0
        return capsys.readouterr().out

    assert f"about {work / 2**20:.0f} MiB at most" in said()
    save_file(updates | {"wte.weight": torch.zeros(40_000, a)}, tmp_path / "updates.safetensors")
    assert f"about {4 * 40_000 * a / 2**20:.0f} MiB at most" in said()


def test_the_dry_run_leaves_out_of_the_memory_what_the_limit_leaves_on_disk(tmp_path, capsys):
    """Stacks in float16: the wide one is more than a quarter of the limit, and the SVDs of both are, too."""
    n, side, narrow = 32, 96, 24
    layers = {f"h.{i}.q.weight": torch.randn(side, side).half() for i in range(n)}
    layers |= {f"h.{i}.v.weight": torch.randn(narrow, side).half() for i in range(n)}
    save_file(layers, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "0", "--compute", "float32"]
    arguments += ["--out", str(tmp_path / "out"), "--dry-run"]

    def last_line(*more):
        assert main([*arguments, *more]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    def mib(size):
        return f"about {size / 2**20:.0f} MiB at most"

    layer, limit = 32 * side**2, 2 * n * side**2 * 4 - 4
    assert mib(4 * n * side**2 + 8 * n * side * 2 * side + layer) in last_line()
    line = last_line("--memory", str(limit))
    assert line.endswith("beside the libraries; --memory leaves 1 stack on disk.")
    assert mib(max(layer, 4 * n * narrow * side + 32 * narrow * side)) in line
    assert "on disk" not in last_line("--memory", str(limit + 4))


def test_too_little_memory_is_one_sentence_about_the_largest_need(tmp_path, capsys):
    save_file(
        {f"h.{i}.{kind}.weight": torch.randn(b, 40) for i in range(2) for kind, b in (("k", 10), ("q", 40), ("v", 20))},
        tmp_path / "updates.safetensors",
    )
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--out", str(tmp_path / "out")]
    needed = 2 * 8 * 8 * 40 * 40
    assert main([*arguments, "--memory", str(needed - 1), "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        "rasa extract: memory of 0.1953 MiB is too little for stack 'h.*.q.weight': its layers of 40 x 40 need "
        "0.1953 MiB, twice what the exact SVD of one takes; allow at least that (--memory)\n"
    )
    assert main([*arguments, "--memory", str(needed), "--dry-run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "exact", "said", "least", "most"),
    [
        (("--rank", "2", "--k", "0"), 1024, "4 times;", 4, 4),
        (("--rank", "2", "--k", "0", "--format", "diff"), 1024, "3 times;", 3, 3),
        (("--rank", "2", "--k", "0"), 1, "4 times;", 4, 4),
        (("--rank", "auto", "--energy", "0.9"), 1024, "8 times;", 8, 8),
        (("--rank", "auto", "--energy", "0.9"), 1, "8 times;", 8, 8),
        (("--rank", "4", "--k", "1"), 1024, "some 50 to 350 times, by the solver for the most part;", 50, 350),
        (
            ("--rank", "4", "--k", "2", "--start", "lora", "--sweeps", "10"),
            1024,
            "some 20 times, and by the solver twice or three times a sweep;",
            20,
            20 + 3 * 10,
        ),
    ],
)
def test_a_stack_is_read_as_often_as_the_dry_run_says(tmp_path, monkeypatch, capsys, more, exact, said, least, most):
    """Of 422 KiB, more than a quarter of the memory."""
    values = synthetic_stack(9, (120, 100), "power:1.5", 0.5, 0).values.float()
    save_file({f"h.{i}.q.weight": M.clone() for i, M in enumerate(values)}, tmp_path / "updates.safetensors")
    monkeypatch.setattr(extract_settings, "LARGEST_EXACT", exact)
    rows, read = [], storage.FileRows.read

    def counted(part, start, stop):
        rows.append(stop - start)
        return read(part, start, stop)

    monkeypatch.setattr(storage.FileRows, "read", counted)
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--memory", str(128 * 120 * 100), "--quiet", *more]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    assert f"Every stack is read {said}" in capsys.readouterr().out
    assert not rows
    assert main(arguments) == 0
    assert least <= sum(rows) / (9 * 120) <= most


def test_how_long_a_lora_takes_is_extrapolated_to_all_layers():
    """Half a second for the layer that is timed, whatever it is: as many times that as there are such layers."""

    def said(shape, rank, k, target=None, spectra="auto"):
        stacks = [StackSource("q", 8, shape, None, ("h.0.q.weight",))]
        settings = ExtractSettings(rank, k, target=target, solver=SolverOptions(spectra=spectra))
        job = Job(Catalogue("s", stacks, []), [], settings, torch.float32, "cpu")
        return duration(job, seconds_of_sample=lambda job, shape: 0.5)

    assert said((512, 512), 4, 0) == "LoRA takes up to about 4 s here, reading aside, by a layer timed now."
    assert said((512, 512), None, 0, RankTarget(0.9)).startswith("LoRA takes up to about 8 s here")  # and the spectra
    assert said((1024, 1024), 4, 1, spectra="exact").startswith("LoRA takes up to about 32 s here")
    pool = said((1280, 1280), 4, 1)
    assert pool.startswith("LoRA takes about 4 s here, and up to 62 s where singular values")
    assert pool.endswith("by a layer timed now; solver and floors some 64 s more.")  # 14 * 4 + 7, and 1 for sweeps
    assert said((2560, 1280), 4, 0).startswith("LoRA takes about 8 s here, and up to 125 s where singular values")
    assert said((2560, 1280), 400, 0).startswith("LoRA takes up to about 125 s here, reading")
