"""The page of `--html` in headless Chromium: charts are drawn, tables sort and filter, nothing is logged, nothing is fetched,
and text of a model stays text."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_store import SPEC, rollout_row, samples, tables, update_rows, write

from clipctl.errors import SpecError, StoreError
from clipctl.journal import create_run
from clipctl.report import environment_table, inline_json, packed, visible, write_report
from clipctl.store import open_runs

HOSTILE = (
    "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'> \x1b[31m\u202egnirts\x00 <!-- {{ 7*7 }}"
)
SIZES = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for at in range(7):
        writer = create_run(folder / "runs", f"run-{at}", SPEC, "tiny")
        for rollout in range(2 + at):
            asked = {
                "position": [2 * rollout, 2 * rollout + 1],
                "prompt_id": ["p0", "p1"],
                "question": [HOSTILE, "2+2?"],
                "answer": ["3", "4"],
            }
            rows = tables(update_rows(at), samples(2 * rollout, HOSTILE), questions=asked)
            writer.write_rollout(rollout, rollout_row(at + rollout), rows)
        writer.event("alarm", HOSTILE, rollout=0)
        writer.close("finished", "")
    return write_report([folder / "runs"], folder / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its driver are not installed (Debian packages chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def opened(browser: Any, page: Path, width: int, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page.as_uri())
    until = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.ready") != "true":
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_charts_are_drawn_and_nothing_is_logged_or_fetched(browser: Any, page: Path, width: int, scheme: str) -> None:
    opened(browser, page, width, scheme)
    charts = browser.execute_script("return document.querySelectorAll('.chart').length")
    drawn = browser.execute_script(
        "return document.querySelectorAll('.chart svg .mark-group, .chart svg .mark-line').length"
    )
    empty = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].filter(c => !c.querySelector('svg path')).length"
    )
    assert charts > 10
    assert drawn >= charts
    assert empty == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


@pytest.mark.slow
@pytest.mark.browser
def test_hostile_text_stays_text(browser: Any, page: Path) -> None:
    opened(browser, page, 1280, "light")
    assert browser.execute_script("return window.hit") is None
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    text = browser.execute_script("return document.querySelector('#samples').textContent")
    assert (
        "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'> \\x1b[31m\\x202egnirts\\x00" in text
    )
    assert "{{ 7*7 }}" in text


@pytest.mark.slow
@pytest.mark.browser
def test_tables_sort_and_filter(browser: Any, page: Path) -> None:
    opened(browser, page, 1280, "light")
    names = "return [...document.querySelectorAll('#runs tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
    first = sorted(browser.execute_script(names))
    button = browser.find_element("css selector", "#runs th button")
    button.click()
    assert browser.execute_script(names) == first
    button.send_keys("\ue007")  # Enter
    assert browser.execute_script(names) == first[::-1]
    browser.find_element("css selector", "[data-filters=runs]").send_keys("run-3")
    assert browser.execute_script(names) == ["run-3"]


@pytest.mark.slow
@pytest.mark.browser
def test_two_hundred_runs_are_one_usable_page(browser: Any, tmp_path: Path) -> None:
    writer = create_run(tmp_path, "model", SPEC, "tiny")
    for rollout in range(2):
        writer.write_rollout(rollout, rollout_row(rollout), tables(update_rows(rollout), samples(2 * rollout, "text")))
    writer.close("finished", "")
    spec, status = (json.loads((writer.folder / name).read_text()) for name in ("spec.json", "status.json"))
    for at in range(200):
        folder = tmp_path / "runs" / f"run-{at:03}"
        shutil.copytree(writer.folder, folder)
        spec["clip"]["low"] = 0.001 * (at + 1)
        (folder / "spec.json").write_text(json.dumps(spec))
        (folder / "status.json").write_text(json.dumps(status | {"name": folder.name}))
    page = write_report([tmp_path / "runs"], tmp_path / "report.html")
    assert page.stat().st_size < 6e6
    opened(browser, page, 1280, "light")
    assert browser.execute_script("return document.querySelectorAll('#runs tbody tr').length") == 200
    assert "Charts show the 24 newest of 200 groups of runs" in browser.find_element("id", "course").text
    browser.find_element("css selector", "[data-filters=runs]").send_keys("run-150")
    assert browser.find_element("css selector", "[data-counts=runs]").text == "1 of 200 rows"
    series = set(browser.execute_script("return JSON.parse(document.getElementById('data').textContent).charts"))
    assert {"overview-0", "entropy-0", "clip-0"} <= series


def test_the_page_begins_with_the_verdict_and_names_questions_and_versions(page: Path) -> None:
    import re

    text = page.read_text()
    headings = re.findall(r'<th scope="col"[^>]*><button type="button">([^<]*)', text.split('id="runs"')[1])
    assert headings[:3] == ["run", "state", "verdict"]
    assert "Expected: <bdi>" in text
    machines = text.split('id="machines"')[1]
    assert re.search(r"All runs: python 3\.\d+\.\d+, .*duckdb \d", machines)


def test_versions_that_differ_stand_with_their_runs(tmp_path: Path) -> None:
    for name, torch in (("a", "2.1"), ("b", "2.2"), ("c", None)):
        writer = create_run(tmp_path, name, SPEC, "tiny")
        write(writer, 0)
        writer.close("finished", "")
        status = json.loads((writer.folder / "status.json").read_text())
        status["packages"] = {"python": "3.11.1", "torch": torch} if torch else {"python": "3.11.1"}
        (writer.folder / "status.json").write_text(json.dumps(status))
    with open_runs(tmp_path) as runs:
        made = environment_table(runs)
    at = made.headings.index("packages")
    assert [row[at].text for row in made.rows] == ["torch 2.1", "torch 2.2", ""]
    assert made.note == "All runs: python 3.11.1."


def test_json_ends_no_script_and_text_obeys_nobody() -> None:
    text = inline_json({"a": HOSTILE})
    assert "<" not in text
    assert json.loads(text) == {"a": HOSTILE}
    assert visible("a\x1b[0m\tb\nc\u202e") == "a\\x1b[0m\tb\nc\\x202e"
    rows = [{"label": "x\x1b", "y": 1.5}, {"label": "x\x1b", "y": None}]
    assert packed({"values": rows})["values"]["packed"] == {
        "keys": ["label", "y"],
        "columns": [{"values": ["x\\x1b"], "places": [0, 0]}, [1.5, None]],
    }


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"must end in \.html"):
        write_report([tmp_path], tmp_path / "report.pdf")
    writer = create_run(tmp_path / "runs", "a", SPEC, "tiny")
    write(writer, 0)
    writer.close("finished", "")
    with pytest.raises(StoreError, match="cannot be written"):
        write_report([tmp_path / "runs"], tmp_path / "none" / "report.html")
