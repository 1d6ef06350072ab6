"""A small Hugging Face Hub on the loopback interface, for tests. It is a test double of the wire protocol only: model
repositories, their commits and branches in memory. It has no git, Xet, redirects to another host, pull requests, tags,
rate limits or rights other than one token.

    with hub_server(token="hf_test") as hub:
        hub.put("someone/model", {"config.json": b"{}"})
        subprocess.run([sys.executable, "-c", CODE], env=hub.environment, check=True)
        assert hub.files("someone/model") == {"config.json": b"{}"}

huggingface_hub reads its environment when it is imported, and the suite runs offline. So the real client runs in a
SUBPROCESS with `env=hub.environment`, which is the whole environment: this process's, less its HF_* and with the Hub's
own. In this process only `HfApi(endpoint=hub.url, token=...)` works, and only once a test has set
`huggingface_hub.constants.HF_HUB_OFFLINE` to False and `huggingface_hub.constants.HF_HUB_DISABLE_XET` to True.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlencode

import yaml

USER = "tester"
DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".h5", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".zip")
LFS_SIZE = 10 * 2**20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    """Whether a file goes to the large file storage. An empty one never does."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_SIZE)


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool
    listing: Mapping = field(default_factory=dict)  # what the listing says instead of the truth

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else git_oid(self.data)

    def entry(self, path: str) -> dict:
        oid = git_oid(self.pointer if self.lfs else self.data)
        entry = {"type": "file", "oid": oid, "size": len(self.data), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {**entry, **self.listing}


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: Mapping[str, File]

    def entries(self) -> list[dict]:
        """What `git ls-tree -r -t` would list: every folder and file."""
        folders = {path[: end.start()] for path in self.files for end in re.finditer("/", path)}
        entries = [{"type": "directory", "oid": git_oid(name.encode()), "size": 0, "path": name} for name in folders]
        entries += [file.entry(path) for path, file in self.files.items()]
        return sorted(entries, key=lambda entry: entry["path"])


@dataclass
class Repository:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of the large file storage, by their SHA-256

    def find(self, revision: str) -> Commit:
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def commit(self, branch: str, title: str, files: Mapping[str, File]) -> Commit:
        commit = Commit(secrets.token_hex(20), self.branches.get(branch), title, files)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit


class Refused(Exception):
    """An answer other than 200; `more` goes into its body."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None, **more: str):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}
        header = message.encode("unicode_escape").decode()
        codes = {"X-Error-Code": code} if code else {}
        self.headers = {"X-Error-Message": header, **codes, **(headers or {})}


class Cut(ConnectionError):
    """The connection is to be closed without an answer."""


class Hub:
    """What a test sees of the server. A revision is a branch or a whole commit id."""

    def __init__(self, url: str, token: str, home: str):
        self.url, self.token = url, token
        self.page_size = 1000  # entries that one answer about a tree holds
        self.requests: list[tuple[str, str]] = []  # method and path as sent, the query included
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()
        self.upload_key = secrets.token_hex(8)  # uploads carry no token: their address is the secret
        self.uploads, self.cuts = 0, range(0)
        self.moves: set[str] = set()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
        self.environment: dict[str, str] = {
            **kept,
            **proxies,
            "HF_ENDPOINT": url,
            "HF_TOKEN": token,
            "HF_HOME": home,
            "HF_HUB_CACHE": os.path.join(home, "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }

    def head(self, repo_id: str, revision: str = "main") -> str:
        with self.lock:
            return self.repositories[repo_id].find(revision).oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self.lock:
            return {path: file.data for path, file in self.repositories[repo_id].find(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits that led to a revision, the newest first."""
        with self.lock:
            repository = self.repositories[repo_id]
            found = [repository.find(revision)]
            while found[-1].parent is not None:
                found.append(repository.commits[found[-1].parent])
            return found

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        revision: str = "main",
        private: bool = False,
        listing: Mapping[str, Mapping] | None = None,
    ) -> str:
        """Commits files under any names, such as "../evil.json" or "/etc/evil", to a branch and returns the commit id.

        The repository and the branch are made if need be; `private` counts only then. `listing` gives fields of a
        path's entry in the tree that replace the true ones: {"link": {"type": "symlink"}}, {"a": {"size": 1}}.
        """
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository(private))
            branch = repository.branches.get(revision)
            before = repository.commits[branch].files if branch else {}
            said = listing or {}
            added = {p: File(data, is_lfs(p, len(data)), said.get(p, {})) for p, data in files.items()}
            repository.objects.update({file.sha256: file.data for file in added.values() if file.lfs})
            return repository.commit(revision, "put", {**before, **added}).oid

    def cut_after(self, n: int, times: int = 1) -> None:
        """Drops the connection in the middle of the n-th upload (an object or a commit) from now; 1 is the next one.

        The client sends an object that was cut again, up to five times with pauses of 1, 2, 4, 8 and 8 seconds: only
        `times=6` makes it fail. It never repeats a commit.
        """
        with self.lock:
            self.cuts = range(self.uploads + n, self.uploads + n + times)

    def move_before_commit(self, repo_id: str) -> None:
        """Another commit, of moved.txt, lands on the branch just before the next commit to the repository is taken."""
        with self.lock:
            self.moves.add(repo_id)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def read_body(self, cut: bool) -> bytes:
        if "Transfer-Encoding" in self.headers:
            raise Cut  # the client always knows the length
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2 if cut else length)
        if cut or len(body) < length:
            raise Cut
        return body

    def send(self, status: int, body: bytes | dict | list = b"", headers: Mapping[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        common = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in {**common, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self) -> None:
        path, _, self.query = self.path.partition("?")
        wanted = "GET" if self.command == "HEAD" else self.command
        routes = ((re.fullmatch(pattern, path), action) for method, pattern, action in ROUTES if method == wanted)
        match, action = next(((match, action) for match, action in routes if match), (None, None))
        upload = action in (Handler.put_object, Handler.commit)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
            self.hub.uploads += upload
            cut = upload and self.hub.uploads in self.hub.cuts
        try:
            self.body = self.read_body(cut)
            with self.hub.lock:
                self.signed_in = self.check_token()
                if match is None:
                    raise Refused(404, "", "Sorry, we can't find the page you are looking for.")
                action(self, **{name: unquote(value) for name, value in match.groupdict(default="").items()})
        except Refused as refused:
            self.send(refused.status, refused.body, refused.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def check_token(self) -> bool:
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return authorization is not None

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        hidden = repository is None or repository.private
        if not self.signed_in and (hidden or write):
            # The Hub gives no code when it is only the right to write that lacks; there the client takes every 401 at
            # an https address for RepoNotFound, so that is what makes it do the same here.
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if repository is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repository

    # The calls. Each holds the lock, so a commit is taken whole or not at all.

    def whoami(self) -> None:
        if not self.signed_in:
            raise Refused(401, "", "Invalid username or password.")
        token = {"displayName": "test", "role": "write", "createdAt": DATE}
        auth = {"type": "access_token", "accessToken": token}
        self.send(200, {"type": "user", "id": "0" * 24, "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def validate_yaml(self) -> None:
        card = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", json.loads(self.body)["content"], re.DOTALL)
        errors, warnings = [], []
        try:
            if card is None or not yaml.safe_load(card[1]):
                warnings = [{"message": "empty or missing yaml metadata in repo card"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def create(self) -> None:
        if not self.signed_in:
            raise Refused(401, "", "Invalid username or password.")
        wish = json.loads(self.body)
        if wish.get("type", "model") != "model":
            raise Refused(400, "", "This Hub has models only.")
        repo_id = f"{wish.get('organization') or USER}/{wish['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise Refused(409, "", "You already created this model repo", url=url)
        repository = self.hub.repositories[repo_id] = Repository(wish.get("visibility") == "private")
        repository.commit("main", "initial commit", {".gitattributes": File(GIT_ATTRIBUTES, False)})
        self.send(200, {"url": url, "name": repo_id, "private": repository.private})

    def create_branch(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        start = repository.find(json.loads(self.body or b"{}").get("startingPoint", "main"))
        if revision in repository.branches:
            raise Refused(409, "", f"Reference already exists: refs/heads/{revision}")
        repository.branches[revision] = start.oid
        self.send(200, {})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id)
        commit = repository.find(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in parse_qs(self.query):
            for sibling, (path, file) in zip(siblings, commit.files.items(), strict=True):
                entry = file.entry(path)
                sibling.update(size=entry["size"], blobId=entry["oid"])
                if file.lfs:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
        names = {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit.oid}
        state = {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        times = {"createdAt": DATE, "lastModified": DATE}
        self.send(200, {**names, **state, **times, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str, path: str) -> None:
        entries = self.repository(repo_id).find(revision).entries()
        query = parse_qs(self.query)
        if path:
            entries = [entry for entry in entries if entry["path"].startswith(path + "/")]
            if not entries:
                raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        if query.get("recursive", ["false"])[0].lower() != "true":
            depth = path.count("/") + 1 if path else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth]
        start = int(query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        headers = {}
        if end < len(entries):
            more = urlencode({**{name: values[0] for name, values in query.items()}, "cursor": end})
            headers["Link"] = f'<{self.hub.url}{self.path.partition("?")[0]}?{more}>; rel="next"'
        self.send(200, entries[start:end], headers)

    def paths_info(self, repo_id: str, revision: str) -> None:
        entries = self.repository(repo_id).find(revision).entries()
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.send(200, [entry for entry in entries if entry["path"] in wanted])

    def refs(self, repo_id: str) -> None:
        branches = self.repository(repo_id).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches]
        self.send(200, {"branches": listed, "converts": [], "tags": [], "pullRequests": []})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self.repository(repo_id).find(revision)
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, "EntryNotFound", "Entry not found", headers={"X-Repo-Commit": commit.oid})
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.oid, "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        self.send(200, file.data, headers)

    def preupload(self, repo_id: str, revision: str) -> None:
        commit = self.repository(repo_id, write=True).find(revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(asked["path"], asked["size"]) else "regular"
            there = commit.files.get(asked["path"])
            known = {} if there is None else {"oid": there.etag}
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        self.send(200, {"files": answers, "commitOid": commit.oid})

    def batch(self, repo_id: str) -> None:
        repository = self.repository(repo_id, write=True)
        answers = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repository.objects:
                name = f"{quote(repo_id)}/{asked['oid']}"
                upload = {"href": f"{self.hub.url}/upload/{self.hub.upload_key}/{name}"}
                verify = {"href": f"{self.hub.url}/{quote(repo_id)}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self.send(200, {"transfer": "basic", "objects": answers})

    def put_object(self, key: str, repo_id: str, oid: str) -> None:
        if key != self.hub.upload_key or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(403, "", "The signature or the checksum does not match.")
        self.hub.repositories[repo_id].objects[oid] = self.body
        self.send(200)

    def verify(self, repo_id: str) -> None:
        asked = json.loads(self.body)
        data = self.repository(repo_id, write=True).objects.get(asked["oid"])
        if data is None or len(data) != asked["size"]:
            raise Refused(404, "", "Object does not exist or has another size")
        self.send(200, {})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        if repository.find(revision).oid != repository.branches.get(revision) or "create_pr" in self.query:
            raise Refused(400, "", "A commit goes to a branch.")
        if repo_id in self.hub.moves:
            self.hub.moves.discard(repo_id)
            moved = {"moved.txt": File(secrets.token_hex(4).encode(), False)}
            repository.commit(revision, "moved", {**repository.find(revision).files, **moved})
        head = repository.find(revision)
        (key, header), *operations = ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines()))
        if key != "header" or not header.get("summary"):
            raise Refused(400, "", "The first line is the header with a summary.")
        if not head.oid.startswith(header.get("parentCommit", "").lower()):
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for key, value in operations:
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in repository.objects:
                    raise Refused(400, "", f"LFS pointer pointed to a file that does not exist: {path}")
                files[path] = File(repository.objects[value["oid"]], True)
            elif key == "copyFile":
                source = repository.find(value.get("srcRev") or revision).files.get(value["srcPath"])
                if source is None:
                    raise Refused(404, "EntryNotFound", f"No file to copy: {value['srcPath']}")
                files[path] = source
            elif key in ("deletedFile", "deletedFolder"):
                gone = [path] if key == "deletedFile" else [p for p in files if p.startswith(path.rstrip("/") + "/")]
                if not gone or not files.keys() >= set(gone):
                    kind = "file" if key == "deletedFile" else "folder"
                    raise Refused(404, "EntryNotFound", f"A {kind} with this name doesn't exist: {path}")
                files = {p: file for p, file in files.items() if p not in gone}
            else:
                raise Refused(400, "", f"Unknown operation: {key}")
        made = repository.commit(revision, header["summary"], files)
        url = f"{self.hub.url}/{repo_id}/commit/{made.oid}"
        self.send(200, {"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})


ID, REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{ID}/branch/{REVISION}", Handler.create_branch),
    ("POST", f"/api/models/{ID}/preupload/{REVISION}", Handler.preupload),
    ("POST", f"/api/models/{ID}/commit/{REVISION}", Handler.commit),
    ("POST", f"/api/models/{ID}/paths-info/{REVISION}", Handler.paths_info),
    ("GET", f"/api/models/{ID}", Handler.info),
    ("GET", f"/api/models/{ID}/revision/{REVISION}", Handler.info),
    ("GET", f"/api/models/{ID}/tree/{REVISION}(/(?P<path>[^/]+))?", Handler.tree),
    ("GET", f"/api/models/{ID}/refs", Handler.refs),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{ID}\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", f"/upload/(?P<key>[^/]+)/{ID}/(?P<oid>[^/]+)", Handler.put_object),
    ("GET", f"/{ID}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)


@contextmanager
def hub_server(token: str = "hf_test") -> Iterator[Hub]:
    """Serves an empty Hub for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="pyrdiff-test-hub-") as home:
        with ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {})) as server:
            server.daemon_threads = True
            hub = Hub(f"http://127.0.0.1:{server.server_port}", token, home)
            server.RequestHandlerClass.hub = hub
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            try:
                yield hub
            finally:
                server.shutdown()
                thread.join()
