"""The pages in a real browser: they work, complain of nothing, and fetch from this service alone."""

import time
from collections.abc import Iterator

import pytest
from support.browser import PROGRAMS, Browser, launched, program
from support.server import DEADLINE_S, Server

pytestmark = pytest.mark.browser
SEND = "document.getElementById('send').click()"
OUTCOME = "document.getElementById('outcome').textContent"
BODY = "document.getElementById('body').value"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not (found := program()):
        pytest.skip(f"none of {', '.join(PROGRAMS)} is installed (on Debian: apt-get install chromium)")
    with launched(found, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def trying(browser: Browser, server: Server) -> Browser:
    browser.open(f"{server.url}/")
    browser.wait_for(f"{BODY}.length > 10")
    return browser


def choose(browser: Browser, name: str) -> None:
    browser.evaluate(f"document.querySelector('input[value={name}]').click()")
    browser.wait_for(f"document.getElementById('curl').textContent.includes('/models/{name}/predict')")


def assert_from_here_alone(browser: Browser, server: Server) -> None:
    browser.evaluate("1")  # so that what was said until now has been read
    assert browser.complaints == []
    assert browser.requested
    assert [url for url in browser.requested if not url.startswith((f"{server.url}/", "data:"))] == []


def test_every_model_can_be_tried(trying: Browser, server: Server) -> None:
    names = trying.evaluate("[...document.querySelectorAll('#models input')].map((each) => each.value)")
    assert "digits_cnn" in names
    assert "tiny_two_inputs" in names
    for name in names:
        choose(trying, name)
        trying.wait_for(f"{BODY}.length > 10")
        trying.evaluate(SEND)
        outcome = trying.wait_for(f"!document.getElementById('answer').hidden && {OUTCOME}")
        assert outcome.startswith("200 in ")
        assert f"{name} version 1" in outcome
    assert_from_here_alone(trying, server)


def test_what_is_wrong_is_said(trying: Browser) -> None:
    choose(trying, "digits_rnn")
    trying.evaluate("""document.getElementById('body').value = '{"instances": [[1]]}'""")
    trying.evaluate(SEND)
    outcome = trying.wait_for(f"!document.getElementById('answer').hidden && {OUTCOME}")
    assert outcome.startswith("422 in ")
    assert "Expected input 'image' to be float32 (rows, 8, 8)" in outcome


def test_drawing_changes_the_numbers(trying: Browser) -> None:
    choose(trying, "digits_cnn")
    row = f"JSON.parse({BODY}).instances[0]"
    trying.evaluate("document.getElementById('clear').click()")
    assert trying.evaluate(f"{row}.flat().every((value) => value === 0)")
    press = "document.getElementById('canvas').dispatchEvent(new KeyboardEvent('keydown', {key: '%s'}))"
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", " "):
        trying.evaluate(press % key)
    assert trying.evaluate(f"{row}[1][2]") == 1
    at = "{clientX: box.left + box.width * 0.95, clientY: box.top + 1, pointerId: 1}"
    pointer = f"canvas.setPointerCapture = () => 0; canvas.dispatchEvent(new PointerEvent('pointerdown', {at}))"
    trying.evaluate(
        "const canvas = document.getElementById('canvas'); const box = canvas.getBoundingClientRect();" + pointer
    )
    assert trying.evaluate(f"{row}[0][7]") == 1
    assert trying.evaluate(f"{row}.flat().filter((value) => value).length") == 2


def test_an_access_token_is_sent_and_not_shown(trying: Browser) -> None:
    choose(trying, "digits_cnn")
    trying.evaluate("window.sent = []; const ask = fetch; window.fetch = (...all) => (sent.push(all[1]), ask(...all))")
    trying.evaluate("document.getElementById('token').value = 'a-secret'")
    trying.evaluate("document.getElementById('access').requestSubmit()")
    trying.wait_for("sent.length >= 2")
    assert trying.evaluate("sent.every((each) => each.headers.authorization === 'Bearer a-secret')")
    trying.wait_for("document.getElementById('curl').textContent.includes('Bearer $TOKEN')")
    shown = "document.body.innerText + JSON.stringify({...localStorage, ...sessionStorage}) + document.cookie"
    assert "a-secret" not in trying.evaluate(shown + " + location.href")


def test_the_description_is_shown(browser: Browser, server: Server) -> None:
    browser.open(f"{server.url}/docs")
    routes = browser.wait_for("document.querySelectorAll('.opblock').length > 10 && document.body.innerText")
    assert "/v2/models/{name}/infer" in routes
    assert "Errors" not in routes  # Swagger UI's own heading over what it cannot resolve
    assert_from_here_alone(browser, server)


def test_a_page_of_ours_may_fetch_from_nowhere_else(trying: Browser) -> None:
    said = trying.evaluate("fetch('http://127.0.0.2:9/').then(() => 'fetched', (error) => error.message)")
    assert said == "Failed to fetch"
    ends = time.monotonic() + DEADLINE_S
    while not any("Content Security Policy" in each for each in trying.complaints):
        assert time.monotonic() < ends
        trying.evaluate("1")  # with whose answer comes what the browser has to say
