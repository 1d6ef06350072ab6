"""Saving a pipeline together with its code, so that diffusers alone can load it."""

import inspect
import json
import os
from pathlib import Path

import torch
from huggingface_hub import create_repo

from pyrdiff.parts.sources import MODULES, KeepsSource, auto_map, keep_source, source_of, standalone_text
from pyrdiff.parts.weights import refuse_unusable
from pyrdiff.parts.wrappers import plain


class StandaloneSaving(KeepsSource):
    """
    Put in front of `DiffusionPipeline`: saved folders carry the code of the pipeline and of its components, and
    `from_pretrained` of an installed class needs none of it.
    """

    def register_modules(self, **components):
        """As stock; also reads the code of components that keep none themselves, before its file is replaced."""
        super().register_modules(**components)
        for cls in self._classes_with_code(components).values():
            keep_source(cls)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """
        Saves a folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads wherever diffusers
        is installed. It is the stock folder, with a source file for this class and for each component that is not part
        of diffusers, and with an index and configs that name these files. The arguments are those of
        `DiffusionPipeline`.

        Raises:
            ValueError: if a class is of a script or an interactive session, if a network is inside adapters or what
                distributes it, or if its weights are not finite; nothing was written then.
        """
        check_bare(self.components)
        refuse_unusable(self.components.items(), "Nothing was saved.")
        classes = self._classes_with_code(self.components)
        texts = {name: standalone_text(cls) for name, cls in classes.items()}  # raises before anything is written
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        for name, cls in classes.items():
            (folder / name / f"{source_of(cls).stem}.py").write_text(texts[name], encoding="utf-8", newline="\n")
        self._name_code(folder, classes)
        if push_to_hub:
            private, token = hub_arguments.pop("private", None), hub_arguments.get("token")
            repo_id = hub_arguments.pop("repo_id", folder.name)
            repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
            self._upload_folder(folder, repo_id, **hub_arguments)

    def _classes_with_code(self, components: dict[str, object]) -> dict[str, type]:
        """The classes that are not of diffusers by the folder that they are saved in, "" for the pipeline's own."""
        classes = {"": type(self)}
        for name, component in components.items():
            if component is not None:
                classes[name] = type(plain(component) if isinstance(component, torch.nn.Module) else component)
        stock = ("diffusers", "transformers")
        return {name: cls for name, cls in classes.items() if cls.__module__.split(".")[0] not in stock}

    def _name_code(self, folder: Path, classes: dict[str, type]) -> None:
        """Writes the names of the source files to index and configs, and takes out where the pipeline came from."""
        for path in [folder / self.config_name, *folder.glob("*/*config.json")]:
            config = json.loads(path.read_text(encoding="utf-8"))
            config = {key: value for key, value in config.items() if key not in ("_name_or_path", "_module")}
            if path.name == self.config_name:
                config |= index_entries(type(self), classes)
            elif issubclass(classes.get(path.parent.name, object), torch.nn.Module):
                config["auto_map"] = auto_map(classes[path.parent.name])
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load_config(cls, *args, **kwargs):
        """
        As stock, but an index that names source files of the folder (see `save_pretrained`) is read as naming the
        installed classes of the same names. `from_pretrained` of this class then runs no code from the folder and needs
        no trust flag. Of a folder of another pipeline, only what this one takes is read.
        """
        config = super().load_config(*args, **kwargs)
        index = config[0] if isinstance(config, tuple) else config
        stem = cls.__module__.rpartition(".")[2]
        if index.get("_class_name") not in (cls.__name__, [stem, cls.__name__]):
            takes = inspect.signature(cls.__init__).parameters
            for name in [name for name in index if name not in takes and not name.startswith("_")]:
                del index[name]
        for name, value in index.items():
            if isinstance(value, (list, tuple)) and [type(item) for item in value] == [str, str]:
                here, pyrdiff = cls.__module__.split(".")[0], "pyrdiff"
                module = MODULES.get((here, *value)) or MODULES.get((pyrdiff, *value))
                if module is not None:
                    index[name] = value[1] if name == "_class_name" else [module, value[1]]
        return config


def check_bare(components: dict[str, object]) -> None:
    """Refuses networks with anything around them but what compiles: it would be saved in their place."""
    for name, component in components.items():
        inside = getattr(component, "_orig_mod", component)
        if getattr(inside, "peft_config", None) and inside is plain(inside):
            raise ValueError(
                f"{name}: expected it without adapters, to save it; `pyrdiff.hub.merge_adapters(pipeline)` adds them "
                "to its weights, and `unload_lora()` takes them out"
            )
        if isinstance(inside, torch.nn.Module) and inside is not plain(inside):
            raise ValueError(
                f"{name}={type(inside).__name__}: expected the {type(plain(inside)).__name__} inside, to save it; with "
                "adapters of PEFT, `merge_and_unload()` gives it with them"
            )


def index_entries(pipeline_class: type, classes: dict[str, type]) -> dict[str, object]:
    """
    What the index of a folder says of the code in it.

    Args:
        pipeline_class: The pipeline's class.
        classes: The classes that have code in the folder, by component; "" for the pipeline.

    Returns:
        [file, class] of each, and the `auto_map` of the first network: diffusers' `AutoModel` reads that of the index,
        whatever subfolder it is asked for. Other networks it loads from their own folder, by the `auto_map` there.
    """
    entries = {name or "_class_name": [source_of(cls).stem, cls.__name__] for name, cls in classes.items()}
    for name in inspect.signature(pipeline_class.__init__).parameters:
        if issubclass(classes.get(name, object), torch.nn.Module):
            return {**entries, "auto_map": auto_map(classes[name])}
    return entries
