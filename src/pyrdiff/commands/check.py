"""
Say whether an exported folder, or a repository on the Hub, is sound.

Example: pyrdiff check runs/mine/pipeline

It is, if it holds one model and nothing else, if its code is that of the installed classes, and if it loads by
pyrdiff.load and, to the same weights, where pyrdiff is not installed. Exit code 1 if it is not.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from pyrdiff.cli import announce, expect, parse
from pyrdiff.commands.paths import check_paths


@dataclass(kw_only=True)
class CheckSettings:
    """Flags of `pyrdiff check`."""

    model: str
    """Exported folder, repository on the Hub, or a model that comes with pyrdiff."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    trust_remote_code: bool = False
    """Run the folder's own code for the load without pyrdiff, even if it is not that of the installed classes."""
    update_code: bool = False
    """First replace the code in a local folder by that of the installed classes, and remove every other Python file."""
    max_megapixels: float = 64
    """The most pixels, in millions, of an image that the model's configs and plans ask for."""

    def __post_init__(self):
        expect(self, "max_megapixels", self.max_megapixels > 0, "a number above 0")


def main(args: list[str]) -> dict:
    settings = parse(CheckSettings, __doc__, args, prog="pyrdiff check")
    if not Path(settings.model).is_dir():  # what is wrong with a folder is what the command says
        check_paths(settings, models=["model"])
    announce(f"checking {settings.model}: its files, its code, and whether it loads with and without pyrdiff")
    from pyrdiff import hub
    from pyrdiff.hub.messages import file_name

    found = hub.check(
        settings.model,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        update_code=settings.update_code,
        max_megapixels=settings.max_megapixels,
    )
    for file, size in found.files.items():
        print(f"{size:>12,}  {file_name(file)}")
    tried = {True: "yes", False: "no", None: "not tried"}
    print(f"{found.pipeline or 'no pipeline'}, loads with pyrdiff: {tried[found.loads]}, ", end="")
    print(f"without: {tried[found.loads_elsewhere]}")
    for problem in found.problems:
        print(f"problem: {problem}")
    for note in found.notes:
        print(f"note: {note}")
    print(f"{settings.model}: {'sound' if found.sound else 'NOT sound'}")
    return {"path": settings.model, "sound": found.sound, **asdict(found), "exit_code": 0 if found.sound else 1}
