"""Where a model is: a local folder, a model that comes with pyrdiff, or a repository on the Hub."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

import pyrdiff

from .messages import in_one_line

BUNDLED = Path(pyrdiff.__file__).parent / "pretrained"  # a folder for each model that comes with the package
LARGEST_CONFIG = 16 * 2**20  # bytes; pipelines keep their plans in it


def bundled() -> list[str]:
    """Names of the models that come with the package, as `pyrdiff.load` takes them."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{DiffusionPipeline.config_name}"))


def local_folder(path_or_repo: str | os.PathLike) -> Path | None:
    """
    The folder that a user means; None if it is a repository on the Hub.

    Raises:
        ValueError: if it is neither.
    """
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    if str(path_or_repo) in bundled():
        return BUNDLED / str(path_or_repo)
    if Path(path_or_repo).exists() or str(path_or_repo).count("/") != 1:
        raise ValueError(
            f"path_or_repo={str(path_or_repo)!r}: expected a folder or a repository such as 'user/name'"
            + (f", or one of {bundled()}" if bundled() else "")
        )
    return None


def is_bundled(folder: Path) -> bool:
    """Whether a folder is that of a model that comes with the package, which is kept there without code."""
    return folder.resolve().parent == BUNDLED.resolve()


def public_name(place: str | os.PathLike) -> str:
    """What others may know a model by: its name, its repository, or its folder without the path to it."""
    if not Path(place).exists():
        return str(place)
    folder = Path(place).resolve()
    return folder.parent.name if folder.name in ("pipeline", "adapter") else folder.name


@dataclass
class Repository:
    """
    A repository on the Hub.

    Args:
        repo_id: Its name, "user/name".
        revision: The commit, whatever is pushed meanwhile; offline, the revision that was asked for.
        sizes: {path: bytes} of its files; None offline.
        token, cache_dir: For the download.
    """

    repo_id: str
    revision: str | None
    sizes: dict[str, int | None] | None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "Repository":
        """
        Finds the commit and the files of a revision.

        Raises:
            ValueError: if it cannot be read, or if a path would lie outside of a folder.
        """
        if local_files_only or constants.HF_HUB_OFFLINE:
            return cls(repo_id, revision, None, token, cache_dir)
        with hub_errors(repo_id):
            info = HfApi().repo_info(repo_id, revision=revision, files_metadata=True, token=token)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
        for path in sizes:
            steps = PurePosixPath(path).parts
            if path.startswith("/") or "\\" in path or ".." in steps or not steps:
                raise ValueError(f"{repo_id}: has the file {path!r}; expected names inside a folder")
        return cls(repo_id, info.sha, sizes, token, cache_dir)

    def fetch(self, patterns: Iterable[str]) -> Path:
        """The local folder, with the files that match one of the patterns in it."""
        with hub_errors(self.repo_id):
            folder = snapshot_download(
                self.repo_id,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                allow_patterns=list(patterns),
                local_files_only=self.sizes is None,
            )
        return Path(folder)

    def configs(self) -> list[str]:
        """
        Patterns of the JSON files of a model.

        Raises:
            ValueError: if one of them is too large for a config.
        """
        if self.sizes is None:
            return ["*.json"]
        paths = [path for path in self.sizes if re.fullmatch(r"([^/]+/)?[^/]+\.json", path)]
        for path in paths:
            if (self.sizes[path] or 0) > LARGEST_CONFIG:
                raise ValueError(
                    f"{self.repo_id}/{path}: has {self.sizes[path]} bytes; expected at most {LARGEST_CONFIG}"
                )
        return [glob.escape(path) for path in paths]

    def weights(self, parameters: dict[str, int]) -> list[str]:
        """
        Patterns of the weight files of networks.

        Args:
            parameters: {folder of a network, "" for the repository itself: how many numbers it has by its config}.

        Raises:
            ValueError: if the files of a network are far larger than it.
        """
        if self.sizes is None:
            return [f"{name}/*.safetensors".lstrip("/") for name in parameters]
        wanted = []
        for name, count in parameters.items():
            paths = [path for path in self.sizes if re.fullmatch(rf"{name}/[^/]+\.safetensors".lstrip("/"), path)]
            size, most = sum(self.sizes[path] or 0 for path in paths), 16 * count + 2**21
            if size > most:
                raise ValueError(
                    f"{self.repo_id}/{name}: has {size} bytes of .safetensors; expected at most {most} for its config"
                )
            wanted += [glob.escape(path) for path in paths]
        return wanted


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Raises what the Hub's client raises as one `ValueError` that says what was asked for."""
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
        raise ValueError(
            f"path_or_repo={repo_id!r}: neither a folder nor a repository that can be read: {in_one_line(error)}"
        ) from error
