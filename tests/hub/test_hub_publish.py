"""Publishing with the real client (R15): what is pushed is pulled with the same pixels, or nothing has changed."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import warm
import yaml
from safetensors.torch import load_file

import pyrdiff
from pyrdiff import hub

GENERATE = ("pyramidal", "stock", "parallel")
EXAMPLES = Path(pyrdiff.__file__).parents[2] / "examples"
PUSH = "attempt(lambda: hub.push(folder, repo, **options).commit)"
BENCH = {
    "kind": "pyrdiff bench",
    "model": {"name": "model", "revision": None},
    "reference": {"name": "letters", "images": 64},
    "conventions": {"count": 64, "interval": "95 %", "time": "median of 5"},
    "device": "a CPU",
    "threads": 1,
    "load": 0.5,
    "seed": 0,
    "versions": {"pyrdiff": "0.1.0"},
    "arms": {
        "quick": {
            "arguments": {"plan": "quick"},
            "yardstick": False,
            "network_calls": 5,
            "nfe_eq": 2.5,
            "ms_per_image": 12.34,
            "latency_ms": 20.1,
            "metrics": {"fid": {"value": 31.25, "interval": [30.0, 32.5], "higher_is_better": False}},
        },
        "DDIM 50 at full size": {
            "arguments": {},
            "yardstick": True,
            "network_calls": 50,
            "nfe_eq": 50.0,
            "ms_per_image": 99.0,
            "latency_ms": 120.0,
            "metrics": {"fid": {"value": "inf", "interval": None, "higher_is_better": False}},
        },
    },
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_pixels(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Weights at another place in memory may change the last bit of a convolution, never a pixel."""
    return torch.allclose(first, second, atol=1e-5) and torch.equal((first * 255).round(), (second * 255).round())


def card_of(text: str) -> tuple[dict, str]:
    """A card's metadata and its text."""
    head, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, flags=re.DOTALL).groups()
    return yaml.safe_load(head), text


@pytest.fixture
def changed(exports, tmp_path) -> Path:
    """The export "pyramidal" with other weights, in shards."""
    pipeline = pyrdiff.load(exports["pyramidal"])
    with torch.no_grad():
        for value in pipeline.unet.parameters():
            value.add_(0.01)
    return hub.export(pipeline, tmp_path / "changed", max_shard_size="40KB", license="mit")


@pytest.mark.parametrize("name", ["pyramidal", "stock", "guided", "residual", "parallel"])
def test_what_is_pushed_is_pulled_with_the_same_pixels(
    server, client, elsewhere, exports, pipelines, sample, tmp_path, name
):
    repo = f"me/{name}"
    (pushed,) = client(PUSH, folder=exports[name], repo=repo, options={})
    assert pushed == ["", server.head(repo)]

    # One commit, of the folder, the samples and the card.
    assert [commit.title for commit in server.commits(repo)][1:] == ["initial commit"]
    own, there = contents(exports[name]), server.files(repo)
    added = {".gitattributes"} | ({"samples.png"} if name in GENERATE else set())
    assert set(there) == set(own) | added
    assert [file for file in own if own[file] != there[file]] == ["README.md"]
    data, text = card_of(there["README.md"].decode())
    assert f'DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True)' in text
    assert f'pyrdiff.load("{repo}")' in text and "PATH_OR_REPO" not in text
    assert ("![" in text) == (name in GENERATE)
    assert data["library_name"] == "diffusers" and data["license"] == "mit" and "pyrdiff" in data["tags"]
    task = "unconditional-image-generation" if name in GENERATE else "image-to-image"
    assert data["pipeline_tag"] == task

    # Pulled with and without pyrdiff.
    loads = {"client": "pyrdiff.load(repo)", "elsewhere": "DiffusionPipeline.from_pretrained(repo, **trust)"}
    expected = sample(pipelines[name])
    assert expected.std() > 0.01
    for place, run in (("client", client), ("elsewhere", elsewhere)):
        target = tmp_path / f"{place}.pt"
        code = f"pipeline = {loads[place]}\ntorch.save(sample(pipeline), target)\nsay('pyrdiff' in str(type(pipeline)))"
        assert run(code, repo=repo, target=target, trust={"trust_remote_code": True}) == [place == "client"]
        assert same_pixels(torch.load(target), expected), place


