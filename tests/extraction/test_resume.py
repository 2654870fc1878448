"""Interruptions of an extraction: the same command resumes, one process at a time, and nothing is lost."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from rasa_theory import InputError
from rasa_theory.common import resume
from rasa_theory.extraction import ExtractionFolder, adapter_folder
from rasa_theory.extraction import run as extraction_run
from tests.helpers.models import options, run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


HOLDER = """
import os, sys, time
from pathlib import Path
from rasa_theory.extraction import ExtractionFolder

with ExtractionFolder(Path(sys.argv[1]), {"settings": {}}):
    print("in", flush=True)
    time.sleep(60)
"""


def files_of(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.suffix in (".safetensors", ".csv")}


def test_interrupted_it_goes_on_where_it_was(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    assert run(folder, tmp_path / "whole", *options()) == 0
    table = capsys.readouterr().out.splitlines()[:8]  # source, head, rule, four rows, sums
    done, real = [], extraction_run.extract_stack

    def stops(stack, *rest):
        if len(done) == 2 and "stopped" not in done:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(stack.name)
        return real(stack, *rest)

    monkeypatch.setattr(extraction_run, "extract_stack", stops)
    assert run(folder, tmp_path / "out", *options()) == 130
    printed = capsys.readouterr()
    assert "2 of 4 stacks finished" in printed.err
    assert printed.out.splitlines() == table[:5]  # each row as it is finished
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".extract"]
    assert run(folder, tmp_path / "out", *options()) == 0
    assert len(done) == len(set(done)) == 5
    assert capsys.readouterr().out.splitlines()[:8] == table
    assert run(folder, tmp_path / "out", *options()) == 0
    assert capsys.readouterr().out.splitlines()[:8] == table  # from the report
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_three_writes_the_next_run_gives_the_same_files(llamas, tmp_path, monkeypatch):
    """Before the row of the second stack, the adapter and the report are in their places."""
    folder, _ = llamas
    few = ("--rank", "2", "--k", "0", "--modules", "*self_attn.v*", "--modules", "*self_attn.q*")
    assert run(folder, tmp_path / "whole", *few) == 0
    real = os.replace
    for name in ("00001.json", "adapter_model.safetensors", "report.json"):

        def dies(source, target, name=name):
            if target.name == name:
                raise SystemExit(9)
            real(source, target)

        monkeypatch.setattr(os, "replace", dies)
        with pytest.raises(SystemExit):
            run(folder, tmp_path / name, *few)
        assert not (tmp_path / name / "report.json").exists()
        monkeypatch.setattr(os, "replace", real)
        assert run(folder, tmp_path / name, *few) == 0
        assert files_of(tmp_path / name) == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["lora", "diff"])
def test_killed_before_any_file_is_in_its_place_nothing_is_lost(llamas, tmp_path, monkeypatch, fmt):
    """Every write in turn is the last that happens; the next run ends with the files of an undisturbed one."""
    folder, _ = llamas
    assert run(folder, tmp_path / "whole", *options(fmt)) == 0
    real, n = os.replace, 0
    while True:
        left, out = n, tmp_path / f"out{n}"

        def dies(source, target):
            nonlocal left
            if left == 0:
                raise SystemExit(9)
            left -= 1
            real(source, target)

        monkeypatch.setattr(os, "replace", dies)
        try:
            assert run(folder, out, *options(fmt)) == 0
            break
        except SystemExit:
            assert not (out / "report.json").exists()
        monkeypatch.setattr(os, "replace", real)
        assert run(folder, out, *options(fmt)) == 0
        assert files_of(out) == files_of(tmp_path / "whole")
        n += 1
    assert n >= 1 + 2 * 4 + 5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_two_processes_do_not_share_a_folder_and_a_killed_one_keeps_none_out(llamas, tmp_path, capsys):
    folder, _ = llamas
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "in\n"
            (tmp_path / ".extract" / "manifest.json").unlink()  # whose plan would be refused anyway
            assert run(folder, tmp_path, *options()) == 2
            assert f"another process is extracting into {tmp_path}" in capsys.readouterr().err.splitlines()[-1]
        finally:
            holder.kill()
    assert run(folder, tmp_path, *options()) == 0
    assert not (tmp_path / ".extract").exists()


def test_a_lock_that_was_removed_with_its_folder_is_none(tmp_path, monkeypatch):
    plan = {"settings": {}}
    real = resume.fcntl.flock

    def removed(*rest):
        real(*rest)
        shutil.rmtree(tmp_path / ".extract")

    monkeypatch.setattr(resume.fcntl, "flock", removed)
    with pytest.raises(InputError, match="another process"), ExtractionFolder(tmp_path, plan):
        pass
    monkeypatch.setattr(resume.fcntl, "flock", lambda *rest: (_ for _ in ()).throw(OSError("no locks available")))
    with ExtractionFolder(tmp_path, plan) as place:
        assert place.compute_once("x", lambda: 1) == 1


def test_a_folder_whose_plan_cannot_be_written_is_not_locked(tmp_path, monkeypatch):
    def full(*rest, **more):
        raise InputError("cannot write")

    with monkeypatch.context() as patched:
        patched.setattr(resume, "write_json", full)
        place = ExtractionFolder(tmp_path, {"settings": {}})
        with pytest.raises(InputError, match="cannot write"), place:
            pass
    with ExtractionFolder(tmp_path, {"settings": {}}):
        pass


def test_tensors_beside_the_stacks_are_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_folder, "_PART", 1000)
    sizes = {"a": 200, "b": 50, "c": 300, "d": 10, "e": 20}  # float32: 800, 200; 1200; 40, 80 bytes
    with ExtractionFolder(tmp_path, {"settings": {"format": "diff"}}) as place:
        place.add_tensors(3, ((name, torch.full((size,), 1.0)) for name, size in sizes.items()))
        assert [list(load_file(place.tensors(n))) for n in (3, 4, 5)] == [["a", "b"], ["c"], ["d", "e"]]
        assert not place.tensors(6).exists()


def test_parts_of_no_known_plan_are_not_gone_on_with(tmp_path):
    (tmp_path / ".extract").mkdir()
    (tmp_path / ".extract" / "00000.json").write_text("{}")
    with ExtractionFolder(tmp_path, {"settings": {}}) as place:
        assert place.row(0) is None


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_a_folder_that_was_left_lets_the_next_in(tmp_path):
    first = ExtractionFolder(tmp_path, {"settings": {}})
    with first, pytest.raises(InputError, match="another process"), ExtractionFolder(tmp_path, first.plan):
        pass
    with ExtractionFolder(tmp_path, first.plan):
        pass


def test_what_a_killed_process_left_unfinished_goes(tmp_path):
    """Whichever of our files it was writing; hidden files of others stay."""
    names = ["report.csv", "report.png", "README.md", "diff-00002.safetensors", "diff.safetensors.index.json"]
    unfinished = [f".{name}.{'0a' * 8}" for name in names]
    unfinished.append(f"0-task/.adapter_model.safetensors.{'1b' * 8}")
    (tmp_path / "0-task").mkdir()
    (tmp_path / ".extract").mkdir()
    (tmp_path / ".extract" / "manifest.json").write_text('{"plan": {"settings": {}}}')
    for name in [*unfinished, ".hidden"]:
        (tmp_path / name).write_text("half")
    with ExtractionFolder(tmp_path, {"settings": {}}):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".extract", ".hidden", "0-task"]
        assert not list((tmp_path / "0-task").iterdir())


def test_a_disk_that_becomes_full_is_said_with_what_to_do(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    real = adapter_folder.plot_extraction

    def full(report):
        figure = real(report)
        figure.savefig = lambda *rest, **more: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        return figure

    monkeypatch.setattr(adapter_folder, "plot_extraction", full)
    assert run(folder, tmp_path / "out", *options()) == 2
    assert "report.png: No space left on device; make room and give the same command again" in capsys.readouterr().err
    monkeypatch.setattr(adapter_folder, "plot_extraction", real)
    monkeypatch.setattr(extraction_run, "extract_stack", None)  # all of them are done
    assert run(folder, tmp_path / "out", *options()) == 0


def test_inputs_or_settings_that_changed_are_refused(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    shutil.copytree(folder, tmp_path / "pair")
    monkeypatch.setattr(extraction_run, "extract_stack", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(tmp_path / "pair", tmp_path / "out", *options()) == 130
    capsys.readouterr()
    assert run(tmp_path / "pair", tmp_path / "out", *options(), "--seed", "1") == 2
    assert "holds an extraction with other settings (solver)" in capsys.readouterr().err
    assert run(tmp_path / "pair", tmp_path / "out", *options(), "--max-cancellation", "inf") == 2
    assert "holds an extraction with other settings (solver)" in capsys.readouterr().err
    assert run(tmp_path / "pair", tmp_path / "out", *options(), "--compute", "float32") == 2
    assert "holds an extraction with other settings (compute)" in capsys.readouterr().err
    shard = sorted((tmp_path / "pair" / "tuned").glob("*.safetensors"))[0]
    shard.touch()
    assert run(tmp_path / "pair", tmp_path / "out", *options()) == 2
    assert f"holds an extraction with other inputs ({shard.name})" in capsys.readouterr().err


def test_a_run_that_fails_before_anything_is_finished_leaves_nothing(llamas, tmp_path):
    folder, _ = llamas
    few = ("--modules", "*self_attn.v*", "--rank", "auto", "--parameters")
    assert run(folder, tmp_path, *few, "9") == 2
    assert list(tmp_path.iterdir()) == []
    assert run(folder, tmp_path, *few, "900") == 0


def test_files_of_others_are_left_alone(llamas, tmp_path, capsys):
    folder, _ = llamas
    (tmp_path / "README.md").write_text("mine")
    assert run(folder, tmp_path, *options()) == 2
    assert "README.md is there already, and not ours" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_another_extraction_in_the_folder_is_kept_unless_asked(llamas, tmp_path, capsys):
    folder, _ = llamas
    few = ("--k", "0", "--modules", "*self_attn.v*", "--rank")
    out = tmp_path / "out"
    assert run(folder, tmp_path / "other", *few, "2") == 0
    assert run(folder, out, *few, "3", "--format", "diff") == 0
    before = sorted(path.name for path in out.iterdir())
    assert run(folder, out, *few, "2") == 2
    assert "take this one with --overwrite" in capsys.readouterr().err
    (out / "mine.txt").write_text("kept")
    assert run(folder, out, *few, "2", "--overwrite") == 2  # before anything is removed
    assert "mine.txt is not ours" in capsys.readouterr().err
    (out / "mine.txt").unlink()
    assert sorted(path.name for path in out.iterdir()) == before
    assert run(folder, out, *few, "2", "--overwrite") == 0
    assert files_of(out) == files_of(tmp_path / "other")
    names, others = (sorted(path.name for path in one.iterdir()) for one in (out, tmp_path / "other"))
    assert names == others
    finished = (out / "report.json").stat().st_mtime_ns
    assert run(folder, out, *few, "2", "--overwrite") == 0  # the same plan: finished already
    assert (out / "report.json").stat().st_mtime_ns == finished


def test_an_extraction_in_progress_is_not_overwritten(llamas, tmp_path, capsys):
    folder, _ = llamas
    few = ("--k", "0", "--modules", "*self_attn.v*", "--rank")
    (tmp_path / "out").mkdir()
    with ExtractionFolder(tmp_path / "out", {"settings": {}}):
        assert run(folder, tmp_path / "out", *few, "2", "--overwrite") == 2
    assert "another process is extracting into" in capsys.readouterr().err
