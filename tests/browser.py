"""A browser without a window, where the machine has one."""

import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The first browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def with_script(page: str, script: str) -> str:
    """A page that runs a script of ours when it has loaded."""
    return page.replace(
        "</body>", f'<script>addEventListener("load", async () => {{{script}}})</script></body>'
    )


def dom_after(page: Path, script: str, width: int = 1000) -> str:
    """The page's elements after it ran a script of ours, as HTML."""
    copy = page.with_name("in_browser.html")
    copy.write_text(with_script(page.read_text(encoding="utf-8"), script), encoding="utf-8")
    return dom_of(copy.as_uri(), page.parent / "profile", width)


def dom_of(address: str, profile: Path, width: int = 1000) -> str:
    """A page's elements when its scripts have run, as HTML; nothing but this machine is reachable."""
    browser = find()
    assert browser is not None
    done = subprocess.run(
        [
            *(browser, "--headless", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            *(f"--window-size={width},1400", f"--user-data-dir={profile}", address),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
