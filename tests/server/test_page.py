"""The page at /: its files, and in a real browser what a person does with it.

    .venv/bin/python -m pytest -m browser tests/server/test_page.py

QUANTFORGE_SCREENSHOTS names a folder that gets the screenshots kept in docs/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from quantforge.server import Client
from quantforge.server.routes_system import FILES, STATIC
from tests.helpers import gaussian
from tests.server.browser import Browser
from tests.server.conftest import Live

TOKEN = "a-token-of-some-length"


def test_all_files_are_served_and_nothing_comes_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert {path.name for path in STATIC.iterdir()} == {"index.html", *FILES}
    used = set(re.findall(r'(?:src|href)="/static/([^"]+)"', page.text))
    imported = set(re.findall(r'from "/static/([^"]+)"', client.get("/static/app.js").text))
    assert used | imported == set(FILES)
    for name, media_type in FILES.items():
        answer = client.get(f"/static/{name}")
        assert answer.headers["content-type"].split(";")[0] == media_type
        foreign = re.findall(r"https?://(?!www\.w3\.org/2000/svg)[^\s\"']+", answer.text)
        assert not foreign, f"{name} names {foreign}"
    assert client.get("/static/nothing.js").status_code == 404
    assert client.get("/static/..%2fapp.py").status_code == 404


def test_the_policy_allows_what_the_page_has_and_no_more(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page.text)


def test_fields_have_labels(client: TestClient) -> None:
    """Each field stands in a label, or is named by one."""
    page = client.get("/").text
    inside = "".join(re.findall(r"<label.*?</label>", page, re.DOTALL))
    named = set(re.findall(r'<label for="([^"]+)"', page))
    for field in re.findall(r"<(?:input|select|textarea)[^>]*>", page):
        name = re.search(r'id="([^"]+)"', field)
        assert name is not None
        assert field in inside or name[1] in named, field
    assert 'lang="en"' in page
    assert re.findall(r"<h(\d)", page) == ["1", "2", "2", "2"]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def fill(url: str, token: str | None = None) -> np.ndarray:
    x = gaussian(6000, 96)
    with Client(url, token=token) as client:
        for name, bits in (("notes", 4), ("photos", 2)):
            client.create_collection(name, 96, bits=bits, metric="cosine" if bits == 4 else "l2")
            count = 6000 if bits == 4 else 1500
            topics = [("music", "travel", "cooking")[i % 3] for i in range(count)]
            client.add(name, x[:count], metadata={"topic": topics})
    return x


def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("QUANTFORGE_SCREENSHOTS"):
        browser.screenshot(Path(folder) / name)


@pytest.mark.browser
def test_in_a_browser(live: Live, browser: Browser) -> None:
    url = live()
    x = fill(url)
    browser.open(url)
    browser.until("document.querySelectorAll('#collections tbody tr').length === 2")
    assert browser.run("document.getElementById('state').textContent") == "ready"
    assert browser.run("document.getElementById('sum-vectors').textContent") == "7,500"
    assert "4" in browser.run("document.querySelector('#collections tbody tr').textContent")

    browser.fill(search_collection="notes", search_id="7", search_k="8")
    browser.click("#search button[type=submit]")
    browser.until("document.querySelectorAll('#results li').length === 8")
    assert browser.run("document.querySelector('#results button').textContent") == "7"
    topic = browser.run("document.querySelector('#results .metadata').textContent")
    assert topic == "topic: travel"
    browser.fill(search_vector=", ".join(f"{v:.4f}" for v in x[31]))
    browser.click("#search button[type=submit]")
    browser.until("document.querySelector('#results button').textContent === '31'")
    browser.click("#results li:nth-child(2) button")
    second = browser.run("document.getElementById('search-id').value")
    browser.until(f"document.querySelector('#results button').textContent === '{second}'")
    browser.fill(search_id="", search_vector="1, two, 3")
    browser.click("#search button[type=submit]")
    browser.until("document.getElementById('search-note').className === 'error'")
    browser.fill(search_vector="1, 2, 3")
    browser.click("#search button[type=submit]")
    browser.until("document.getElementById('search-note').textContent.includes('96')")
    assert browser.run("document.querySelectorAll('#results li').length") == 0
    browser.fill(search_vector="", search_id="7")
    browser.click("#search button[type=submit]")

    browser.fill(measure_count="400", measure_dim="64")
    browser.click("#measure button[type=submit]")
    browser.until("document.querySelectorAll('#measured tbody tr').length === 8")
    for chart in ("error-chart", "recall-chart", "speed-chart"):
        assert browser.run(f"document.querySelectorAll('#{chart} svg').length") == 1
    numbers = browser.run(
        "[...document.querySelectorAll('figure svg *')].flatMap(e => [...e.attributes])"
        ".filter(a => a.value.includes('NaN') || a.value.includes('Infinity')).length"
    )
    assert numbers == 0
    errors = [p for p in browser.problems if "status of 400" not in p]  # asked for above
    assert errors == []
    keep(browser, "server_light.png")

    browser.click("#theme")
    assert browser.run("document.documentElement.dataset.theme") == "dark"
    keep(browser, "server_dark.png")
    browser.open(url, width=400, scheme="light")
    assert browser.run("document.documentElement.dataset.theme") == "dark", "the choice is kept"
    browser.until("document.querySelectorAll('#collections tbody tr').length === 2")
    assert browser.run("document.documentElement.scrollWidth") <= 400
    assert browser.run("localStorage.clear()") is None
    browser.open(url, scheme="dark")
    assert browser.run("document.documentElement.dataset.theme") == "dark", "as the system says"


@pytest.mark.browser
def test_a_token_is_asked_for_and_kept(live: Live, browser: Browser) -> None:
    url = live(token=TOKEN, job_numbers=1000)
    fill(url, TOKEN)
    browser.open(url)
    browser.until("!document.getElementById('token-form').hidden")
    browser.fill(token=TOKEN)
    browser.click("#token-form button")
    browser.until("document.querySelectorAll('#collections tbody tr').length === 2")
    browser.fill(measure_count="400", measure_dim="64")
    browser.click("#measure button[type=submit]")  # a job here
    browser.until("document.querySelectorAll('#measured tbody tr').length === 8")
    browser.open(url)
    browser.until("document.querySelectorAll('#collections tbody tr').length === 2")
    assert browser.run("document.getElementById('token-form').hidden")
