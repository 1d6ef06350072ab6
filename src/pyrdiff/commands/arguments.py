"""
What the flags of all commands have in common, and how they are read.

A flag has the same name, the same short form and the same place in `--help` in every command: the tables below say
which. Settings are dataclasses; the tables go by the names of their fields, so that a new command, or a method of
another package, follows them without doing anything.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from pyrdiff.parts.settings import did_you_mean

POSITIONAL = {"model": "MODEL", "repo_id": "REPOSITORY"}  # given by their place or by their flags
SHORT = {  # few, and with one meaning everywhere
    "model": "-m",
    "input": "-i",
    "output": "-o",
    "num_images": "-n",
    "batch_size": "-b",
    "scale_factor": "-s",
    "plan": "-p",
}
RENAMED = {"output_dir": "output", "outscale": "scale_factor"}  # fields and flags of old, to the flag that is shown
GROUPS = {  # of --help; what is in none of them is the method's own
    "data": "model repo_id input generated reference low_res paired train_data_dir dataset_name dataset_config_name "
    "image_column array_key class_labels background on_bad_image cache_dir random_flip held_out_dir "
    "validation_data_dir degradation",
    "size": "resolution resolutions scale_factor width height patch_size image_channels tile tile_pad",
    "output": "output grid report suffix ext quality lossless frames skip_existing overwrite keep_going",
    "sampling": "adapter num_images plan budget_ms num_inference_steps refine_steps refine_strength num_passes classes "
    "guidance_scale guidance_interval guidance operator detail restore color_fix hard_consistency arguments",
    "measuring": "metrics features weights feature_weights lpips_network lpips_weights channels crop_border resamples "
    "per_class arms only runs tune tune_minutes target bench costs",
    "run": "batch_size train_batch_size seed device dtype half mixed_precision channels_last compile revision "
    "max_megapixels trust_remote_code update_code",
    "length": "minutes max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint init_from "
    "lora_rank save_images_steps eval_batch_size logging_steps report_to",
    "optimiser": "learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon "
    "max_grad_norm gradient_accumulation_steps use_ema ema_max_decay ema_inv_gamma ema_power keep_averages length at "
    "guide_at guide_length",
    "publishing": "private commit_message license pictures dry_run push_to_hub hub_model_id hub_private_repo "
    "data_description",
    "page": "host port open_browser",
    "method": "",
}
FRAME = re.compile("[│╭╮╰╯─]+|-{5,}")  # of tyro's messages: dashes where the encoding has no better
HINT = "(--help lists the flags)"

S = TypeVar("S")


class Given(NamedTuple):
    """What a user gave: flags, and values of positional arguments that a file has, which count less."""

    flags: list[str]
    from_file: dict[str, str]


def read(settings: type[S], description: str, args: list[str], prog: str | None = None) -> S:
    """
    Settings from flags, and from the file that `--config` names.

    Args:
        settings: Dataclass of the flags; its `__post_init__` checks their values.
        description: Text of `--help`. Its paragraph that begins with "Example:" is also the end of a message about
            what is missing.
        args: The flags.
        prog: How the command is called, for `--help`.

    Raises:
        ValueError: for an unknown flag, a missing or a bad value.
        SystemExit: after `--help`.
    """
    args = [_by_its_name(arg) for arg in args]
    _refuse_unknown(settings, args, prog)
    given = _with_file(settings, args)
    given = given._replace(flags=_with_true(settings, given.flags))
    return settings(**_read_flags(settings, description, given, prog))


def flag_of(name: str) -> str:
    """What the field of this name is called on the command line, without dashes."""
    return RENAMED.get(name, name)


def example_of(description: str) -> str | None:
    """The command in the paragraph of a description that begins with "Example:"."""
    found = re.search(r"^Example: (.+?)$", description, re.MULTILINE)
    return found and found[1]


# What tyro is asked.


def _read_flags(settings: type, description: str, given: Given, prog: str | None) -> dict:
    """The values of all flags, converted but not checked: tyro would put what `settings` says of them into a frame."""
    import tyro

    schema, complaint = _schema(settings, given), io.StringIO()
    config = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    try:
        with contextlib.redirect_stderr(complaint):
            values = tyro.cli(
                schema,
                prog=prog,
                args=given.flags,
                description=description.strip(),
                use_underscores=True,
                config=config,
            )
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_told(complaint.getvalue(), settings, description)) from None
        raise
    groups = [getattr(values, group.name) for group in fields(values)]
    return {name: value for group in groups for name, value in vars(group).items()}


def _schema(settings: type, given: Given) -> type:
    """The dataclass that tyro reads: the fields in their groups, with short forms, other names and their texts."""
    import tyro

    known, texts = get_type_hints(settings, include_extras=True), _texts(settings)
    by_group = {title: [] for title in GROUPS}
    for field in fields(settings):
        options = _options(field, given, texts.get(field.name, ""))
        entry = dataclasses.field(default=field.default, default_factory=field.default_factory)
        if field.name in given.from_file:
            entry = dataclasses.field(default=given.from_file[field.name])
        by_group[_group(field.name)].append((field.name, Annotated[(known[field.name], *options)], entry))
    parts = []
    for title, entries in by_group.items():
        if entries:
            kind = dataclasses.make_dataclass(title, entries, kw_only=True)
            parts.append((title, Annotated[kind, tyro.conf.arg(name=title, help="")]))
    return dataclasses.make_dataclass(settings.__name__, parts, kw_only=True)


def _options(field: dataclasses.Field, given: Given, text: str) -> list:
    """What tyro is told of a field."""
    import tyro

    flag = flag_of(field.name)
    short = SHORT.get(flag)
    hint = {"help_behavior_hint": ""} if field.default is None else {}
    if field.name not in POSITIONAL or _is_named(field.name, given.flags):
        return [tyro.conf.arg(name=flag, aliases=[short] if short else [], help=text, **hint)]
    text = f"{text} Also by {f'{short} or ' if short else ''}--{flag}."
    return [tyro.conf.Positional, tyro.conf.arg(help=text, metavar=POSITIONAL[field.name], **hint)]


def _is_named(name: str, flags: list[str]) -> bool:
    """Whether what could be given by its place was given by its flag."""
    forms = {f"--{name}", f"--{name.replace('_', '-')}", SHORT.get(name)}
    return any(arg.partition("=")[0] in forms for arg in flags)


def _group(name: str) -> str:
    """The title under which a flag is listed."""
    flag = flag_of(name)
    return next((title for title, names in GROUPS.items() if flag in names.split()), "method")


def _texts(settings: type) -> dict[str, str]:
    """{field: the text below it}, of the class and of those that it is made of."""
    texts = {}
    for kind in reversed(settings.__mro__):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, TypeError):  # a class of Python, or one whose source is not there
            continue
        for entry, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(entry, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[entry.target.id] = " ".join(str(below.value.value).split())
    return texts


def _told(message: str, settings: type, description: str) -> str:
    """tyro's message in one line: without title, frame and the advice that follows it; what is missing by its name."""
    _title, *lines = message.splitlines()
    sentence = " ".join(FRAME.sub(" ", " ".join(lines)).split())
    for advice in ("Argument helptext:", "For full helptext"):
        sentence = sentence.partition(advice)[0]
    sentence = re.sub(r"'\w+\.(\w+)'", lambda place: POSITIONAL.get(place[1], place[0]), sentence.strip())
    if sentence.startswith("Missing from"):
        needed = [field.name for field in fields(settings) if _is_needed(field)]
        labels = {name: POSITIONAL.get(name, f"--{flag_of(name)}") for name in needed}
        missing = [label for label in labels.values() if re.search(rf"(?<!\w){re.escape(label)}\b", sentence)]
        unknown = re.search(r"Unrecognized options: (.*)", sentence)
        sentence = f"missing: {', '.join(missing)}" + (f"; not understood: {unknown[1].strip()}" if unknown else "")
        example = example_of(description)
        sentence += f"; for example: {example}" if example else ""
    return f"{sentence} {HINT}"


