"""A real browser that lays out a page and says what a reader would see of it: Debian's chromium, without a window."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

MEASURE = Path(__file__).with_name("layout.js")


def install() -> None:
    """With apt-get, where chromium is missing."""
    if not shutil.which("chromium"):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
            subprocess.run(["apt-get", "-q", *words], env=env, check=True, capture_output=True)


def look(page: Path, *, width: int, dark: bool = False) -> SimpleNamespace:
    """What a window of this width (pixels) shows of an HTML file. Nothing is loaded from a network.

    Returns:
        `width` of the window and `content` of what is in it, `cards` by their names, `titles` of the tables, how many
        `images` and `charts`, which of the images are `broken`, texts of charts that lie `outside` of them or
        `overlapping`, texts `cut` off by their boxes, boxes `beyond` the window, and the page's `colours`.
    """
    beside = page.with_suffix(".measured.html")
    beside.write_text(page.read_text().replace("</body>", f"<script>{MEASURE.read_text()}</script></body>"))
    command = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},1000", "--virtual-time-budget=5000",
        "--host-resolver-rules=MAP * ~NOTFOUND", *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom", beside.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return SimpleNamespace(**json.loads(html.unescape(found[1])))
