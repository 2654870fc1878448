"""The README is short, its code runs, and no page has a broken link."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments.support.rows import read_rows

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file of the repository. MkDocs checks those to headings."""
    found = re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", FENCED.sub("", text(page)))
    links = [link for link in found if not re.match(r"[a-z]+:", link)]
    targets = {link: (page.parent / link.partition("#")[0]).resolve() for link in links if not link.startswith("#")}
    return [link for link, target in targets.items() if not (target.exists() and target.is_relative_to(ROOT))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def test_the_readme_can_be_read_in_a_few_minutes() -> None:
    assert len(text(README).splitlines()) <= 150
    assert len(text(README).split()) <= 1200


def test_the_readme_has_the_two_commands_that_set_up() -> None:
    lines = [line for line in text(README).splitlines() if re.match(r"python3 -m venv|\.venv/bin/pip install", line)]
    assert len(lines) == 2
    assert lines[0].endswith("python -m rasa_theory.reconstruct --rank 8 --k 1")
    assert lines[1].endswith("python -m pytest")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.test_pages.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A heading\n")
    links = ["other.md", "other.md#a-heading", "#here", "none.md", "none.md#a-heading", "..", "https://example.org/x"]
    page = tmp_path / "page.md"
    page.write_text(
        "\n".join(f"[x]({link})" for link in links) + '<img src="none.png">' + "\n```\n[x](in-code.md)\n```\n"
    )
    assert broken_links(page) == ["none.md", "none.md#a-heading", "..", "none.png"]


@pytest.mark.slow
def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in python_blocks(README) if "solve_rasa" in block]
    assert len([line for line in example.splitlines() if line]) <= 10
    exec(compile(example, str(README), "exec"), {})
    printed = capsys.readouterr().out
    ratio, floor = map(float, re.findall(r"0\.\d{4}", printed.splitlines()[0]))
    assert floor < ratio < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_training_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from tests.helpers.tiny_models import tiny

    tiny("llama").save_pretrained(str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    (example,) = [block for block in python_blocks(README) if "get_peft_model" in block]
    exec(compile(re.sub(r'from_pretrained\("[^"]*"\)', 'from_pretrained("base")', example), str(README), "exec"), {})
    assert (tmp_path / "rasa-adapter/adapter_model.safetensors").exists()
    assert (tmp_path / "lora-adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_chooses_a_model_where_a_table_has_several(notebook: Path) -> None:
    """Rows of a second model, which are added to a table later, must not get into its numbers."""
    for cell in json.loads(text(notebook))["cells"]:
        source = "".join(cell["source"])
        for name in re.findall(r'"(\w+\.csv)"', source) if cell["cell_type"] == "code" else ():
            models = {row.get("model") for row in read_rows(ROOT / "figures" / name)}
            assert len(models) < 2 or 'row["model"]' in source, f"{name} has rows of {models}"
