"""The chat page in a browser, with a real server, whose policy lets no other script run."""

import base64
import hashlib
import os
import shutil

import pytest

pytest.importorskip("starlette")
from servers import SCRIPT, Server, write_scripted

from llama_jax.serving.app import content_security_policy

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_the_policy_names_the_scripts_of_the_page():
    policy = content_security_policy("<p><script type='module'>\nlet a;</script><script>b</script>")
    for source in ("\nlet a;", "b"):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "script-src 'none'" in content_security_policy("<p>")


@pytest.mark.page
def test_the_page_talks_to_the_server_and_runs_no_other_script(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium; install it with: apt install chromium")
    cache = os.environ.get("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    server = Server(
        f"--model={write_scripted(tmp_path / 'script')}", env={"LLAMA_JAX_CACHE": cache}
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, problems = browser.new_page(), []
        page.on("console", lambda line: problems.append(line.text))
        page.goto(server.url)
        page.fill("#draft", "hello")
        page.keyboard.press("Enter")
        page.get_by_text(SCRIPT).first.wait_for(timeout=20_000)
        assert problems == []
        page.evaluate(
            "() => { const tag = document.createElement('script'); tag.textContent = 'ran = 1';"
            " document.body.append(tag); }"
        )
        assert page.evaluate("() => 'ran' in window") is False
        assert "Content Security Policy" in "".join(problems)
        browser.close()
    assert server.stop() == 0
