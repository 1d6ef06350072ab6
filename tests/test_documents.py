"""What the documents say is what the files say."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_printed_from_the_results():
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py"), "--check"], check=True)
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"<!-- table: (\S+)(?: \S+)? -->", text))  # some in several tables
    assert sorted(shown) == sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_readme_names_flags_files_and_names_that_exist():
    from pyrdiff.methods.pddpm import PyramidalSettings
    from pyrdiff.methods.pixel_aware import PixelAwareSettings
    from pyrdiff.methods.sr import SuperResolutionSettings
    from pyrdiff.plugins import methods

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for begin, end, settings in (
        ("## Train on", "## Sample", PyramidalSettings),
        ("## Train to enlarge", "## Generate", SuperResolutionSettings),
        ("## Generate", "## Know", PixelAwareSettings),
    ):
        flags = set(re.findall(r"--([a-z_0-9]+)", text[text.index(begin) : text.index(end)])) - {"help"}
        assert flags and flags <= set(settings.__dataclass_fields__)
    for path in re.findall(r"(?:examples|benchmarks)/[\w.]+", text):
        assert (ROOT / path).exists(), path
    for method in methods().values():
        assert f"examples/train_{method.name}.py" in text, "a row for each method"