def test_a_second_push_leaves_the_new_files_only(server, client, exports, changed):
    repo = "me/again"
    assert client(PUSH, folder=changed, repo=repo, options={})[0][0] == ""
    assert len([file for file in server.files(repo) if file.endswith(".safetensors")]) > 2
    server.put(repo, {"old/leftover.bin": b"old"})
    code = "done = hub.push(folder, repo)\nsay(done.deleted)\nsay(done.files)\nsay(done.url)"
    deleted, files, url = client(code, folder=exports["pyramidal"], repo=repo)
    there = server.files(repo)
    assert set(there) == set(contents(exports["pyramidal"])) | {".gitattributes", "samples.png"}
    assert files == {file: len(data) for file, data in there.items() if file != ".gitattributes"}
    gone = set(contents(changed)) - set(contents(exports["pyramidal"])) | {"old/leftover.bin"}
    assert set(deleted) == gone and len(server.commits(repo)) == 4 and url.endswith(server.head(repo))
    # Nothing new: nothing breaks.
    assert client(PUSH, folder=exports["pyramidal"], repo=repo, options={})[0][0] == ""
    assert server.files(repo) == there


def test_a_dry_run_lists_what_a_push_sends(server, client, exports):
    before, repo = len(server.requests), "me/dry"
    code = "done = hub.push(folder, repo, dry_run=dry)\nsay(done.files)\nsay([done.url, done.commit])"
    files, nothing = client(code, folder=exports["parallel"], repo=repo, dry=True)
    assert len(server.requests) == before and repo not in server.repositories and nothing == [None, None]
    sent, made = client(code, folder=exports["parallel"], repo=repo, dry=False)
    assert files == sent and made[1] == server.head(repo)


def test_a_push_that_is_cut_changes_nothing(server, client, exports, changed):
    """In every upload, and in the commit; the client's pauses before it tries again are left out."""
    earlier, kept = contents(exports["pyramidal"]), "unet/diffusion_pytorch_model.safetensors"
    uploads = len([file for file in contents(changed) if file.endswith(".safetensors")])
    assert uploads >= 2
    load = "say(float(pyrdiff.load(repo).unet.conv_in.weight.sum()))"
    weight = float(load_file(exports["pyramidal"] / kept)["conv_in.weight"].sum())
    client("slept, time.sleep = time.sleep, lambda seconds: None")
    for place in range(1, uploads + 2):
        repo = f"me/cut-{place}"
        server.put(repo, earlier)
        head, commit = server.head(repo), place > uploads
        server.cut_after(place, times=1 if commit else 10**6)
        ((kind, said),) = client(PUSH, folder=changed, repo=repo, options={"pictures": []})
        server.cut_after(1, times=0)
        assert kind == "OSError" and said.startswith(f"{repo}: ") and "\n" not in said, said
        assert server.head(repo) == head and server.files(repo) == earlier
        assert client(load, repo=repo) == [pytest.approx(weight, abs=1e-5)]
        # Once more: it is published.
        assert client(PUSH, folder=changed, repo=repo, options={"pictures": []}) == [["", server.head(repo)]]
        assert set(server.files(repo)) == set(contents(changed))
        assert client(load, repo=repo) != [pytest.approx(weight, abs=1e-3)]
    client("time.sleep = slept")


def test_a_token_that_is_not_accepted(server, client, exports):
    server.put("me/theirs", {"README.md": b"theirs"})
    head, folder = server.head("me/theirs"), exports["residual"]
    for repo in ("me/refused", "me/theirs"):
        ((kind, said),) = client(PUSH, folder=folder, repo=repo, options={"token": "hf_wrong"})
        assert kind == "OSError" and "the token is missing or not accepted" in said and "\n" not in said
        assert "hf_wrong" not in said and said.startswith(f"{repo}: ")
    assert "me/refused" not in server.repositories and server.head("me/theirs") == head
    ((kind, said),) = client(
        "attempt(lambda: hub.reserve('me/refused', token='hf_wrong'))".replace("hub.", "publishing.")
    )
    assert kind == "OSError" and "me/refused" not in server.repositories
    for repo in ("me/a/b", "", "me/..", "a b"):
        ((kind, said),) = client(PUSH, folder=folder, repo=repo, options={})
        assert kind == "ValueError" and "repo_id" in said and "\n" not in said


