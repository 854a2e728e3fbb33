"""Fixtures of the chat page: a browser, a server with scripted answers, and a page of it."""

import pytest
from page_driver import CHROMIUM


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium; install it with: apt install chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def page_server():
    pytest.importorskip("uvicorn")
    from fake_server import FakeServer

    with FakeServer() as running:
        yield running


@pytest.fixture
def open_page(browser, page_server):
    """Opens the page in a browser without history; it must raise and log no error."""
    contexts, problems, outside = [], [], []

    def opened(url=page_server.url, script="", **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 700}, **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if is_problem(line) else None)
        page.on("request", lambda request: outside.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto(url)
        page.wait_for_selector("#model option, .notice, dialog[open]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in outside if not url.startswith(("http://127.0.0.1:", "blob:"))] == []


def is_problem(line):
    return line.type == "error" and "Failed to load resource" not in line.text


@pytest.fixture
def page(open_page):
    return open_page()
