"""The hooks of the documentation site: links to the outside are seen, formulas become MathML, links are rewritten."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("latex2mathml")

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


@pytest.mark.parametrize(
    "loads",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img src="http://example.org/x.png">',
        "<style>@import 'https://example.org/x.css';</style>",
        "<style>a { background: url(https://example.org/x.png) }</style>",
        '<script>import("https://cdn.example/x.js")</script>',
        '<img srcset="x.png 1x, https://example.org/x.png 2x">',
        '<p style="background: url(//example.org/x.png)">text</p>',
    ],
)
def test_what_another_host_would_serve_is_noticed(loads: str) -> None:
    assert len(hooks.foreign_addresses(f"<html><body>{loads}</body></html>")) == 1


@pytest.mark.parametrize(
    "harmless",
    [
        '<a href="https://example.org">a link</a>',
        '<img src="../figures/x.png">',
        '<script src="assets/x.js"></script>',
        "<p>https://example.org</p>",
    ],
)
def test_links_and_own_files_are_harmless(harmless: str) -> None:
    assert hooks.foreign_addresses(harmless) == []


@pytest.mark.parametrize(
    ("file", "text", "address"),
    [
        ("x.html", '<script src="https://cdn.example/x.js"></script>', "<script src=https://cdn.example/x.js>"),
        ("x.css", "a { background: url('https://cdn.example/x.png') }", "https://cdn.example/x.png"),
    ],
)
def test_a_site_that_loads_from_another_host_is_refused(file: str, text: str, address: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    (tmp_path / "own.css").write_text("a { background: url(\"data:image/svg+xml,<svg xmlns='http://www.w3.org'>\") }")
    with pytest.raises(PluginError, match=re.escape(f"{file}: {address}")) as refused:
        hooks.on_post_build(config=SimpleNamespace(site_dir=str(tmp_path)))
    assert "own.css" not in str(refused.value)


def test_formulas_outside_code_become_mathml() -> None:
    markdown = hooks.with_mathml("`$a$` costs $x_i^2$, and\n```\n$b$\n```\n$$e = 1$$")
    assert "`$a$` costs <span><math" in markdown
    assert "```\n$b$\n```" in markdown
    assert '<div><math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in markdown
    assert "_" not in markdown.split("<span>")[1].split("</span>")[0]


def test_a_formula_with_an_unknown_command_is_refused() -> None:
    with pytest.raises(PluginError, match="nosuchcommand"):
        hooks.mathml(r"\nosuchcommand x", block=False)


def test_an_alphabet_that_browsers_do_not_have_is_refused() -> None:
    assert "<mi>ℝ</mi>" in hooks.mathml(r"\mathbb R^{b \times a}", block=False)
    with pytest.raises(PluginError, match="write the letter itself"):
        hooks.mathml(r"\mathcal L", block=False)


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_formula_of_a_notebook_is_left(notebook: Path) -> None:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            hooks.with_mathml("".join(cell["source"]))


@pytest.mark.parametrize(
    ("page", "link", "result"),
    [
        ("guides/x.md", "../../figures/a.png", "../figures/a.png"),
        ("index.md", "../figures/a.png", "figures/a.png"),
        ("reference/api/x.md", "../../../notebooks/a.ipynb", "../../notebooks/a.ipynb"),
        ("guides/x.md", "../theory/search.md", "../theory/search.md"),
        ("guides/x.md", "../../elsewhere.md", "../../elsewhere.md"),
    ],
)
def test_links_to_figures_and_notebooks_are_those_of_the_site(page: str, link: str, result: str) -> None:
    page_ = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(f"[x]({link})", page=page_, config=None, files=None) == f"[x]({result})"