def test_a_branch_that_moved_meanwhile_is_kept(server, client, exports):
    repo = "me/moved"
    assert client(PUSH, folder=exports["residual"], repo=repo, options={})[0][0] == ""
    before = server.files(repo)
    server.move_before_commit(repo)
    ((kind, said),) = client(PUSH, folder=exports["guided"], repo=repo, options={})
    assert kind == "OSError" and said.startswith(f"{repo}: it was changed meanwhile") and "\n" not in said
    there = server.files(repo)
    assert there == {**before, "moved.txt": there["moved.txt"]}
    assert client(PUSH, folder=exports["guided"], repo=repo, options={})[0][0] == ""


def test_another_branch(server, client, exports):
    repo = "me/branches"
    options = {"commit_message": "First", "private": True}
    assert client(PUSH, folder=exports["residual"], repo=repo, options=options)[0][0] == ""
    assert server.repositories[repo].private and server.commits(repo)[0].title == "First"
    before = server.files(repo)
    assert client(PUSH, folder=exports["guided"], repo=repo, options={"revision": "v2"})[0][0] == ""
    assert server.files(repo) == before and "pipeline_guided_sr.py" in server.files(repo, "v2")
    assert not [file for file in server.files(repo, "v2") if "residual" in file]
    code = "say([type(pyrdiff.load(repo, revision=branch)).__name__ for branch in (None, 'v2')])\n"
    code += "attempt(pyrdiff.load, repo, token=False)"
    kinds, refused = client(code, repo=repo)
    assert kinds == ["ResidualSRPipeline", "GuidedSRPipeline"]
    assert refused[0] == "ValueError" and repo in refused[1] and "\n" not in refused[1]


def test_a_bench_is_shown_on_the_card(server, client, exports, tmp_path):
    repo, bench = "me/bench", tmp_path / "bench.json"
    bench.write_text(json.dumps(BENCH))
    picture = tmp_path / "before_and_after.png"
    picture.write_bytes(b"\x89PNG")
    options = {"bench": bench, "license": "apache-2.0", "pictures": [picture]}
    assert client(PUSH, folder=exports["guided"], repo=repo, options=json.loads(json.dumps(options, default=str))) == [
        ["", server.head(repo)]
    ]
    data, text = card_of(server.files(repo)["README.md"].decode())
    assert "Not measured" not in text and "| quick |" in text and "| DDIM 50 at full size (yardstick) |" in text
    assert "31.2 [30.0, 32.5]" in text and "![before and after](before_and_after.png)" in text
    assert server.files(repo)["before_and_after.png"] == picture.read_bytes()
    assert data["license"] == "apache-2.0"
    (result,) = data["model-index"][0]["results"]
    assert data["model-index"][0]["name"] == repo and result["task"]["type"] == "image-to-image"
    assert result["metrics"][0]["type"] == "fid" and result["metrics"][0]["value"] == 31.25
    for wrong in ("{}", "[1]", "no JSON", json.dumps({"kind": "pyrdiff bench"})):
        bench.write_text(wrong)
        ((kind, said),) = client(PUSH, folder=exports["guided"], repo="me/no-bench", options={"bench": str(bench)})
        assert kind == "ValueError" and "bench" in said and "\n" not in said
    assert "me/no-bench" not in server.repositories


def test_a_check_of_a_repository(server, client, exports):
    repo = "me/checked"
    client(PUSH, folder=exports["parallel"], repo=repo, options={})
    server.put("me/damaged", {**server.files(repo), "notes.txt": b"notes"})
    code = "import subprocess\nchecking.subprocess = subprocess  # a new interpreter\n"
    code += "found = hub.check(repo)\nsay(vars(found))\nchecking.subprocess = warm.Forks\n"
    code += "say(hub.check('me/damaged').problems)\nattempt(hub.check, 'me/checked', update_code=True)\n"
    found, problems, refused = client(code, repo=repo)
    assert found["loads"] and found["loads_elsewhere"] and not found["problems"] and not found["notes"]
    assert found["pipeline"] == "ParallelTrajectoryPipeline" and found["commit"] == server.head(repo)
    assert found["files"] == {file: len(data) for file, data in server.files(repo).items()}
    assert problems == ["notes.txt: is no part of the model"]
    assert refused[0] == "ValueError" and "no local folder" in refused[1]


COMMAND = """
import contextlib, io
from pyrdiff.cli import main
for flags in asked["values"]["runs"]:
    sys.argv, out, err, code = ["pyrdiff", *flags], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    said.append([code, out.getvalue(), err.getvalue()])
"""


