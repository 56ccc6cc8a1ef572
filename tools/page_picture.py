"""Draw docs/page.png: the page in headless Chromium, after a model has continued a text.

    python -m tools.page_picture MODEL      as out/demo/model of make demo; the machine should be idle: the picture has
                                            tokens per second in it

Needs Debian's chromium, and playwright of the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from gptcore.serving.limits import Limits
from gptcore.serving.load import load
from gptcore.serving.server import listen, make_app, make_server

PICTURE = Path(__file__).parents[1] / "docs" / "page.png"
PROMPT, SEED, TOKENS = "Return a list of all the", 7, 70
SHOWN = 12  # the token whose alternatives are shown


def draw(page: Page, address: str) -> None:
    """Continue the prompt twice, as the first time loads what later ones have in memory; take the picture."""
    page.goto(address)
    page.wait_for_selector("[role=tab]")
    page.click("summary")
    page.fill("#max_tokens", str(TOKENS))
    page.fill("#seed", str(SEED))
    page.click("summary")
    page.fill("#prompt", PROMPT)
    for _ in range(2):
        page.click("#run")
        page.wait_for_selector("#export:not([disabled])")
    page.locator("#output .token").nth(SHOWN).focus()
    print(page.locator("#numbers").text_content())
    page.screenshot(path=PICTURE, full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.page_picture", description="Draw docs/page.png.")
    parser.add_argument("model", metavar="MODEL", help="folder of a model")
    limits = Limits()
    served, routers = load(parser.parse_args().model, "demo", limits)
    with listen("127.0.0.1", 0) as sock:
        server = make_server(make_app(served, routers), limits)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            with sync_playwright() as started:
                options = ["--no-sandbox"] if os.geteuid() == 0 else []
                browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=options)
                page = browser.new_page(viewport={"width": 960, "height": 640})
                draw(page, f"http://127.0.0.1:{sock.getsockname()[1]}/")
                browser.close()
        finally:
            server.should_exit = True
            thread.join()
            served.close()


if __name__ == "__main__":
    main()
