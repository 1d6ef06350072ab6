"""Publishing: a checked folder, with its card filled in, as one commit on the Hub."""

import io
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from pyrdiff.machine import open_device, seeded

from . import card
from .checking import check
from .loading import MAX_MEGAPIXELS, load
from .repository import is_bundled

KEPT = (".gitattributes",)  # the Hub's own
SAMPLES = "samples.png"


@dataclass
class Push:
    """
    What `push` did, or, in a dry run, would do.

    Args:
        repo_id: Full name of the repository; in a dry run as given.
        files: {path: bytes} of what is published.
        deleted: Files of the earlier revision that are no part of this one.
        card: The model card.
        url: Of the commit; None in a dry run.
        commit: SHA of it; None in a dry run.
    """

    repo_id: str
    files: dict[str, int]
    deleted: list[str]
    card: str
    url: str | None = None
    commit: str | None = None


def push(
    path: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    bench: str | os.PathLike | None = None,
    license: str | None = None,
    pictures: list[str | os.PathLike] | None = None,
    token: str | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> Push:
    """
    Publishes an exported folder on the Hub: code, safetensors, configs, card and pictures, in one commit.

    The folder is checked first (`pyrdiff.hub.check`), and the repository then holds it and nothing else. A push that is
    interrupted leaves the revision before it as it was, and one that another push overtakes is refused.

    Args:
        path: The exported folder.
        repo_id: Repository, as "user/name", or "name" for one of your own. It is made if it does not exist.
        private: Whether a new repository is private.
        revision: Branch to publish on; by default main. It is made if it does not exist.
        commit_message: By default, "Upload <pipeline> with pyrdiff".
        bench: Result of `pyrdiff bench`, for the card's table and the Hub's model index.
        license: Licence identifier for the card, such as "apache-2.0".
        pictures: Files to show on the card. By default, a row of samples of a model that generates; of one that
            enlarges none, since its pictures would show images of yours.
        token: By default the one that is logged in, or HF_TOKEN.
        max_megapixels: As for `pyrdiff.load`.
        dry_run: Only list what would be published.
        say: f(line), called before each part that takes a while.

    Raises:
        ValueError: if the folder is not sound, or an argument is not accepted; nothing was sent.
        OSError: if the Hub refused or was not reached; the earlier revision is as it was.
    """
    folder, say = Path(path), say or (lambda line: None)
    if not folder.is_dir():
        raise ValueError(f"path={str(path)!r}: expected an exported folder")
    if is_bundled(folder):
        raise ValueError(
            f"path={str(path)!r}: comes with pyrdiff, without code; expected an export of it, as "
            f"pyrdiff.hub.export(pyrdiff.load({folder.name!r}), folder) makes one"
        )
    measured = None if bench is None else card.read_bench(bench)
    for picture in pictures or []:
        if not Path(picture).is_file():
            raise ValueError(f"pictures: {str(picture)!r} is no file")
    say("checking the folder")
    checked = check(folder, max_megapixels=max_megapixels)
    if not checked.sound:
        raise ValueError(f"path={str(path)!r}: is not sound: {'; '.join(checked.problems)}")
    content = {file: folder / file for file in checked.files}
    shown = {}
    if pictures:
        shown = {Path(picture).name: Path(picture).stem.replace("_", " ") for picture in pictures}
        content |= {Path(picture).name: Path(picture) for picture in pictures}
    elif pictures is None:
        say("drawing samples for the card")
        content, shown = _with_samples(folder, content, max_megapixels)
    text = card.read(folder / "README.md") if "README.md" in content else "---\n{}\n---\n"
    filled = partial(card.fill, text, license=license, bench=measured, pictures=shown)
    content["README.md"] = filled(name=repo_id).encode()  # what it refuses, it refuses before anything is sent
    api, name = HfApi(token=token), repo_id
    if not dry_run:
        with _refusals(repo_id):
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
            before = api.repo_info(name, revision=revision)
        content["README.md"] = filled(name=name).encode()
    sizes = {
        file: len(source) if isinstance(source, bytes) else source.stat().st_size for file, source in content.items()
    }
    result = Push(name, dict(sorted(sizes.items())), [], content["README.md"].decode())
    if dry_run:
        return result

    operations = [
        CommitOperationAdd(file, io.BytesIO(source) if isinstance(source, bytes) else str(source))
        for file, source in sorted(content.items())
    ]
    earlier = [sibling.rfilename for sibling in before.siblings or []]
    result.deleted = [file for file in earlier if file not in content and file not in KEPT]
    operations += [CommitOperationDelete(file) for file in result.deleted]
    say(f"sending {len(content)} files, {sum(sizes.values()):,} bytes")
    with _refusals(name):
        commit = api.create_commit(
            name,
            operations,
            commit_message=commit_message or f"Upload {checked.pipeline} with pyrdiff",
            revision=revision,
            parent_commit=before.sha,
        )
    result.url, result.commit = commit.commit_url, commit.oid
    return result


def reserve(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """
    Makes the repository if it does not exist, so that a token that may not do so is met before hours of training.

    Returns:
        Its full name.

    Raises:
        OSError: if the Hub refused or was not reached.
    """
    with _refusals(repo_id):
        return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def _with_samples(folder: Path, content: dict, max_megapixels: float) -> tuple[dict, dict]:
    """The content with a row of samples, if the folder has none and its model generates."""
    shows = {SAMPLES: "Samples with seeds 0 to 7."}
    if SAMPLES in content:
        return content, shows
    pipeline = load(folder, max_megapixels=max_megapixels)
    if card.needs_image(type(pipeline)):
        return content, {}
    from diffusers.utils import make_image_grid

    pipeline.to(open_device()).set_progress_bar_config(disable=True)
    try:
        images = pipeline(8, generator=seeded(range(8), pipeline.device)).images
    except ValueError:  # some can be told not to generate, such as those of the paper's pixel-aware mode
        return content, {}
    picture = io.BytesIO()
    make_image_grid(images, 1, len(images)).save(picture, format="PNG")
    return {**content, SAMPLES: picture.getvalue()}, shows


@contextmanager
def _refusals(repo_id: str):
    """What the Hub answers, in one line."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r}: {' '.join(str(error).split())}") from error
    except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:  # the last for an upload that failed
        said = error.__cause__ if isinstance(error, RuntimeError) else error
        status = getattr(getattr(said, "response", None), "status_code", None)
        why = {
            401: "the token is missing or not accepted (hf auth login, or HF_TOKEN)",
            403: "the token may not write there",
            412: "it was changed meanwhile; what is there now was kept, push again",
        }.get(status, " ".join(str(error).split()))
        raise OSError(f"{repo_id}: {why}. Nothing was published.") from error
