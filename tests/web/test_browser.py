"""`pyrdiff demo` as a user meets it: a page in headless Chromium, from a free port of the loopback address."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from test_session import huge_png

from pyrdiff import CoordinateUNet2DModel, PyramidalPipeline, hub

pytestmark = pytest.mark.slow
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("driving a browser needs chromium and chromedriver", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="driving a browser needs selenium")
if find_spec("gradio") is None:  # imported by the page's process only
    pytest.skip("the page needs gradio: pip install 'pyrdiff[demo]'", allow_module_level=True)

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1360,1000",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "about:blank",
)  # fmt: skip
RUN = "from pyrdiff.cli import main; main()"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    unet = CoordinateUNet2DModel(
        resolutions=(8, 16), block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    plans = {"fast": {"num_inference_steps": 3, "refine_steps": 2}, "long": {"num_inference_steps": 1000}}
    return hub.export(PyramidalPipeline(unet, DDPMScheduler(), plans=plans), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """(url, port, process id) of a running page; it must end cleanly on SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", RUN, "demo", "--model", str(model), "--port", str(port), "--device", "cpu"]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}/"
        until(lambda: f"open {url}" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield url, port, process.pid
        assert "Traceback" not in log.read_text(), log.read_text()
        process.terminate()
        assert process.wait(120) == 143
    finally:
        process.kill()


def until(condition, tries: int = 3000):
    """What the condition gives, once it is true; it is asked ten times a second at most."""
    for _ in range(tries):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError(f"still not true when asked for the {tries}th time")


class Browser:
    """The page in Chromium."""

    def __init__(self, url: str, folder: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(folder / "saved")})
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.get(url)
        until(lambda: self.shown("button[role=tab]"))

    def shown(self, selector: str) -> list:
        return [each for each in self.driver.find_elements("css selector", selector) if each.is_displayed()]

    def press(self, text: str, selector: str = "button:not([role=tab])") -> None:
        def found():
            return [each for each in self.shown(selector) if each.text == text and each.rect["height"] > 10]

        button = until(found)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def choose(self, text: str) -> None:
        self.shown("input[role=combobox]")[-1].click()
        until(lambda: [each for each in self.shown("[role=option]") if text in each.text])[0].click()

    def drop(self, path: Path) -> None:
        script = "return arguments[0].closest('[role=tabpanel]').offsetParent !== null"
        inputs = self.driver.find_elements("css selector", "input[type=file]")
        next(each for each in inputs if self.driver.execute_script(script, each)).send_keys(str(path))

    @property
    def status(self) -> str:
        found = self.driver.execute_script(
            "return [...document.querySelectorAll('.status')].filter(e => e.offsetParent).map(e => e.innerText)"
        )
        return found[0].strip() if found else ""

    def clear(self) -> None:
        until(lambda: self.shown("button[aria-label=Clear]"))[0].click()
        until(lambda: self.status == "")

    def screenshot(self, name: str) -> None:
        if folder := os.environ.get("PYRDIFF_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def requests(self) -> list[str]:
        """What was asked for over a network since the last call."""
        events = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated")]
        urls = [each["request"]["url"] if "request" in each else each["url"] for each in sent]
        return [url for url in urls if url.startswith(("http", "ws", "ftp"))]


@pytest.fixture
def browser(server, tmp_path):
    browser = Browser(server[0], tmp_path / "profile")
    yield browser
    browser.driver.quit()


def listening(port: int) -> list[str]:
    """The addresses at which something listens on a port, as the kernel writes them."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.split(":")[1], 16) == port:
                found.append(address.split(":")[0])
    return found


def test_a_session(server, browser, tmp_path):
    url, port, process = server
    assert listening(port) == ["0100007F"]
    tabs = [tab.text for tab in browser.shown("button[role=tab]")]
    assert tabs == ["Generate", "Upscale", "Compare plans"]
    browser.screenshot("1-start")

    # Generate: one row a level, four images in each.
    browser.press("Generate")
    until(lambda: browser.status.startswith("5 network calls"))
    rows = [row.text.split("\n") for row in browser.shown(".pyr-row")]
    assert [row[:3] for row in rows] == [["8×8", "3 calls", "0.75 NFE-eq"], ["16×16", "2 calls", "2.00 NFE-eq"]]
    assert len(browser.shown(".pyr-row img")) == 8
    browser.screenshot("2-generated")

    # A long run, cancelled, and another one.
    browser.choose("long")
    browser.press("Generate")
    until(lambda: "of 1008" in browser.status)
    browser.screenshot("3-running")
    browser.press("Cancel")
    until(lambda: browser.status == "Cancelled.")
    browser.choose("fast")
    browser.press("Generate")
    until(lambda: browser.status.startswith("5 network calls"))

    # What is no picture.
    browser.press("Upscale", "button[role=tab]")
    (tmp_path / "notes.png").write_text("no picture\n")
    browser.drop(tmp_path / "notes.png")
    until(lambda: browser.status.startswith("notes.png"))
    assert browser.status == "notes.png cannot be used: not an image; expected one of PNG, JPEG, WEBP, TIFF, BMP, GIF."
    browser.screenshot("4-text")
    browser.clear()
    browser.drop(huge_png(tmp_path / "bomb.png"))
    until(lambda: browser.status.startswith("bomb.png"))
    assert browser.status == "bomb.png cannot be used: 20000×10000 are 200 megapixels; expected at most 16."
    browser.screenshot("5-too-large")
    browser.press("Enlarge")
    until(lambda: browser.status.startswith("bomb.png"))
    browser.clear()
    kilobytes = next(
        int(line.split()[1]) for line in Path(f"/proc/{process}/status").read_text().splitlines() if "VmHWM" in line
    )
    assert kilobytes < 1_500_000

    # Upscale.
    Image.linear_gradient("L").resize((12, 10)).convert("RGB").save(tmp_path / "photo.png")
    browser.drop(tmp_path / "photo.png")
    until(lambda: browser.status == "12×10 pixels")
    browser.press("Enlarge")
    until(lambda: browser.status.startswith("48×40 pixels"))
    assert "consistency" in browser.status
    until(lambda: browser.shown("button[aria-label=Fullscreen]"))
    browser.screenshot("6-enlarged")

    browser.press("Download PNG")
    saved = until(lambda: list((tmp_path / "profile" / "saved").glob("*.png")))[0]
    assert saved.name == "photo_48x40.png" and Image.open(saved).size == (48, 40)

    asked = browser.requests()
    assert len(asked) > 10 and [each for each in asked if not each.startswith(url)] == []
    assert listening(port) == ["0100007F"]


def test_a_taken_port_is_one_line(server, model):
    command = [sys.executable, "-c", RUN, "demo", "--model", str(model), "--port", str(server[1])]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = found.stderr.strip().splitlines()
    assert found.returncode == 2 and lines == [
        f"error: cannot listen on host='127.0.0.1', port={server[1]}: Address already in use"
    ]
