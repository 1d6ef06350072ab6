"""The real client of the Hub, in processes of its own, against the test double of the wire protocol."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import warm
from hub_server import Hub, hub_server

REPO = "someone/model"
CLIENT = """
import json
import sys
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, HfApi, hf_hub_download, snapshot_download

api, repo = HfApi(), "someone/model"

def say(value):
    print(json.dumps(value, default=str))

def attempt(call, *arguments, **keywords):
    try:
        say(["", str(call(*arguments, **keywords))])
    except Exception as error:
        say([type(error).__name__, str(error)])

def add(path, data):
    return CommitOperationAdd(path, data.encode())
"""
UPLOAD = "attempt(api.upload_folder, repo_id=repo, folder_path=sys.argv[1])"


def client(hub: Hub, code: str, *arguments, **environment: str) -> list:
    """What the code said, run where the real client is `api`."""
    environment = {**hub.environment, **environment}
    done = warm.run(f"{CLIENT}\n{code}", *arguments, without=[], env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def read(folder: str | Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def uploads(hub: Hub) -> list[str]:
    return [path.rpartition("/")[2] for method, path in hub.requests if method == "PUT"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server(token="hf_test") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (folder / "empty.txt").touch()
    (folder / "a name, ü.json").write_text('{"a": 1}')
    (folder / "unet/weights.safetensors").write_bytes(os.urandom(2**20))
    return folder


def test_a_repository_is_created_once(hub):
    code = """
say(api.whoami()["name"])
for exist_ok in (True, True, False):
    attempt(api.create_repo, repo, exist_ok=exist_ok)
say(api.list_repo_files(repo))
"""
    name, *created, again, files = client(hub, code)
    assert name == "tester" and created == [["", f"{hub.url}/{REPO}"]] * 2
    assert again[0] == "HfHubHTTPError" and "409" in again[1] and "You already created this model repo" in again[1]
    assert files == [".gitattributes"] and len(hub.commits(REPO)) == 1


def test_an_uploaded_folder_comes_back_byte_for_byte_and_unchanged_files_make_no_commit(hub, folder):
    code = f"""
api.create_repo(repo)
{UPLOAD}
{UPLOAD}
say(snapshot_download(repo))
say({{f.path: f.lfs and f.lfs.sha256 for f in api.list_repo_tree(repo, recursive=True) if hasattr(f, "lfs")}})
say(hf_hub_download(repo, "a name, ü.json", local_dir=sys.argv[2]))
"""
    first, second, snapshot, listed, single = client(hub, code, folder, folder.parent / "local")
    expected = read(folder)
    got = read(snapshot)
    got.pop(".gitattributes")
    assert got == expected and Path(single).read_bytes() == expected["a name, ü.json"]
    assert first == second == ["", f"{hub.url}/{REPO}/commit/{hub.head(REPO)}"]
    assert Path(snapshot).name == hub.head(REPO)
    assert [path for path, sha in listed.items() if sha] == ["unet/weights.safetensors"]
    assert uploads(hub) == [listed["unet/weights.safetensors"]]
    assert [commit.title for commit in hub.commits(REPO)] == ["Upload folder using huggingface_hub", "initial commit"]


def test_patterns_delete_and_all_of_it_is_one_commit(hub, folder):
    hub.put(REPO, {"old.json": b"{}", "unet/old.bin": b"old", ".gitattributes": b""})
    before = hub.head(REPO)
    client(hub, "api.upload_folder(repo_id=repo, folder_path=sys.argv[1], delete_patterns='*')", folder)
    assert hub.files(REPO) == {**read(folder), ".gitattributes": b""}
    assert [commit.oid for commit in hub.commits(REPO)][1:] == [before]


def test_a_branch_keeps_its_own_commits(hub):
    start = hub.put(REPO, {"a": b"1"})
    code = """
api.create_branch(repo, branch="more/work")
attempt(api.create_branch, repo, branch="more/work", exist_ok=True)
attempt(api.create_branch, repo, branch="more/work")
attempt(api.create_branch, repo, branch="other", revision="nowhere")
api.create_commit(repo, [add("b", "2")], commit_message="b", revision="more/work")
say({ref.name: ref.target_commit for ref in api.list_repo_refs(repo).branches})
say(api.model_info(repo, revision=sys.argv[1]).sha)
attempt(api.create_commit, repo, [add("c", "3")], commit_message="c", revision="nowhere")
attempt(snapshot_download, repo, revision="nowhere")
attempt(hf_hub_download, repo, "c", revision="more/work")
"""
    kept, again, lost, branches, sha, commit, snapshot, entry = client(hub, code, start)
    assert kept == ["", "None"] and again[0] == "HfHubHTTPError" and "409" in again[1]
    assert lost[0] == commit[0] == snapshot[0] == "RevisionNotFoundError" and entry[0] == "RemoteEntryNotFoundError"
    assert branches == {"main": start, "more/work": hub.head(REPO, "more/work")} and sha == start
    assert hub.files(REPO) == {"a": b"1"} and hub.files(REPO, "more/work") == {"a": b"1", "b": b"2"}


def test_a_commit_on_a_moved_branch_is_refused_whole(hub):
    code = """