def _is_needed(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


# What is given, made ready for that.


def _by_its_name(arg: str) -> str:
    """A flag of old by the name that it has now, such as `--output=x` for `--output-dir=x`."""
    name, separator, value = arg.partition("=")
    flag = RENAMED.get(name[2:].replace("-", "_")) if name.startswith("--") else None
    return f"--{flag}{separator}{value}" if flag else arg


def _refuse_unknown(settings: type, args: list[str], prog: str | None) -> None:
    """Refuses a flag that is none, and offers the nearest."""
    names = [flag_of(field.name) for field in fields(settings)]
    known = ["--help", "--config", "-h", *(f"--{name}" for name in names), *map(SHORT.get, names)]
    for arg in args:
        flag = arg.partition("=")[0].replace("-", "_").replace("_", "-", 2 if arg.startswith("--") else 1)
        if re.fullmatch(r"--\w+|-[A-Za-z]", flag) and flag not in known:
            near = did_you_mean(flag, [one for one in known if one and one.startswith("--")])
            raise ValueError(f"{flag}: no flag of {prog or 'this command'}{near} {HINT}")


def _with_file(settings: type, args: list[str]) -> Given:
    """`--config FILE` replaced by the flags in it; they come first, so that flags of the command line count more."""
    if "config" in {field.name for field in fields(settings)}:
        return Given(args, {})
    values, others, rest = {}, [], iter(args)
    for arg in rest:
        name, separator, path = arg.partition("=")
        if name != "--config":
            others.append(arg)
            continue
        path = path if separator else next(rest, None)
        if path is None:
            raise ValueError("--config: expected a YAML or JSON file")
        values |= _fields_of(settings, path)
    places = {name: str(value) for name, value in values.items() if name in POSITIONAL and value is not None}
    flags = [flag for name, value in values.items() if name not in places for flag in _as_flags(name, value)]
    return Given(flags + others, places)


def _fields_of(settings: type, path: str) -> dict[str, Any]:
    """What a file of settings holds, by the names of the fields."""
    known = {flag_of(field.name): field for field in fields(settings)}
    values = {}
    accepted = getattr(settings, "in_pictures", ())
    is_picture = accepted and path.lower().endswith(".png")
    for key, value in (_read_picture(path, accepted) if is_picture else _read_settings(path)).items():
        field = known.get(flag_of(key))
        if field is None:
            near = did_you_mean(key, known)
            raise ValueError(f"--config: {path} has the unknown key {key!r}; expected one of {sorted(known)}{near}")
        if value is None and field.default is not None:
            raise ValueError(f"--config: {path} has no value for {key!r}")
        values[field.name] = value
    return values


def _as_flags(name: str, value: Any) -> list[str]:
    """A value of a file of settings as flags."""
    if value is None:
        return []
    if isinstance(value, list):
        flags = [one for one in map(str, value) if one.startswith("--")]
        if flags:  # they would be read as such
            raise ValueError(f"--config: {flag_of(name)} has {flags[0]!r}; expected values")
        return [f"--{flag_of(name)}", *map(str, value)]
    return [f"--{flag_of(name)}={json.dumps(value) if isinstance(value, dict) else value}"]  # may begin with a dash


def _read_settings(path: str) -> dict:
    import yaml  # reads JSON, too

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"--config: {path!r} is nested too deeply; expected names and values") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path!r} cannot be read as YAML or JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path!r} holds a {type(values).__name__}; expected names and values")
    return values


def _read_picture(path: str, accepted: Sequence[str]) -> dict:
    from pyrdiff.commands.recipes import flags_in

    try:
        return flags_in(path, accepted)
    except ValueError as error:
        raise ValueError(f"--config: {error}") from error


def _with_true(settings: type, args: list[str]) -> list[str]:
    """A flag of yes or no may stand alone, also before a word with a place: `--use_ema` is `--use_ema True`."""
    has_places = any(field.name in POSITIONAL for field in fields(settings))
    switches = {f"--{field.name}" for field in fields(settings) if field.type in (bool, "bool", bool | None)}
    complete = []
    for arg, following in zip(args, [*args[1:], "--"], strict=False):
        complete.append(arg)
        alone = following.startswith("-") or (has_places and following not in ("True", "False"))
        if f"--{arg[2:].replace('-', '_')}" in switches and arg.startswith("--") and alone:
            complete.append("True")
    return complete
