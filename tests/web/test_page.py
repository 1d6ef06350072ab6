"""The served page against clients that are no browser of its user: what they say, and where they think they are."""

import json
import socket
import urllib.error
import urllib.parse
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from pyrdiff import CoordinateUNet2DModel, GuidedSRPipeline, PyramidalPipeline
from pyrdiff.web.models import Models
from pyrdiff.web.session import Session

if find_spec("gradio") is None:
    pytest.skip("the page needs gradio: pip install 'pyrdiff[demo]'", allow_module_level=True)

OUTSIDE = ("a/../../outside", "/../../outside", "../../outside", "a\\..\\..\\outside", "..", "\x00", "x" * 5000, "é/\n")


class Client:
    """Plain HTTP to the page."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def upload(self, picture: Path) -> str:
        """The path of the uploaded file on the server."""
        head = f'--mark\r\nContent-Disposition: form-data; name="files"; filename="{picture.name}"\r\n'
        body = f"{head}Content-Type: image/png\r\n\r\n".encode() + picture.read_bytes() + b"\r\n--mark--\r\n"
        code, answer = self.ask("gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=mark"})
        assert code == 200, answer
        return json.loads(answer)[0]

    def call(self, function: int, session: str, data: list) -> str:
        """What the server says of a call of one of the page's functions."""
        body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
        code, answer = self.ask("gradio_api/queue/join", body, **{"Content-Type": "application/json"})
        if code != 200:
            return answer.decode()
        return self.ask(f"gradio_api/queue/data?session_hash={urllib.parse.quote(session)}")[1].decode()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder around that of uploads and results."""
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def client(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("GRADIO_TEMP_DIR", str(place / "deep" / "temp"))
        from pyrdiff.web import page, server

        torch.manual_seed(0)
        unet = CoordinateUNet2DModel(
            resolutions=(8, 16), block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        scheduler = DDPMScheduler()
        session = Session(PyramidalPipeline(unet, scheduler), GuidedSRPipeline(unet, scheduler))
        blocks = page.build(Models.of(session))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = server.options()
        _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, **options)
        yield Client(url)
        blocks.close()


def upscale_function(client: Client) -> tuple[int, dict[str, int]]:
    """The number of the page's function that enlarges, and its inputs: {label: place}."""
    config = json.loads(client.ask("config")[1])
    parts = {part["id"]: part["props"] for part in config["components"]}
    for function in config["dependencies"]:
        if parts.get(function["targets"][0][0], {}).get("value") == "Enlarge":
            return function["id"], {parts[each].get("label"): at for at, each in enumerate(function["inputs"])}
    raise AssertionError("no function enlarges")


def enlarge(client: Client, session: str, file: dict) -> str:
    """What the server says when this file is to be enlarged."""
    number, places = upscale_function(client)
    fields = {"Picture, up to 64 MB": file, "Scale factor": 2, "Tile size": 64, "Seed": 0, "Lock": True, "Plan": ""}
    data = [None] * len(places)
    for label, value in {**fields, "refine_steps": 2}.items():
        data[places[label]] = value
    return client.call(number, session, data)


def test_what_a_client_says_does_not_become_a_path(client, place):
    picture = place / "deep" / "mine.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    uploaded = {"path": client.upload(picture), "meta": {"_type": "gradio.FileData"}}
    before = {path for path in place.rglob("*") if not path.is_relative_to(place / "deep" / "temp")}
    for session in ("plain", *OUTSIDE):
        said = enlarge(client, session, uploaded)
        assert session != "plain" or "_8x8.png" in said, said
    saved = [path.relative_to(place / "deep" / "temp") for path in place.rglob("*_8x8.png")]
    assert len({path.parts[0] for path in saved if path.parts[0].startswith("results-")}) > 3
    assert {path for path in place.rglob("*") if not path.is_relative_to(place / "deep" / "temp")} == before


def test_files_of_the_server_are_not_read(client, place):
    (place / "secret.png").write_bytes(b"secret")
    for path in (str(place / "secret.png"), "/etc/passwd", "../secret.png"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        said = enlarge(client, "other", file)
        assert "_8x8.png" not in said and "root:" not in said
        assert client.ask(f"gradio_api/file={urllib.parse.quote(path)}")[0] in (403, 404)


def test_the_page_answers_to_its_own_names_only(client):
    port = urllib.parse.urlsplit(client.url).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", "[::1]", f"127.0.0.2:{port}"):
        assert client.ask("config", Host=host)[0] == 200, host
    others = (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
    )
    for host in (*others, "[", "evil.example@127.0.0.1:x", "0.0.0.0", socket.gethostname() + ".evil.example"):
        assert client.ask("config", Host=host)[0] == 400, host
    assert client.ask("gradio_api/queue/join", b"{}", Host="evil.example")[0] == 400


@pytest.mark.parametrize(
    ("bound", "known", "unknown"),
    [
        ("127.0.0.1", ["127.0.0.1:1", "localhost", "[::1]:1"], ["10.0.0.1", "machine.example", "evil.example"]),
        ("::1", ["[::1]:7860", "localhost"], ["[2001:db8::1]", "evil.example"]),
        ("0.0.0.0", ["10.0.0.1:7860", "localhost", socket.gethostname(), "[2001:db8::1]"], ["evil.example", ""]),
        ("studio.example", ["studio.example:80", "10.0.0.1", "localhost"], ["evil.example", "x.studio.example"]),
    ],
)  # fmt: skip
def test_names_of_a_server(bound, known, unknown):
    from pyrdiff.web.server import _OwnNames

    names = _OwnNames(None, bound)
    assert all(map(names.knows, known)) and not [host for host in unknown if names.knows(host)]


def test_the_page_may_load_from_itself_alone(client):
    with urllib.request.urlopen(client.url, timeout=120) as answer:
        policy, text = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    assert "fonts.googleapis" not in text.split("<body")[1]
