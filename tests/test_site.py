"""The documentation as a site: it builds, its links and anchors lead somewhere, nothing comes from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyrdiff

pytest.importorskip("mkdocs", reason="the site needs the extra docs")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The pages by their paths. With --strict a warning, such as of a link that leads nowhere, ends the build."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_document_is_a_page(pages):
    for path in ROOT.glob("docs/**/*.md"):
        assert path.relative_to(ROOT / "docs").with_suffix("").as_posix() + "/index.html" in pages, path
    assert "pyrdiff demo" in pages["index.html"]  # the README
    assert 'src="../results/' in pages["benchmarks/index.html"] or 'src="results/' in pages["benchmarks/index.html"]


def test_the_reference_has_the_public_names(pages):
    shown = " ".join(re.findall(r'id="(pyrdiff\.[^"]+)"', "".join(pages.values())))
    for name in pyrdiff.__all__:
        if name[0].isupper() or name == "load":
            assert re.search(rf"\.{name}\b", shown), name


def test_formulas_are_drawn_without_a_script(pages):
    assert "<math" in pages["methods/pyramids/index.html"]
    assert not any("arithmatex" in page for page in pages.values())


def test_nothing_is_fetched_from_elsewhere(pages):
    for path, page in pages.items():
        assert not re.findall(
            r'<(?:script|img|iframe)[^>]* src="https?:|<link[^>]* rel="stylesheet" href="https?:', page
        ), path