def test_the_commands(server, client, exports, tmp_path):
    folder, repo = str(exports["guided"]), "me/command"
    broken = tmp_path / "broken"
    broken.mkdir()
    runs = [
        ["push", folder, repo, "--dry_run", "--json"],
        ["push", folder, repo, "--private", "--license", "apache-2.0"],
        ["push", folder, repo, "--revision", "v2", "--json"],
        ["check", repo, "--json"],
        ["check", folder],
        ["check", repo, "--revision", "none"],
        ["check", str(broken), "--json"],
        ["push", str(broken), repo],
        ["push", str(tmp_path / "missing"), repo],
        ["push", folder],
        ["check", "me/nothing"],
    ]
    said = client(COMMAND, runs=runs)
    codes, outs, errs = zip(*said, strict=True)
    assert codes == (0, 0, 0, 0, 0, 2, 1, 2, 2, 2, 2), said
    dry, pushed, checked = (json.loads(outs[index]) for index in (0, 2, 3))
    assert dry["url"] is None and dry["files"] == pushed["files"] and pushed["commit"] == server.head(repo, "v2")
    assert server.repositories[repo].private and server.head(repo) in outs[1]
    assert checked["sound"] and checked["commit"] == server.head(repo)
    assert "loads with pyrdiff: yes, without: yes" in outs[4] and outs[4].endswith("sound\n")
    assert json.loads(outs[6])["sound"] is False and "model_index.json: no such file" in errs[6]
    for code, text in zip(codes, errs, strict=True):
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == (code == 2), text


# A training.


def train(server, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    flags = dict(
        train_data_dir="glyphs", output_dir=folder, image_channels=1, preset="tiny", max_train_steps=2,
        train_batch_size=2, save_images_steps=0, mixed_precision="no", push_to_hub=True,
        hub_model_id="me/letters", checkpointing_steps=1,
    )  # fmt: skip
    words = ["--resolution", "8", "16", "--block_out_channels", "8", "16", "32"]
    words += [f"--{name}={value}" for name, value in flags.items()]
    environment = {**server.environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return warm.run(EXAMPLES / "train_pddpm.py", *words, env=environment, cwd=folder.parent)


def test_a_training_publishes(server, client, tmp_path):
    done = train(server, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    there = contents(tmp_path / "run" / "pipeline")
    assert set(server.files("me/letters")) == set(there) | {".gitattributes", "samples.png"}
    assert server.head("me/letters") in done.stdout
    code = "say(type(pyrdiff.load('me/letters')).__name__)"
    assert client(code) == ["PyramidalPipeline"]


def test_a_training_with_a_wrong_token_does_not_start(server, tmp_path):
    before = set(server.repositories)
    done = train(server, tmp_path / "run", HF_TOKEN="hf_wrong")
    assert done.returncode == 2 and "the token is missing or not accepted" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("checkpoint-*")) and set(server.repositories) == before


# Types of weights.


def test_types_of_weights(exports, sample, tmp_path):
    folder = exports["pyramidal"]
    loaded = pyrdiff.load(folder, torch_dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.unet.parameters()} == {torch.bfloat16}
    assert sample(loaded).isfinite().all()
    half = tmp_path / "half"
    pyrdiff.load(folder).to(torch.float16).save_pretrained(half)
    loaded = pyrdiff.load(half)
    assert {value.dtype for value in loaded.unet.parameters()} == {torch.float32}
    assert sample(loaded).isfinite().all()
    both = tmp_path / "both"
    pyrdiff.load(folder).save_pretrained(both)
    pyrdiff.load(half).to(torch.float16).save_pretrained(both, variant="fp16")
    loaded = pyrdiff.load(both, variant="fp16", torch_dtype=torch.float16)
    assert {value.dtype for value in loaded.unet.parameters()} == {torch.float16}
    (both / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors: no such file"):
        pyrdiff.load(both)
    with pytest.raises(ValueError, match="diffusion_pytorch_model.fp16.safetensors: no such file"):
        pyrdiff.load(folder, variant="fp16")
    shards = tmp_path / "shards"
    pyrdiff.load(folder).to(torch.float16).save_pretrained(shards, variant="fp16", max_shard_size="10KB")
    assert len(list((shards / "unet").glob("*fp16*.safetensors"))) > 1
    assert type(pyrdiff.load(shards, variant="fp16")) is type(loaded)
    assert os.listdir(folder)