for _ in range(2):
    parent = api.model_info(repo).sha
    operations = [add("a", "mine"), add("w.bin", "weights")]
    attempt(api.create_commit, repo, operations, commit_message="mine", parent_commit=parent)
"""
    start = hub.put(REPO, {"a": b"1"})
    hub.move_before_commit(REPO)
    (error, message), (again, _) = client(hub, code)
    assert error == "HfHubHTTPError" and "412" in message and "A commit has happened since" in message
    mine, moved, first = hub.commits(REPO)  # the branch moved once only
    assert not again and mine.title == "mine" and hub.files(REPO)["a"] == b"mine"
    assert first.oid == start and set(moved.files) == {"a", "moved.txt"} and moved.files["a"].data == b"1"


def test_a_wrong_token_and_none_change_nothing(hub):
    hub.put(REPO, {"a": b"1"})
    code = """
for token in ("hf_wrong", False):
    api = HfApi(token=token)
    attempt(api.create_repo, "someone/other")
    attempt(api.create_branch, repo, branch="b")
    attempt(api.create_commit, repo, [add("w.bin", "weights")], commit_message="w")
    attempt(api.snapshot_download, repo)
"""
    *wrong, create, branch, commit, snapshot = client(hub, code)
    assert [error for error, _ in wrong] == ["HfHubHTTPError"] * 4
    assert all("401" in text and "Invalid credentials in Authorization header" in text for _, text in wrong)
    assert create[0] == "HfHubHTTPError" and branch[0] == commit[0] == "RepositoryNotFoundError"
    assert read(snapshot[1]) == {"a": b"1"}
    assert list(hub.repositories) == [REPO] and len(hub.commits(REPO)) == 1 and not uploads(hub)


def test_a_private_repository_is_not_found_without_a_token(hub):
    code = """
api.create_repo(repo, private=True)
api.create_commit(repo, [add("w.bin", "w")], commit_message="w")
for api in (HfApi(token=False), HfApi()):
    attempt(api.model_info, repo)
    attempt(api.snapshot_download, repo)
    attempt(api.hf_hub_download, repo, "w.bin")
    attempt(api.snapshot_download, "someone/missing")
"""
    errors = [error for error, _ in client(hub, code)]
    assert errors == ["RepositoryNotFoundError"] * 4 + ["", "", "", "RepositoryNotFoundError"]


def test_a_cut_commit_leaves_the_old_revision_and_a_rerun_lands(hub, folder):
    before = hub.put(REPO, {"a": b"1"})
    hub.cut_after(2)
    [(error, _)] = client(hub, UPLOAD, folder)
    assert error == "RemoteProtocolError" and hub.head(REPO) == before
    assert client(hub, UPLOAD, folder)[0][0] == "" and hub.files(REPO) == {"a": b"1", **read(folder)}
    assert len(uploads(hub)) == 1  # the object had arrived the first time


def test_a_cut_object_is_sent_again_until_the_client_gives_up(hub, folder):
    before = hub.put(REPO, {"a": b"1"})
    impatient = f"import time\ntime.sleep = lambda seconds: None\n{UPLOAD}"
    hub.cut_after(1, times=6)
    [(error, message)] = client(hub, impatient, folder)
    assert (error, message) == ("RuntimeError", "Error while uploading 'unet/weights.safetensors' to the Hub.")
    assert hub.head(REPO) == before and not hub.repositories[REPO].objects and len(uploads(hub)) == 6
    hub.cut_after(1)
    assert client(hub, impatient, folder)[0][0] == "" and len(uploads(hub)) == 8
    assert hub.files(REPO) == {"a": b"1", **read(folder)}


def test_copies_and_folders_deleted(hub):
    hub.put(REPO, {"w.bin": b"weights", "old/a": b"1", "old/b": b"2"})
    code = """
