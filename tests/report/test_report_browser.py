"""Report's page in headless Chromium, opened from the disk: sorting, filters, keys, ticks, hostile names,
10,000 rows."""

import importlib.util
import shutil
import time
from pathlib import Path

import pytest

import report_cases as cases
from stpp.label import rows
from stpp.report import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("selenium") is None,
                       reason="selenium is not installed (stpp[dev])"),
    pytest.mark.skipif(not (shutil.which("chromedriver")
                            and (shutil.which("chromium") or shutil.which("google-chrome"))),
                       reason="Chromium and chromedriver are not installed"),
]
MANY = 10_000
DRAWN = cases.GOOD + len(cases.HOSTILE)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Report of a run whose labels have `MANY` more rows than pictures."""
    run = cases.run(tmp_path_factory.mktemp("run"))
    more = [dict.fromkeys(rows.LABELS) | {
        "key": f"many/image{i:05d}", "source": f"many/image{i:05d}.jpg", "status": "ok", "width": 10,
        "height": 10,
        "mean_confidence": i / MANY, "ignored_fraction": (i % 50) / 100,
        "class_pixels": [90 - i % 90, i % 90, 10, 0]}
        for i in range(MANY)]
    rows.write(run / "stages" / "3-label" / "labels" / "part-000099.parquet", more, rows.LABELS)
    build.write_report(run, run / "report")
    return run / "report"


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def driver(downloads):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1280,1400"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads),
                                              "download.prompt_for_download": False})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    started.set_page_load_timeout(60)
    yield started
    started.quit()


@pytest.fixture
def page(driver, report):
    """Opens the page with nothing ticked."""
    driver.get((report / "index.html").as_uri())
    driver.execute_script("localStorage.clear()")
    driver.refresh()
    return driver


def put(page, id_: str, value) -> None:
    """Sets a control and notifies the page."""
    page.execute_script("const it = document.getElementById(arguments[0]); it.type === 'checkbox' ? "
                        "it.checked = arguments[1] : it.value = arguments[1]; it.dispatchEvent(new "
                        "Event('input', {bubbles: true}))", id_, value)


def text(page, id_: str) -> str:
    return page.execute_script("return document.getElementById(arguments[0]).textContent", id_)


def shown(page) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('.card')].map((card) => "
                               "card.dataset.key)")


def press(page, key: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(key).perform()


def test_page_opens_with_pictures_and_without_errors(page, tmp_path):
    assert text(page, "place") == f"{DRAWN} of {DRAWN + MANY} images, page 1 of 1"
    broken = page.execute_script("return [...document.images].filter((it) => it.complete && "
                                 "!it.naturalWidth).map((it) => it.src)")
    assert broken == []
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.save_screenshot(str(tmp_path / "page.png"))


def test_hostile_names_are_shown_and_not_run(page):
    titles = page.execute_script("return [...document.querySelectorAll('.card h3')].map((it) => "
                                 "it.textContent)")
    assert {cases.key_of(name) for name in cases.HOSTILE} <= set(titles)
    assert page.execute_script("return typeof hacked") == "undefined"
    put(page, "search", "onerror")
    assert shown(page) == [cases.key_of(cases.HOSTILE[0])]


def test_ten_thousand_rows_are_filtered_and_sorted(page):
    put(page, "pictured", False)
    assert (
        text(page, "place")
        == f"{DRAWN + MANY} of {DRAWN + MANY} images, page 1 of {-(-(DRAWN + MANY) // 48)}"
    )
    assert len(shown(page)) == 48
    put(page, "search", "many/")
    started = time.monotonic()
    put(page, "sort", "confidence")
    put(page, "order", "down")
    assert time.monotonic() - started < 2
    assert shown(page)[:2] == [f"many/image{MANY - 1:05d}", f"many/image{MANY - 2:05d}"]
    put(page, "ignored-low", 49)
    put(page, "order", "up")
    assert shown(page)[:2] == ["many/image00049", "many/image00099"]
    put(page, "class", "1")
    put(page, "least", 89)
    assert all(int(key[-5:]) % 90 == 89 for key in shown(page)) and shown(page)
    put(page, "class", "3")
    assert text(page, "place") == f"0 of {DRAWN + MANY} images, page 1 of 1"


def test_the_worst_and_random_images(page):
    put(page, "number", 5)
    put(page, "show", "worst")
    worst = shown(page)
    assert len(worst) == 5
    put(page, "show", "random")
    first = shown(page)
    put(page, "order", "down")
    assert sorted(shown(page)) == sorted(first)  # the same draw in another order
    put(page, "pictured", False)
    draws = []
    for _ in range(2):
        page.execute_script("document.getElementById('again').click()")
        draws.append(sorted(shown(page)))
    assert draws[0] != draws[1] and len(draws[0]) == 5


def test_reliability_is_filtered_and_named_by_the_threshold(page):
    put(page, "reliability-low", 0.5)
    cards = page.execute_script("return [...document.querySelectorAll('.card')].map((card) => "
                                "card.textContent)")
    assert len(cards) == DRAWN - DRAWN // 2 and all(", reliable" in card for card in cards)


def test_keys_move_tick_and_switch_layers(page, downloads):
    page.execute_script("document.querySelector('.card').focus()")
    press(page, "x")
    press(page, "\ue014")  # right
    press(page, "x")
    assert text(page, "ticked-count") == "2 ticked"
    ticked = shown(page)[:2]
    page.refresh()
    assert text(page, "ticked-count") == "2 ticked"
    page.execute_script("document.getElementById('save').click()")
    end = time.monotonic() + 20
    while not (downloads / "exclude.txt").exists():
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.1)
    assert sorted((downloads / "exclude.txt").read_text(encoding="utf-8").splitlines()) == sorted(ticked)
    put(page, "pictured", False)
    page.execute_script("document.activeElement.blur()")
    press(page, "n")
    assert "page 2 of" in text(page, "place")
    press(page, "/")
    press(page, "x")
    assert page.execute_script("return document.getElementById('search').value") == "x"


def test_dark_and_light_differ_and_layers_can_be_hidden(page, tmp_path):
    colours = []
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd("Emulation.setEmulatedMedia",
                             {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        colours.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
        page.save_screenshot(str(tmp_path / f"{scheme}.png"))
    assert colours == ["rgb(255, 255, 255)", "rgb(22, 22, 22)"]
    for layer in ("ignored", "confidence"):
        shown = f"return [...document.querySelectorAll('.{layer}')].map((it) => getComputedStyle(it).display)"
        assert "none" not in page.execute_script(shown)
        put(page, f"show-{layer}", False)
        seen = page.execute_script(shown)
        assert seen and set(seen) == {"none"}
