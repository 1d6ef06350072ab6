"""The code of a class, kept from the moment that the class is made."""

import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

STANDS_ALONE = "# Written by pyrdiff; stands alone."  # in the first two lines of a file that was joined
OWN_IMPORT = re.compile(r"^from\s+([\w.]+)\s+import", re.MULTILINE)
# By these patterns diffusers looks for files that it would have to bring along, in strings and comments too.
RELATIVE_IMPORT = re.compile(r"^\s*(import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)
MODULES: dict[tuple[str, str, str], str] = {}  # (package, stem, class): the module that defines the class


class SourceFile(NamedTuple):
    """A file, and its text as it was when it was read."""

    path: str
    text: str


class Source(NamedTuple):
    """The module of a class; {module: file} of it and of those of its own package, or pyrdiff's, that it imports."""

    module: str
    files: dict[str, SourceFile]

    @property
    def stem(self) -> str:
        return self.module.rpartition(".")[2]


class KeepsSource:
    """
    Put in front of `ModelMixin` or `SchedulerMixin`, so that a saved folder carries the code of the class as it was
    when the class was made. Later the file may be another: diffusers writes the code of every folder that it loads to
    the same place, and a package may be updated while a training runs.

    Set `RETIRED` to names of settings that earlier versions saved and this one no longer takes: they are passed over.
    """

    RETIRED: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        keep_source(cls)
        package, stem = cls.__module__.split(".")[0], cls.__module__.rpartition(".")[2]
        MODULES[package, stem, cls.__name__] = cls.__module__

    def register_to_config(self, **settings) -> None:
        """As stock, with numbers of numpy as those of Python, which a config is saved with."""
        super().register_to_config(**{name: _without_numpy(value) for name, value in settings.items()})

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As stock; `auto_map` in a saved config is for diffusers' `AutoModel` and says nothing to the class."""
        passed_over = ("auto_map", *cls.RETIRED)
        config_dict = {name: value for name, value in config_dict.items() if name not in passed_over}
        return super().extract_init_dict(config_dict, **kwargs)


def _without_numpy(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_numpy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    return value.item() if isinstance(value, np.generic) else value


def keep_source(cls: type) -> None:
    """Keeps the code of a class with it, if that was not done before and there is a file."""
    if "_kept_source" not in vars(cls):
        cls._kept_source = _read_source(cls.__module__)


def _read_source(module: str) -> Source | None:
    files, waiting = {}, [module]
    own_packages = {module.split(".")[0], "pyrdiff"}
    while waiting:
        name = waiting.pop()
        path = getattr(sys.modules.get(name), "__file__", None)
        if name in files or path is None or not path.endswith(".py") or not Path(path).is_file():
            continue
        text = Path(path).read_text(encoding="utf-8")
        files[name] = SourceFile(path, text)
        if STANDS_ALONE not in text.split("\n")[:2]:
            waiting += [other for other in OWN_IMPORT.findall(text) if other.split(".")[0] in own_packages]
    return Source(module, files) if module in files else None


def source_of(cls: type) -> Source:
    """
    The kept code of a class.

    Raises:
        ValueError: if the class is of a script or of an interactive session. A folder would carry the whole script,
            with whatever else is in it.
    """
    keep_source(cls)
    if cls.__module__ == "__main__" or cls._kept_source is None:
        raise ValueError(
            f"{cls.__name__} is defined in {cls.__module__}, expected a class of a module with a file of its own: "
            "a saved folder carries that file"
        )
    return cls._kept_source


def standalone_text(cls: type) -> str:
    """
    The text of a file that has the class and all that it needs of its own package and of pyrdiff.

    Raises:
        ValueError: if there is no such file, or it cannot be joined with what it imports.
    """
    source = source_of(cls)
    path, text = source.files[source.module]
    if len(source.files) > 1:
        # Not an import statement: the exporter would follow it, and the joined files, which never come here, are used
        # where pyrdiff is not installed. A class comes here only if it imports modules of pyrdiff or of its package.
        text = importlib.import_module("pyrdiff.hub.standalone").join(source)
    relative = RELATIVE_IMPORT.search(text)
    if relative:
        raise ValueError(f"{path}: {relative[0].strip()!r}: expected no line that looks like a relative import")
    return text


def auto_map(cls: type) -> dict[str, str]:
    """What diffusers' `AutoModel` reads in a network's config to find its class in the folder."""
    return {"AutoModel": f"{source_of(cls).stem}.{cls.__name__}"}