from huggingface_hub import CommitOperationDelete
operations = [CommitOperationCopy("w.bin", "new/w.bin"), CommitOperationCopy("old/a", "new/a")]
api.create_commit(repo, [*operations, CommitOperationDelete("old/")], commit_message="move")
attempt(api.delete_file, "old/a", repo)
attempt(api.create_commit, repo, [add("README.md", "---\\na: [\\n---\\n")], commit_message="card")
"""
    deleted, card = client(hub, code)
    assert hub.files(REPO) == {"w.bin": b"weights", "new/w.bin": b"weights", "new/a": b"1"}
    assert deleted[0] == "RemoteEntryNotFoundError" and "A file with this name doesn't exist" in deleted[1]
    assert card[0] == "ValueError" and "Invalid metadata in README.md" in card[1]


def test_hostile_names_are_served_as_they_are(hub):
    names = ["../evil.json", "a/../../b", "/etc/evil", "C:\\evil", "a//b", "./c", "line\nbreak", "fine.json"]
    listing = {"fine.json": {"size": 10**12}, "link": {"type": "symlink"}}
    hub.put(REPO, {**{name: name.encode() for name in names}, "link": b"/etc/passwd"}, listing=listing)
    hub.page_size = 2
    code = """
for name, path in json.loads(sys.argv[1]).items():
    attempt(snapshot_download, repo, allow_patterns=name, local_dir=path)
say({f.path: f.size for f in api.list_repo_tree(repo, recursive=True) if hasattr(f, "size")})
"""
    folders = {name: os.path.join(hub.environment["HF_HOME"], "x", str(i)) for i, name in enumerate(names[:4])}
    *refused, sizes = client(hub, code, json.dumps(folders))
    assert [error for error, _ in refused] == ["ValueError"] * 4
    assert sizes.pop("fine.json") == 10**12 and sizes == {name: len(name.encode()) for name in names[:-1]}
    assert sum("/tree/" in path and "cursor" in path for _, path in hub.requests) >= 5
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    for name in (*names[:-1], "link"):
        path = name if name != "line\nbreak" else "line%0Abreak"
        connection.request("GET", f"/{REPO}/resolve/main/{path}", headers={"Authorization": "Bearer hf_test"})
        assert connection.getresponse().read() == hub.files(REPO)[name]
    connection.close()


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([{"key": "copyFile", "value": {"path": "b", "srcPath": "a"}}], 200),
        ([{"key": "deletedFile", "value": {"path": "a"}}, {"key": "deletedFile", "value": {"path": "none"}}], 404),
        ([{"key": "lfsFile", "value": {"path": "w", "oid": "0" * 64, "size": 1}}], 400),
        ([{"key": "unknown", "value": {"path": "w"}}], 400),
    ],
)
def test_a_commit_is_taken_whole_or_not_at_all(hub, lines, status):
    before = hub.put(REPO, {"a": b"1"})
    change = {"path": "a", "content": "Mg==", "encoding": "base64"}
    lines = [{"key": "header", "value": {"summary": "raw"}}, {"key": "file", "value": change}, *lines]
    body = b"\n".join(json.dumps(line).encode() for line in lines)
    headers = {"Authorization": f"Bearer {hub.token}"}
    request = urllib.request.Request(f"{hub.url}/api/models/{REPO}/commit/main", body, headers)
    try:
        answered = urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        answered = error.code
    assert answered == status
    assert hub.files(REPO) == ({"a": b"2", "b": b"1"} if status == 200 else {"a": b"1"})
    assert (hub.head(REPO) == before) == (status != 200) and hub.files(REPO, before) == {"a": b"1"}


def test_the_client_of_this_process_works_once_it_is_told_to(hub, monkeypatch):
    api = huggingface_hub.HfApi(endpoint=hub.url, token=hub.token)
    hub.put(REPO, {"a": b"1"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        api.model_info(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="w.bin", repo_id=REPO)
    assert hub.files(REPO) == {"a": b"1", "w.bin": b"weights"}


def test_the_environment_reaches_nothing_else(monkeypatch):
    proxy = "http://192.0.2.1:1"
    for name in ("https_proxy", "HTTP_PROXY", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, proxy)
    with hub_server(token="hf_own") as hub:
        environment = {**os.environ, **hub.environment}
        assert not environment["https_proxy"] and not environment["HTTP_PROXY"]
        assert environment["HF_HUB_OFFLINE"] == "0" and environment["HF_TOKEN"] == "hf_own"
        assert "HF_TOKEN_PATH" not in hub.environment
        assert client(hub, 'say(api.whoami()["name"])') == ["tester"]
    assert not os.path.exists(hub.environment["HF_HOME"])
    with pytest.raises(urllib.error.URLError):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(hub.url, timeout=5)
