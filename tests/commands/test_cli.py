"""pyrdiff: commands, --config, --json, exit codes, and plugins that fail."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import pyrdiff
from pyrdiff import cli, plugins
from pyrdiff.commands.evaluate import EvaluateSettings
from pyrdiff.commands.push import PushSettings
from pyrdiff.commands.sample import SampleSettings
from pyrdiff.commands.upscale import UpscaleSettings
from pyrdiff.methods.pddpm import METHOD, PyramidalSettings

SOURCE = Path(pyrdiff.__file__).parents[1]


def parsed(*args: str, settings: type = SampleSettings):
    return cli.parse(settings, "About.", [*map(str, args)])


def refused(capsys, *args: str, settings: type = SampleSettings) -> str:
    with pytest.raises(SystemExit) as stopped:
        parsed(*args, settings=settings)
    printed, complaint = capsys.readouterr()
    assert (stopped.value.code, printed, complaint.count("\n")) == (2, "", 1) and complaint.startswith("error: ")
    return complaint


HELP = """
import contextlib, io, json, sys
from pyrdiff import cli, plugins
for line in json.loads(sys.argv[1]):
    sys.argv = ["pyrdiff", *line]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main()
    slow = sorted({"torch", "diffusers", "accelerate", "transformers", "numpy", "PIL"} & set(sys.modules))
    print(json.dumps([line, said.getvalue(), slow]))
"""


def test_help_is_quick_and_imports_no_torch():
    lines = [[], ["--help"], ["--version"], ["train"], ["train", "pddpm", "--help"]]
    lines += [[name, "--help"] for name in cli.COMMANDS]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", HELP, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert seconds < 2 * len(lines), "a second or so each, however busy the machine is"
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line, *_ in rows] == lines
    for line, said, slow in rows:
        assert said and not slow, (line, said, slow)
    said = {" ".join(line): text for line, text, _ in rows}
    assert all(f"  {name} " in said["--help"] for name in cli.COMMANDS) and said[""] == said["--help"]
    assert all(flag in said["sample --help"] for flag in ("--num_images INT", "--skip_existing", "seeded with"))


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_config(tmp_path, name):
    values = dict(model="m", suffix="-large", outscale=2.5, keep_going=True, tile=None, guidance="none", seed=-1)
    text = {
        "a.json": json.dumps(values),
        "a.yaml": "# mine\nmodel: m\nsuffix: -large\noutscale: 2.5\nkeep_going: yes\ntile:\nguidance: none\nseed: -1\n",
    }[name]
    (tmp_path / name).write_text(text)
    rest = ["--input", "i", "--output", "o"]
    expected = UpscaleSettings(**values, input="i", output="o")
    assert parsed("--config", tmp_path / name, *rest, settings=UpscaleSettings) == expected
    assert parsed(*rest, f"--config={tmp_path / name}", settings=UpscaleSettings) == expected
    beside = ["--outscale", 3, "--keep_going", "False", "--suffix="]
    for flags in ([*beside, "--config", tmp_path / name], ["--config", tmp_path / name, *beside]):
        settings = parsed(*rest, *flags, settings=UpscaleSettings)
        assert (settings.outscale, settings.keep_going, settings.suffix) == (3, False, ""), "flags count more"
        assert settings.guidance == "none"


def test_lists_and_objects_of_a_config(tmp_path):
    (tmp_path / "a.yaml").write_text("model: m\nrefine_steps: [3, 2]\nresolutions: [8, 8x16]\narguments: {eta: 0}\n")
    settings = parsed("--config", tmp_path / "a.yaml")
    assert (settings.refine_steps, settings.resolutions) == ((3, 2), ("8", "8x16"))
    assert json.loads(settings.arguments) == {"eta": 0}
    assert parsed("--config", tmp_path / "a.yaml", "--refine_steps", 4).refine_steps == (4,)


def test_the_settings_of_a_training_are_a_config(tmp_path):
    """As the loop writes them into the run's folder."""
    settings = PyramidalSettings(
        train_data_dir="my images", resolution=("16", "24x32"), minutes=2.5, use_ema=False, channels_last=True,
        block_out_channels=(8, 16, 32), snr_gamma=5.0, learning_rate=1e-05, adam_epsilon=1e-08,
    )  # fmt: skip
    (tmp_path / "settings.json").write_text(json.dumps(asdict(settings), indent=2))
    assert parsed("--config", tmp_path / "settings.json", settings=PyramidalSettings) == settings


