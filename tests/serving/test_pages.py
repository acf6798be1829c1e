"""The pages: whole, from this service alone, and with a request that every model answers."""

import re
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest

import bln_serve
from bln_serve.serving import pages

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
# What a browser fetches without being asked, as HTML, CSS and JavaScript write it.
FETCHED = re.compile(
    r"""(?:\bsrc|\bhref|\bsrcset|\baction|\bposter)\s*=\s*["']?([^"'\s>]+)|url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)"""
    r"""|\bfrom\s+["']([^"']+)|\bimport\(?\s*["']([^"']+)|\bfetch\(\s*["'`]([^"'`]+)""",
    re.IGNORECASE,
)
OTHER_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)


def fetched(text: str) -> list[str]:
    return [next(filter(None, groups)) for groups in FETCHED.findall(text)]


def page(service: Any, path: str) -> httpx.Response:
    answer = service.request("GET", path, headers=HTML)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_everything_on_a_page_is_here(path: str, service: Any) -> None:
    addresses = fetched(page(service, path).text)
    assert len(addresses) >= 3
    for address in addresses:
        assert not OTHER_ADDRESS.match(address)
        assert not address.startswith("/"), "a proxy may serve this under a prefix"
        assert service.get(urljoin(path, address)).status_code in (200, 503), address  # 503: readyz, while not ready


@pytest.mark.parametrize("name", pages.OWN)
def test_a_file_of_ours_fetches_from_nowhere_else(name: str, service: Any) -> None:
    answer = service.get(f"/static/{name}")
    assert answer.status_code == 200
    assert answer.text.strip()
    for address in fetched(answer.text):
        assert not OTHER_ADDRESS.match(address)
        if name.endswith(".js") and address.startswith("./"):
            assert service.get(urljoin("/static/", address)).status_code == 200


def test_the_search_for_other_addresses_finds_them() -> None:
    wrong = (
        '<script src="https://x/a.js">',
        "<link href=//x/a.css>",
        "a { background: url(http://x/a.png) }",
        '@import "https://x/a.css";',
        'import { a } from "https://x/a.js";',
        'fetch("https://x/a")',
    )
    for text in wrong:
        assert [each for each in fetched(text) if OTHER_ADDRESS.match(each)], text


def test_swagger_ui_is_served_from_here_and_asks_nobody_else(service: Any) -> None:
    style = service.get("/docs/swagger-ui.css")
    assert style.headers["content-type"] == "text/css; charset=utf-8"
    assert [each for each in fetched(style.text) if not each.startswith("data:")] == []
    script = service.get("/docs/swagger-ui-bundle.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    # It shows specifications of version 3.1 from 5.0 on; its own validator, at another address, is switched off.
    assert int(re.findall(r'PACKAGE_VERSION:"(\d+)\.', script.text)[0]) >= 5
    assert "validatorUrl: null" in service.get("/static/docs.js").text


@pytest.mark.parametrize("path", ["/", "/docs", "/static/try.js", "/docs/swagger-ui.css"])
def test_a_page_may_fetch_from_this_service_alone(path: str, service: Any) -> None:
    headers = service.request("GET", path, headers=HTML).headers
    policy = dict(rule.strip().partition(" ")[::2] for rule in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["object-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert set(" ".join(policy.values()).split()) == {"'self'", "'none'", "data:"}
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_has_no_script_and_no_style_in_it(path: str, service: Any) -> None:
    text = page(service, path).text
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text)
    assert all(not inline.strip() for inline in re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL))


@pytest.mark.parametrize("path", ["/", "/docs", "/static/try.css"])
def test_a_page_is_fetched_again_only_where_it_changed(path: str, service: Any) -> None:
    first = service.request("GET", path, headers=HTML)
    assert first.headers["cache-control"] == "no-cache"
    again = service.request("GET", path, headers={**HTML, "if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = service.request("HEAD", path, headers=HTML)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize(
    "path", ["/static/nothing.js", "/docs/nothing", "/docs/__init__.py", "/static/..%2Fpages.py", "/static/index.html"]
)
def test_nothing_else_is_served(path: str, service: Any) -> None:
    answer = service.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"].startswith("Expected a route of this service")


@pytest.mark.parametrize("path", ["/", "/docs", "/static/try.js"])
def test_a_page_is_only_read(path: str, service: Any) -> None:
    answer = service.post(path)
    assert answer.status_code == 405
    assert set(answer.headers["allow"].replace(" ", "").split(",")) == {"GET", "HEAD"}


@pytest.mark.parametrize("accept", ["application/json", "*/*", ""])
def test_who_wants_no_page_is_told_where_things_are(accept: str, service: Any) -> None:
    answer = service.request("GET", "/", headers={"accept": accept})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["vary"] == "accept" == page(service, "/").headers["vary"]
    document = answer.json()
    assert (document["name"], document["version"], document["status"]) == ("bln_serve", bln_serve.__version__, "alive")
    for name, path in document["links"].items():
        assert service.get(path).status_code == (405 if name == "predict" else 200)


def test_every_model_answers_its_example(service: Any) -> None:
    names = [model["name"] for model in service.get("/models").json()["models"]]
    assert len(names) == 7
    for name in names:
        example = service.get(f"/models/{name}/example")
        answer = service.post(f"/models/{name}/predict", json=example.json())
        assert answer.status_code == 200, answer.text
        assert service.get(f"/models/{name}/example").content == example.content


def test_the_models_are_listed_as_each_tells_of_itself(service: Any) -> None:
    models = service.get("/models").json()["models"]
    assert models == [service.get(f"/models/{model['name']}").json() for model in models]
    assert {"digits_cnn", "tiny_two_inputs"} < {model["name"] for model in models}
