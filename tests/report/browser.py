"""A browser without a window, where the machine has one."""

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The first browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def dom_after(page: Path, script: str, width: int = 1000) -> str:
    """The page's elements after it ran a script of ours, as HTML."""
    browser = find()
    assert browser is not None
    copy = page.with_name("in_browser.html")
    later = f'addEventListener("load", () => {{{script}}})'
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{later}</script></body>")
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            *(browser, "--headless", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            *(f"--window-size={width},1400", f"--user-data-dir={page.parent / 'profile'}", copy.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
