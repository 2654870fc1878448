"""What MkDocs does not do by itself: files from beside docs/, formulas as MathML, and no request to another host."""

from __future__ import annotations

import html
import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
BESIDE = ("figures", "notebooks", "CHANGELOG.md")
"""Folders and pages of the repository that are part of the site, under the same names."""

PARTS_OF_MARKDOWN = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^\s$](?:[^$]*[^\s$])?)\$", re.DOTALL
)
MADE_BY_ARITHMATEX = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)
MEANS_SOMETHING_IN_MARKDOWN = re.compile(r"[*_`|~\[\]\\$]")

_scratch = tempfile.TemporaryDirectory()


class PlainUnderscores(Extension):
    """Emphasis by `*` alone: docstrings write formulas in plain text, as ||M_i||_F^2 = sum_i sum_{j>r} sigma_ij^2."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.delimiters.remove("_")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave underscores in text alone."""
    config.markdown_extensions.append(PlainUnderscores())
    return config


@event_priority(100)  # before mkdocs-jupyter, which looks for notebooks among the files
def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add figures, notebooks and the changelog to the site."""
    for name in ("figures/*.*", "notebooks/*.ipynb", "CHANGELOG.md"):
        for path in sorted(REPOSITORY.glob(name)):
            if path.name == "README.md":
                continue
            source = path.relative_to(REPOSITORY).as_posix()
            root = _prepared_notebook(path) if path.suffix == ".ipynb" else REPOSITORY
            files.append(File(source, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to what lies beside docs/: on a git host `figures` is one folder further up than in the site."""
    up = "../" * page.file.src_uri.count("/")
    beside = "|".join(re.escape(name) for name in BESIDE)
    return re.sub(rf'(\]\(|src=")\.\./{re.escape(up)}(?=(?:{beside})\b)', rf"\g<1>{up}", markdown)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas that arithmatex has marked into MathML, which browsers show without a script.

    Of notebooks, leave out the scripts that mkdocs-jupyter would load from other hosts: MathJax and Mermaid.
    """
    if page.file.src_uri.endswith(".ipynb"):
        return SCRIPT.sub(lambda found: "" if foreign_addresses(found[0]) else found[0], content)
    return MADE_BY_ARITHMATEX.sub(lambda found: mathml(html.unescape(found[3]), block=found[2] == "["), content)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Raise PluginError if a page or a style sheet would load anything from another host."""
    readers = {".html": foreign_addresses, ".css": loads_of_style}
    foreign = [
        f"{path.relative_to(config.site_dir)}: {address}"
        for path in sorted(Path(config.site_dir).rglob("*.*"))
        if path.suffix in readers
        for address in readers[path.suffix](path.read_text(encoding="utf-8"))
    ]
    if foreign:
        raise PluginError("Pages load from other hosts:\n  " + "\n  ".join(foreign))


def mathml(formula: str, *, block: bool) -> str:
    """Return a formula of LaTeX as MathML. Raise PluginError if a command in it is not known."""
    element = convert(formula, display="block" if block else "inline")
    element = element.replace('<mi mathvariant="double-struck">R</mi>', "<mi>ℝ</mi>")
    if "\\" in element:
        raise PluginError(f"latex2mathml does not know a command of this formula: {formula}")
    if re.search('mathvariant="(?!normal)', element):
        raise PluginError(
            f"browsers have one upright and one italic alphabet for MathML; write the letter itself: {formula}"
        )
    return element


def with_mathml(markdown: str) -> str:
    """Replace `$..$` and `$$..$$` outside code by MathML, whose characters Markdown then leaves alone."""

    def replaced(found: re.Match[str]) -> str:
        if found["code"]:
            return found["code"]
        element = mathml(found["block"] or found["inline"], block=bool(found["block"]))
        escaped = MEANS_SOMETHING_IN_MARKDOWN.sub(lambda character: f"&#{ord(character[0])};", element)
        return f"<div>{escaped}</div>" if found["block"] else f"<span>{escaped}</span>"

    return PARTS_OF_MARKDOWN.sub(replaced, markdown)


def _prepared_notebook(path: Path) -> Path:
    """Copy a notebook, with formulas as MathML and links as the site has them. Returns the root of the copy."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = with_mathml("".join(cell["source"]))
            cell["source"] = re.sub(r"\]\(\.\./docs/([^)#]*)\.md", r"](../\1.html", text)
    root = Path(_scratch.name)
    copy = root / path.relative_to(REPOSITORY)
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(json.dumps(notebook), encoding="utf-8")
    return root


def foreign_addresses(page: str) -> list[str]:
    """Addresses of other hosts that a browser would load to show this page."""
    parser = _Loads()
    parser.feed(page)
    return parser.addresses


def loads_of_style(style: str) -> list[str]:
    """Addresses of other hosts that a style sheet, or a style attribute, would load."""
    return re.findall(r"""(?:@import|url\()\s*["']?((?:https?:)?//[^"')]+)""", style)


class _Loads(HTMLParser):
    """Collects what scripts, style sheets, images and frames load from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag if tag in ("script", "style") else None
        if tag == "a":
            return
        for name, value in attrs:
            candidates = (value or "").split(",") if name == "srcset" else [value or ""]
            is_address = name in ("src", "href", "xlink:href", "srcset", "data", "poster")
            if is_address and any(re.match(r"\s*(https?:)?//", candidate) for candidate in candidates):
                self.addresses.append(f"<{tag} {name}={value}>")
            if name == "style":
                self.addresses += loads_of_style(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.addresses += re.findall(r"""["']((?:https?:)?//[^"']+)""", data)
        elif self.inside == "style":
            self.addresses += loads_of_style(data)
