"""A real headless Chromium for the pages."""

import os
import shutil
import tempfile

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def start():
    """Return a driver and its profile's folder; without Chromium, skip, and fail where CI is set."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        missing = "no Chromium with chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    profile = tempfile.mkdtemp(prefix="guardrails-chromium-")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver)), profile


class Screen:
    """A browser window of a given size and colour scheme, with one page open."""

    def __init__(self, driver, folder):
        self.driver, self._folder, self._pages = driver, folder, 0

    def open(self, html, *, width=1200, height=900, scheme="light"):
        self._pages += 1
        path = self._folder / f"page{self._pages}.html"
        path.write_text(html, encoding="utf-8")
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # Not every headless Chromium has its window in focus, without which no element is told of its own.
        self.driver.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
        self.scheme(scheme)
        self.driver.get(path.as_uri())
        # Charts are drawn once their size is known, which on a busy machine is after the page has loaded.
        drawn = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done));"
        self.driver.execute_async_script(drawn)
        return self

    def scheme(self, name):
        media = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def run(self, script, *arguments):
        return self.driver.execute_script(f"return ({script})", *arguments)

    def all(self, css):
        return self.driver.find_elements("css selector", css)

    def texts(self, css):
        return [element.text for element in self.all(css)]

    @property
    def text(self):
        return self.run("document.body.innerText")

    def errors(self):
        """What the console says of failures, refusals of the content security policy included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]
