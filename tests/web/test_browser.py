"""`pyrdiff demo` as a user meets it: a page in headless Chromium, from a free port of the loopback address."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
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
from selenium.webdriver.common.keys import Keys  # noqa: E402

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
    plans["more"] = {"num_inference_steps": 4, "refine_steps": 3}
    return hub.export(PyramidalPipeline(unet, DDPMScheduler(), plans=plans), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """(url, port, process id) of a running page; it must end cleanly on SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", RUN, "demo", str(model), "--port", str(port), "--device", "cpu"]
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


def until(condition, tries: int = 1200):
    """What the condition gives, once it is true; it is asked four times a second at most."""
    for _ in range(tries):
        if result := condition():
            return result
        time.sleep(0.25)
    raise AssertionError(f"still not true when asked for the {tries}th time")


class Browser:
    """The page in Chromium."""

    def __init__(self, url: str, folder: Path):
        self.folder = folder
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        options.add_experimental_option("prefs", {"download.default_directory": str(folder / "saved")})
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.open(url)

    def open(self, url: str) -> None:
        self.driver.get(url)
        until(lambda: self.shown("button[role=tab]"))

    def another_visitor(self, url: str) -> None:
        """A window of its own, in which the next steps take place."""
        self.driver.switch_to.new_window("tab")
        self.open(url)

    def look_at(self, window: str) -> None:
        """Another window; browsers draw the one in front only."""
        self.driver.switch_to.window(window)
        self.driver.execute_cdp_cmd("Page.bringToFront", {})

    def shown(self, selector: str) -> list:
        """What is in view, or would be after scrolling."""
        visible = "filter(each => each.checkVisibility({visibilityProperty: true}))"
        return self.driver.execute_script(f"return [...document.querySelectorAll(arguments[0])].{visible}", selector)

    def press(self, text: str, selector: str = "button:not([role=tab])") -> None:
        def found():
            return [each for each in self.shown(selector) if each.text == text and each.rect["height"] > 10]

        button = until(found)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()

    def unfold(self, title: str) -> None:
        fold = until(lambda: [each for each in self.shown("button.label-wrap") if title in each.text])[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", fold)
        fold.click()

    def field(self, label: str):
        """The text or number field of this label in the tab that is shown."""
        script = "return arguments[0].closest('label')?.innerText.trim() ?? ''"
        fields = self.shown("input[type=number], input[type=text], textarea")
        return next(each for each in fields if self.driver.execute_script(script, each).startswith(label))

    def type(self, label: str, text: str) -> None:
        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)

    def ticked(self, label: str) -> bool:
        box = next(each for each in self.shown("label") if each.text.strip() == label)
        return box.find_element("css selector", "input[type=checkbox]").is_selected()

    def pictures(self, kind: str) -> list[Image.Image]:
        """The images of a gallery, as the server has them."""
        found = []
        for shown in self.shown(f".{kind} .grid-container img"):
            with urllib.request.urlopen(shown.get_attribute("src"), timeout=120) as answer:
                found.append(Image.open(io.BytesIO(answer.read())))
        return found

    def saved(self, ending: str) -> Path:
        return until(lambda: list((self.folder / "saved").glob(f"*{ending}")))[0]

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


def same(one: list[Image.Image], two: list[Image.Image]) -> bool:
    return [image.tobytes() for image in one] == [image.tobytes() for image in two]


