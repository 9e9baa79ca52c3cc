"""The status page in a real headless Chromium: what it shows of the server, and that its box compares texts. No Ray."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fake_backend import MODEL, NAME, OTHER, FakeBackend

from ullme_ray.serve.app import create_api
from ullme_ray.spec.job import ServeSpec
from ullme_ray.spec.secrets import SecretRef

KEY = "page-key-1"


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A server with a key over a computable backend."""
    (tmp_path / "keys").write_text(KEY)
    api = create_api(NAME, ServeSpec(api_keys=SecretRef(f"file:{tmp_path}/keys")), FakeBackend(NAME, OTHER))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver on this machine (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield running
    finally:
        running.quit()


def test_the_page_shows_the_server_and_compares_texts(browser: Any, url: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def text_of(name: str) -> str:
        return browser.find_element(By.ID, name).text

    def wait_for(name: str, content: str) -> None:
        WebDriverWait(browser, 20).until(lambda _: content in text_of(name), f"no {content!r} in #{name}")

    browser.get(url)
    wait_for("trouble", "no API key was given")
    browser.find_element(By.ID, "key").send_keys("wrong\t")
    wait_for("trouble", "the API key is not valid")
    browser.find_element(By.ID, "key").clear()
    browser.find_element(By.ID, "key").send_keys(f"{KEY}\t")
    wait_for("models", MODEL.fingerprint)
    for shown in (NAME, OTHER, "prompt query", "mean"):
        assert shown in text_of("models")
    assert text_of("trouble") == ""
    assert "queue tokens 45" in text_of("load")
    assert "requests allowed 512" in text_of("load")

    query, passages = browser.find_element(By.ID, "query"), browser.find_element(By.ID, "passages")
    query.clear()
    query.send_keys("abcd")
    passages.clear()
    passages.send_keys("a\n\n<b>bold</b> words")
    browser.find_element(By.CSS_SELECTOR, "#form button").click()
    wait_for("result", "bold")
    rows = browser.find_elements(By.CSS_SELECTOR, "#result tr")
    shown = [
        (row.find_elements(By.TAG_NAME, "td")[1].text, float(row.find_elements(By.TAG_NAME, "td")[0].text)) for row in rows
    ]
    assert [text for text, _ in shown] == ["<b>bold</b> words", "a"], "text of a request is never read as HTML"
    assert shown[0][1] > shown[1][1]
    assert -1 <= shown[1][1] <= shown[0][1] <= 1

    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert [said for said in complaints if "401" not in said] == [], "nothing but what came before the key"
