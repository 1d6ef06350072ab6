"""
Publish an exported folder on the Hub: code, weights, card and pictures, in one commit.

Example: pyrdiff push runs/mine/pipeline user/name --bench bench.json --license apache-2.0 --dry_run

The folder is checked first. A push that is interrupted leaves what was published before. With --dry_run the card,
the files and their sizes are printed, and nothing is sent.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pyrdiff.cli import announce, expect, parse


@dataclass(kw_only=True)
class PushSettings:
    """Flags of `pyrdiff push`."""

    model: str
    """Exported folder."""
    repo_id: str
    """Repository, user/name; or name for one of your own."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to publish on, made if it does not exist; by default main."""
    commit_message: str | None = None
    """By default it names the pipeline."""
    bench: str | None = None
    """Result of pyrdiff bench, for the card's table and the Hub's model index."""
    license: str | None = None
    """Licence identifier for the card, such as apache-2.0."""
    pictures: tuple[str, ...] = ()
    """Files to show on the card; by default samples of a model that generates, none of one that enlarges."""
    max_megapixels: float = 64
    """The most pixels, in millions, of an image that the model's configs and plans ask for."""
    dry_run: bool = False
    """Print the card and list what would be published."""

    def __post_init__(self):
        expect(self, "model", Path(self.model).is_dir(), "an exported folder")
        expect(self, "bench", self.bench is None or Path(self.bench).is_file(), "a result of pyrdiff bench")
        expect(self, "pictures", all(Path(picture).is_file() for picture in self.pictures), "files")
        expect(self, "max_megapixels", self.max_megapixels > 0, "a number above 0")


def main(args: list[str]) -> dict:
    settings = parse(PushSettings, __doc__, args, prog="pyrdiff push")
    sent = "nothing is sent (dry run)" if settings.dry_run else f"published as {settings.repo_id} in one commit"
    announce(f"{settings.model}: checked first, then {sent}; Ctrl-C leaves what was published before")
    from huggingface_hub.utils import disable_progress_bars

    from pyrdiff import hub

    if not sys.stderr.isatty():
        disable_progress_bars()
    done = hub.push(
        settings.model,
        settings.repo_id,
        private=settings.private or None,
        revision=settings.revision,
        commit_message=settings.commit_message,
        bench=settings.bench,
        license=settings.license,
        pictures=list(settings.pictures) or None,
        max_megapixels=settings.max_megapixels,
        dry_run=settings.dry_run,
        say=announce,
    )
    if settings.dry_run:
        print(f"{done.card}\n{'-' * 80}")
    for file, size in done.files.items():
        print(f"{size:>12,}  {file}")
    for file in done.deleted:
        print(f"{'deleted':>12}  {file}")
    print(f"{len(done.files)} files, {sum(done.files.values()):,} bytes: {done.url or 'nothing was sent (dry run)'}")
    if done.url:
        print(f"next: pyrdiff check {done.repo_id}")
    return asdict(done)