def test_a_session(server, browser, tmp_path):
    url, port, _ = server
    assert listening(port) == ["0100007F"]
    tabs = [tab.text for tab in browser.shown("button[role=tab]")]
    assert tabs == ["Generate", "Upscale", "Compare plans", "About the model"]
    browser.screenshot("1-start")

    # Generate: four large images; a row of small ones for each level.
    browser.press("Generate")
    until(lambda: browser.status.startswith("5 network calls"))
    browser.unfold("Levels: 8×8 → 16×16")
    rows = until(lambda: [row.text.split("\n") for row in browser.shown(".pyr-row")])
    assert [row[:3] for row in rows] == [["8×8", "3 calls", "0.75 NFE-eq"], ["16×16", "2 calls", "2.00 NFE-eq"]]
    assert len(browser.shown(".pyr-row img")) == 8
    first, seed = browser.pictures("pyr-gallery"), int(browser.field("Seed").get_attribute("value"))
    assert [image.size for image in first] == [(16, 16)] * 4 and not browser.ticked("Lock")
    browser.screenshot("2-generated")

    # Another seed, and the first one again: out of the history, then by its button.
    browser.press("Generate")
    until(lambda: int(browser.field("Seed").get_attribute("value")) != seed)
    until(lambda: browser.status.startswith("5 network calls") and len(browser.shown(".pyr-history img")) == 2)
    assert not same(browser.pictures("pyr-gallery"), first)
    browser.shown(".pyr-history button")[1].click()
    until(lambda: browser.ticked("Lock"))
    assert int(browser.field("Seed").get_attribute("value")) == seed
    until(lambda: same(browser.pictures("pyr-gallery"), first))
    browser.press("Again with this seed")
    until(lambda: len(browser.shown(".pyr-history img")) == 3)
    assert same(browser.pictures("pyr-gallery"), first)

    # All of it as a ZIP.
    browser.press("Download all (ZIP)")
    with zipfile.ZipFile(browser.saved(".zip")) as together:
        settings = json.loads(together.read("settings.json"))
        del settings["version"]
        assert sorted(each["seed"] for each in settings.values()) == [seed + index for index in range(4)]
        files = [Image.open(io.BytesIO(together.read(name))) for name in together.namelist()[:4]]
    assert same(files, first) and all(json.loads(file.text["pyrdiff"])["flags"]["plan"] == "fast" for file in files)

    # Enter runs; an empty field is said.
    browser.type("Seed", "5" + Keys.ENTER)
    until(lambda: len(browser.shown(".pyr-history img")) == 4)
    browser.type("Seed", "")
    browser.press("Generate")
    until(lambda: browser.status.startswith("Seed: nothing is entered"))
    browser.type("Seed", "5")

    # A long run, and another visitor, who waits until it is cancelled.
    browser.choose("long")
    browser.press("Generate")
    until(lambda: "of 1008" in browser.status)
    browser.screenshot("3-running")
    here = browser.driver.current_window_handle
    browser.another_visitor(url)
    browser.press("Generate")
    until(lambda: browser.status == "Waiting in line: 1 run before yours.")
    browser.screenshot("3-waiting")
    there = browser.driver.current_window_handle
    browser.look_at(here)
    browser.press("Cancel")
    until(lambda: browser.status == "Cancelled.")
    browser.look_at(there)
    until(lambda: browser.status.startswith("5 network calls"))
    browser.driver.close()
    browser.look_at(here)

    # Two plans, from the same seeds.
    browser.press("Compare plans", "button[role=tab]")
    browser.press("Compare")
    until(lambda: browser.status == "2 compared")
    until(lambda: browser.shown(".pyr-verdict tr"))
    rows = [row.text.split() for row in browser.shown(".pyr-verdict tr")]
    assert [row[:3] for row in rows[1:]] == [["fast", "5", "2.75"], ["more", "7", "4.00"]]
    assert len(browser.pictures("pyr-gallery")) == 8
    assert "Quality: not measured here" in browser.shown(".pyr-verdict")[0].text
    browser.screenshot("4-compared")

    asked = browser.requests()
    assert len(asked) > 10 and [each for each in asked if not each.startswith(url)] == []


def test_enlarging(server, browser, tmp_path):
    url, port, process = server
    browser.press("Upscale", "button[role=tab]")

    # An example.
    until(lambda: browser.shown(".pyr-shelf button"))[0].click()
    until(lambda: browser.status.startswith("8×8 → 32×32 pixels"))
    browser.press("Enlarge")
    until(lambda: browser.status.startswith("32×32 pixels"))
    browser.clear()

    # What is no picture.
    (tmp_path / "notes.png").write_text("no picture\n")
    browser.drop(tmp_path / "notes.png")
    until(lambda: browser.status.startswith("notes.png"))
    assert browser.status == "notes.png cannot be used: not an image; expected one of PNG, JPEG, WEBP, TIFF, BMP, GIF."
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
    browser.press("Enlarge")
    until(lambda: browser.status == "No picture yet: drop one first.")

    # A picture of one's own.
    Image.linear_gradient("L").resize((12, 10)).convert("RGB").save(tmp_path / "photo.png")
    browser.drop(tmp_path / "photo.png")
    until(lambda: browser.status.startswith("12×10 → 48×40 pixels"))
    browser.press("Enlarge")
    until(lambda: browser.status.startswith("48×40 pixels"))
    assert "consistency" in browser.status
    until(lambda: browser.shown("button[aria-label=Fullscreen]"))
    browser.screenshot("6-enlarged")
    browser.press("Download PNG")
    saved = browser.saved("48x40.png")
    assert saved.name == "photo_48x40.png" and Image.open(saved).size == (48, 40)

    asked = browser.requests()
    assert len(asked) > 10 and [each for each in asked if not each.startswith(url)] == []
    assert listening(port) == ["0100007F"]


def test_another_model(server, browser):
    for model in ("photos-x4", "noto-emoji"):
        browser.shown("input[role=combobox]")[0].click()
        until(lambda model=model: [each for each in browser.shown("[role=option]") if model in each.text])[0].click()
        until(lambda model=model: browser.shown(".intro h1")[0].text == model)
        browser.screenshot(f"8-{model}")
    until(lambda: browser.shown("button[role=tab]")[0].text == "Generate")
    browser.press("Upscale", "button[role=tab]")
    until(lambda: browser.shown(".pyr-shelf button"))[0].click()
    until(lambda: browser.status.startswith("16×16 → 64×64 pixels"))
    said = [each["message"] for each in browser.driver.get_log("browser")]
    assert not [line for line in said if "500" in line], said


def test_on_a_phone_the_result_comes_first(server, browser):
    metrics = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    shown, form = browser.shown(".pyr-gallery, .pyr-results")[0], browser.shown("input[type=number]")[0]
    until(lambda: shown.rect["y"] < form.rect["y"])
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 420
    browser.screenshot("7-phone")


def test_a_taken_port_is_one_line(server, model):
    command = [sys.executable, "-c", RUN, "demo", str(model), "--port", str(server[1])]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = found.stderr.strip().splitlines()
    assert found.returncode == 2 and lines == [
        f"error: cannot listen on host='127.0.0.1', port={server[1]}: Address already in use"
    ]
