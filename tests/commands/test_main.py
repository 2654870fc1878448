"""The command `rasa` itself: its help, the commands behind it, completion, and Ctrl-C before anything has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import rasa_theory
from rasa_theory.commands import main as rasa
from rasa_theory.common import __version__

ROOT = Path(rasa_theory.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}


def python(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def test_the_help_names_every_command_with_an_example_in_80_columns() -> None:
    done = python("-m", "rasa_theory", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name, (purpose, flags) in rasa.COMMANDS.items():
        assert lines[lines.index(f"  {name:<13}{purpose}") + 1].strip() == f"rasa {name} {flags}"


@pytest.mark.parametrize("name", rasa.COMMANDS)
def test_every_example_of_the_help_is_taken(name: str) -> None:
    command = __import__(f"rasa_theory.commands.{name}", fromlist=["parse"])
    assert command.parse(rasa.COMMANDS[name][1].split()) is not None


def test_neither_the_help_nor_the_names_of_the_package_import_torch() -> None:
    code = "import atexit, sys\natexit.register(lambda: print(sorted({'torch', 'numpy'} & sys.modules.keys())))\n"
    code += "import rasa_theory\nassert 'solve_rasa' in dir(rasa_theory)\n"
    code += "from rasa_theory.commands.main import main\nmain(['--help'])"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_name_of_the_package_can_be_imported() -> None:
    assert "solve_rasa" in rasa_theory.__all__
    missing = [name for name in rasa_theory.__all__ if getattr(rasa_theory, name, None) is None]
    assert missing == []
    with pytest.raises(AttributeError):
        _ = rasa_theory.solve_everything  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_command_is_the_same_by_its_module_and_by_the_first_word(tmp_path: Path) -> None:
    words = ["--families", "thin", "--instances", "1", "--out", "none", "--quiet"]
    by_word, by_module = (
        python("-m", *start, *words, folder=tmp_path) for start in (("rasa_theory", "verify"), ("rasa_theory.verify",))
    )
    assert by_word.returncode == by_module.returncode == 0, by_word.stderr
    assert by_word.stdout.partition("(")[0] == by_module.stdout.partition("(")[0]
    assert by_word.stdout.startswith("family ")


@pytest.mark.parametrize("name", rasa.COMMANDS)
def test_every_command_tells_its_version_and_refuses_in_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        rasa.main([name, "--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"rasa_theory {__version__}\n")
    assert rasa.main([name, "--nonsense"]) == 2
    out, err = capsys.readouterr()
    missing = (
        "the following arguments are required: --out" if name == "extract" else "unrecognized arguments: --nonsense"
    )
    assert (out, err) == ("", f"rasa {name}: {missing} (see --help)\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["recontruct"],
            "rasa: 'recontruct' is no command; there are inspect, reconstruct, extract, verify (see --help)",
        ),
        (["--rank", "8"], "rasa: unrecognized arguments: --rank 8 (see --help)"),
        (["--print-completion", "dos"], "rasa: argument --print-completion: invalid choice: 'dos'"),
    ],
)
def test_bad_usage_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rasa.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(sentence)
    assert err.count("\n") == 1


def test_without_a_command_the_help_is_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert rasa.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "rasa reconstruct --rank 8 --k 1" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands_and_their_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rasa.main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert [flag for flag in ("certificate", "save-modules", "energy", "replay") if flag not in script] == []
    assert [name for name in rasa.COMMANDS if name not in script] == []


def test_bash_completes_a_flag_and_its_choices(tmp_path: Path) -> None:
    script = tmp_path / "rasa.bash"
    script.write_text(rasa.completion("bash"))
    ask = f"source {script}; COMP_WORDS=(rasa $1); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
    ask += "$(complete -p rasa | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"

    def offered(words: str) -> list[str]:
        done = subprocess.run(["bash", "-c", ask, "bash", words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert set(offered("rec")) == {"reconstruct"}
    assert "--certificate" in offered("reconstruct --cert")
    assert set(offered("reconstruct --certificate d")) == {"dual"}
    assert set(offered(f"extract --base {script.parent}/r")) == {str(script)}


# ---- Ctrl-C


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("module", ["rasa_theory.reconstruct", "rasa_theory"])
def test_an_interruption_of_the_imports_is_one_line(module: str, tmp_path: Path) -> None:
    """A stand-in for torch says when it is being imported, and then takes its time."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    words = ["reconstruct"] if module == "rasa_theory" else []
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words, "--rank", "8", "--k", "1"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted; nothing had begun\n")
    assert time.monotonic() - started < 10


def test_the_handler_of_an_interruption_is_put_back(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert rasa.run("verify", ["--list"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
        assert rasa.run("verify", ["--list"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("words", ["inspect", "reconstruct --rank 2 --seeds 0", "extract --rank 2"])
@pytest.mark.parametrize("there", [False, True], ids=["new folder", "with a file"])
def test_bad_values_leave_no_empty_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, there: bool
) -> None:
    M = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0))
    M[1, 2, 3] = torch.nan
    save_file({f"h.{i}.q.weight": M[i].clone() for i in range(2)}, tmp_path / "x.safetensors")
    out = tmp_path / "out"
    if there:
        (out / "kept").mkdir(parents=True)
    assert rasa.main([*words.split(), "--source", str(tmp_path / "x.safetensors"), "--out", str(out)]) == 2
    refused = "is there already" if there and words.startswith("extract") else "entry (2, 3) is nan"
    assert refused in capsys.readouterr().err
    assert out.exists() == there
    assert [path.name for path in out.glob("*")] == ["kept"] * there
