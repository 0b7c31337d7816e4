"""The report in a browser: no error, charts drawn, both colour schemes, a phone, paper, and no mouse needed."""

import shutil

import pytest

from hf_oscqat.report.page import write_report

selenium = pytest.importorskip("selenium.webdriver", reason="selenium is missing: pip install -e .[dev]")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="Chromium is missing: apt-get install chromium chromium-driver",
)
TAB, ENTER, SPACE = "\ue004", "\ue007", "\ue00d"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    for option in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={profile}", "--window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(option)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, make_recording):
    """Page of one run and page of two."""
    folder = tmp_path_factory.mktemp("runs")
    make_recording(folder / "freeze", steps=(1, 50, 100, 150, 200))
    make_recording(folder / "lsq", freezing=False, seed=1, steps=(1, 50, 100, 150, 200))
    return write_report([folder / "freeze"]), write_report([folder / "freeze", folder / "lsq"])


@pytest.fixture
def open_page(browser, pages):
    def show(which=0, *, scheme="light", width=1280, media=""):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.get(pages[which].as_uri())
        return browser

    return show


def column(browser, number):
    script = "return [...document.querySelectorAll('#table tbody tr')].map(row => row.cells[arguments[0]].textContent)"
    return browser.execute_script(script, number)


def sorts(browser):
    return browser.execute_script("return [...document.querySelectorAll('#table thead th')].map(h => h.ariaSort)")


LOOKS = [
    {"scheme": "light"}, {"scheme": "dark"}, {"width": 390}, {"width": 390, "scheme": "dark"}, {"media": "print"},
]  # fmt: skip


@pytest.mark.parametrize("look", LOOKS, ids=str)
@pytest.mark.parametrize("which", [0, 1])
def test_page_is_drawn_without_an_error_and_fits(open_page, which, look):
    browser = open_page(which, **look)
    assert browser.get_log("browser") == []
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(svg => { const box = svg.getBoundingClientRect();"
        "  return [box.left, box.right, box.height, svg.querySelectorAll('path, image').length]; })"
    )
    assert len(sizes) == (12, 22)[which]
    width = look.get("width", 1280)
    assert all(0 <= left and right <= width and height > 100 and parts > 5 for left, right, height, parts in sizes)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_text_stands_out_from_its_background(open_page, look):
    browser = open_page(**look)
    ratio = """
        const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => {
            v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const shown = name => { document.body.style.outlineColor = `var(--${name})`;
            return light(getComputedStyle(document.body).outlineColor); };
        return ["paper", "panel"].flatMap(below => arguments[0].map(name => {
            const [a, b] = [shown(below), shown(name)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); }));
    """
    assert min(browser.execute_script(ratio, ["ink", "soft"])) >= 4.5
    assert min(browser.execute_script(ratio, ["oscillating", "frozen", "before", "focus"])) >= 3
    ink, text = browser.execute_script(
        "return [getComputedStyle(document.body).color, getComputedStyle(document.querySelector('svg text')).fill]"
    )
    assert ink == text


def test_lettering_of_charts_can_be_read_on_a_phone(open_page):
    browser = open_page(width=390)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => parseFloat(getComputedStyle(t).fontSize)"
        "  * t.getScreenCTM().a).filter(size => size > 0)"
    )
    assert min(heights) >= 8


def test_table_is_sorted_without_a_mouse(open_page):
    browser = open_page()
    depth = column(browser, 0)
    assert sorts(browser)[0] == "ascending"
    for _ in range(60):
        browser.switch_to.active_element.send_keys(TAB)
        if browser.switch_to.active_element.text.startswith("Oscillating, peak"):
            break
    focus = browser.switch_to.active_element
    assert focus.tag_name == "button"
    assert focus.value_of_css_property("outline-style") == "solid"
    focus.send_keys(ENTER)
    peaks = [float(text) for text in column(browser, 5)]
    assert peaks == sorted(peaks, reverse=True)
    assert column(browser, 0) != depth
    assert sorts(browser) == ["none"] * 5 + ["descending"] + ["none"] * (len(sorts(browser)) - 6)
    assert "Oscillating, peak" in browser.find_element("id", "sorted").text
    browser.switch_to.active_element.send_keys(SPACE)
    assert [float(text) for text in column(browser, 5)] == sorted(peaks)


def test_names_are_sorted_as_people_do(open_page):
    browser = open_page()
    browser.execute_script("document.querySelector('#table tbody th').dataset.key = 'blocks.10.0'")
    browser.find_elements("css selector", "#table thead button")[1].click()
    names = browser.execute_script("return [...document.querySelectorAll('#table tbody th')].map(h => h.dataset.key)")
    assert names[-1] == "blocks.10.0"


def test_everything_that_scrolls_is_reached_by_keyboard(open_page):
    browser = open_page(width=390)
    scrolled = browser.execute_script(
        "return [...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1"
        "  && /auto|scroll/.test(getComputedStyle(e).overflowX)).map(e => e.tabIndex)"
    )
    assert scrolled == [0]