@pytest.mark.parametrize("text, said", [
    ("modle: m", "has the unknown key 'modle'; expected one of ['adapter', 'arguments', 'batch_size'"),
    ("model:", "has no value for 'model'"),
    ("[1, 2]", "holds a list; expected names and values"),
    ("model: [", "cannot be read as YAML or JSON"),
    ("[" * 3000, "is nested too deeply"),
    ('{"a":' * 3000, "is nested too deeply"),
    ("model: m\nnum_images: many", "'many'"),
    ("model: m\nnum_images: 0", "--num_images=0: expected 1 or more"),
    (None, "No such file"),
])  # fmt: skip
def test_a_config_that_is_no_good_is_one_line(tmp_path, capsys, text, said):
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    assert said in refused(capsys, "--config", tmp_path / "a.yaml")


def test_a_config_without_its_file(capsys):
    assert "--config: expected a YAML or JSON file" in refused(capsys, "--model", "m", "--config")


def test_flags_of_yes_and_no():
    for flags in (["--skip_existing"], ["--skip_existing", "True"], ["--skip-existing"], ["--skip_existing=True"]):
        assert parsed("--model", "m", *flags).skip_existing is True
        assert parsed(*flags, "--model", "m").skip_existing is True
    for flags in ([], ["--skip_existing", "False"], ["--skip_existing", "True", "--skip_existing", "False"]):
        assert parsed("--model", "m", *flags).skip_existing is False


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_flags_that_must_be_given_and_choices(capsys, monkeypatch, encoding):
    monkeypatch.setattr(type(sys.stdout), "encoding", encoding, raising=False)  # says what tyro draws its frame of
    assert refused(capsys) == "error: missing: MODEL (--help lists the flags)\n"
    said = refused(capsys, "--generated", "g", "--reference", "r", "--channels", "hsv", settings=EvaluateSettings)
    assert all(word in said for word in ("--channels", "hsv", "rgb", "y"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `main` with flags: exit code, stdout and stderr."""

    def call(*flags, main=cli.dispatch) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pyrdiff", *flags])
        code = 0
        try:
            cli.run(main)
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return call


def test_json(run):
    def command(args):
        print("words", args)
        return {"path": Path("a"), "value": 1.5, "exit_code": 1}

    assert run("--json", "x", main=command) == (
        1,
        '{\n "path": "a",\n "value": 1.5,\n "exit_code": 1\n}\n',
        "words ['x']\n",
    )
    assert run("x", main=command) == (1, "words ['x']\n", "")
    code, printed, _ = run("--version", "--json")
    assert code == 0 and json.loads(printed) == {"version": pyrdiff.__version__}


def test_an_unknown_command(run):
    code, printed, complaint = run("paint")
    assert (code, printed) == (2, "")
    assert complaint == f"error: command 'paint': expected one of {', '.join(cli.COMMANDS)}\n"
    code, _, complaint = run("train", "paint")
    assert code == 2 and complaint.startswith("error: method 'paint': expected one of [") and "pddpm" in complaint
    code, _, complaint = run("train", "--seed", "1")
    assert code == 2 and "pyrdiff train --seed: expected a method first" in complaint


@pytest.mark.parametrize("error, code", [
    (OSError(28, "No space left"), 2),
    (ImportError("needs lpips"), 2),
    (ValueError("a\nb"), 2),
    (KeyboardInterrupt(), 130),
])  # fmt: skip
def test_exit_codes(run, error, code):
    def command(args):
        raise error

    found, printed, complaint = run("--json", main=command)
    assert (found, printed) == (code, "") and complaint.count("\n") == (code == 2)
    assert run(main=lambda args: None) == run(main=lambda args: {"exit_code": 0}) == (0, "", "")


@pytest.mark.parametrize("flags, variable", [(["--debug"], "0"), ([], "1")])
def test_debugging_shows_the_traceback(run, monkeypatch, flags, variable):
    def command(args):
        if args == ["wrong"]:
            raise ValueError("a\nb")
        cli.parse(SampleSettings, "About.", ["--model", "m", "--num_images", "0"])

    monkeypatch.setenv("PYRDIFF_DEBUG", variable)
    for given, raiser in ((["wrong"], "in command"), ([], "in __post_init__")):
        code, printed, complaint = run(*given, *flags, main=command)
        first, *_, last = complaint.splitlines()
        assert (code, printed, first) == (2, "", "Traceback (most recent call last):")
        assert raiser in complaint and last.startswith("error: ")


BROKEN = {
    "raising": ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
    "leaving": ("import sys; sys.exit('good bye')", "SystemExit: good bye"),
    "text": ("METHOD = 'a method'", "broken_text:METHOD is a str; expected a pyrdiff.plugins.Method"),
    "pddpm": ("from pyrdiff.methods.pddpm import METHOD", "the name 'pddpm' is taken by the package pyrdiff"),
    "other": ("from pyrdiff.methods.pddpm import METHOD", "broken_other:METHOD has the name 'pddpm'"),
    "missing": ("", "AttributeError: module 'broken_missing' has no attribute 'METHOD'"),
}
GOOD = (
    "from dataclasses import replace\nfrom pyrdiff.methods.pddpm import METHOD\nMETHOD = replace(METHOD, name='fine')"
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """A folder with an installed package of broken plugins, and one with a good one."""
    folder = tmp_path_factory.mktemp("packages")
    modules = {"broken": {name: text for name, (text, _) in BROKEN.items()}, "good": {"fine": GOOD}}
    for package, texts in modules.items():
        info = folder / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        entries = "\n".join(f"{name} = {package}_{name}:METHOD" for name in texts)
        (info / "entry_points.txt").write_text(f"[pyrdiff.methods]\n{entries}\n")
        for name, text in texts.items():
            (folder / f"{package}_{name}.py").write_text(text + "\n")
    return folder


@pytest.fixture
def installed(packages, monkeypatch) -> None:
    """Both packages beside what is installed."""
    monkeypatch.syspath_prepend(str(packages))
    for cached in (plugins.plugins, plugins.classes):
        cached.cache_clear()
    yield
    for cached in (plugins.plugins, plugins.classes):
        cached.cache_clear()


def test_broken_plugins_are_named_with_their_reasons(installed, run):
    code, printed, complaint = run("plugins")
    assert (code, complaint) == (1, "")
    for name, (_, reason) in BROKEN.items():
        head = f"{name:<14}broken 1.2 (broken_{name})"
        assert f"{head}\n{'':<14}failed to load: {reason}" in printed, printed
    assert "fine          good 1.2 (good_fine)\n" in printed and "PyramidalPipeline" in printed
    assert f", {len(BROKEN)} failed\n" in printed

    code, printed, complaint = run("plugins", "--json")
    result = json.loads(printed)
    assert code == result["exit_code"] == 1
    assert {row["name"] for row in result["plugins"] if row["error"]} == set(BROKEN)
    first = result["plugins"][0]
    assert first["package"] == "pyrdiff" and "failed" in complaint


def test_broken_plugins_harm_no_other(installed, run):
    code, printed, complaint = run("train")
    assert (code, complaint) == (0, "")
    assert printed.count(METHOD.summary) == 2, "pddpm and the good plugin"
    assert "  raising       failed to load (pyrdiff plugins says why)\n" in printed
    code, printed, _ = run("train", "pddpm", "--help")
    assert code == 0 and "--ddpm_num_steps" in printed
    message = "error: method 'raising' of the package broken failed to load: RuntimeError: no luck\n"
    assert run("train", "raising") == (2, "", message)


@pytest.mark.parametrize("changes, said", [
    ({"model": "nowhere"}, "--model='nowhere': expected an exported folder"),
    ({"bench": "nowhere.json"}, "--bench='nowhere.json': expected a result of pyrdiff bench"),
    ({"pictures": ("nowhere.png",)}, "--pictures=('nowhere.png',): expected files"),
    ({"max_megapixels": 0}, "--max_megapixels=0: expected a number above 0"),
])  # fmt: skip
def test_push_checks_what_is_given_before_any_work(tmp_path, changes, said):
    with pytest.raises(ValueError) as caught:
        PushSettings(**{"model": str(tmp_path), "repo_id": "me/model", **changes})
    assert str(caught.value) == said
