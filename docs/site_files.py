"""
What the site has beside the pages of this folder: the README as its first page, the measurements, and their pictures.
The pages link to each other as files of the repository, so that they can be read there too; here the links are turned.
Formulas become MathML, which browsers show without a script.
"""

import html
import posixpath
import re
from pathlib import Path, PurePosixPath

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md", "examples/plugin/README.md", "LICENSE"]
LINK = re.compile(r"(!?\[[^\[\]]*\])\(([^)\s#]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def added() -> list[str]:
    """Files of the repository that become files of the site, by their paths."""
    places = [*ROOT.glob("benchmarks/*.md"), *ROOT.glob("benchmarks/results/*.png")]
    places += [path for path in ROOT.glob("src/pyrdiff/pretrained/*/*") if path.suffix in (".png", ".webp")]
    return PAGES + sorted(path.relative_to(ROOT).as_posix() for path in places)


def in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    place = PurePosixPath(path)
    if place.parts[0] == "docs":
        place = place.relative_to("docs")
    return (place.with_name("index.md") if place.name == "README.md" else place).as_posix()


def in_repository(src_uri: str) -> str:
    """The reverse of `in_site`, of a page."""
    for path in added():
        if in_site(path) == src_uri:
            return path
    return f"docs/{src_uri}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in added():
        files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    folder = posixpath.dirname(in_repository(here))

    def turned(link: re.Match) -> str:
        shown, target, anchor = link.groups()
        if "://" in target:
            return link.group()
        target = in_site(posixpath.normpath(posixpath.join(folder, target)))
        if files.get_file_from_path(target) is None:  # a file that is in the repository only
            return shown.strip("![]")
        return f"{shown}({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(turned, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def drawn(formula: re.Match) -> str:
        element, tex = formula.groups()
        display = "inline" if element == "span" else "block"
        return latex2mathml.converter.convert(html.unescape(tex).strip(), display=display)

    return FORMULA.sub(drawn, content)
