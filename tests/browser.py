"""A headless Chromium for the tests of the page: what stands on its console, what is on the page, how it looks."""

from dataclasses import dataclass
from pathlib import Path
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page: its elements as text after the scripts ran, and the lines of its console."""

    dom: str
    console: list[str]


def browser() -> str:
    """The program; where there is none, the test that asks is skipped."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt install {NAMES[0]})")
    return found


def opened(page: Path, width: int = 1200) -> Seen:
    """Open the page, let its scripts run, and tell what is there; nothing outside of the machine can be reached."""
    finished = _run(page, "--dump-dom", "--enable-logging=stderr", f"--window-size={width},2000")
    return Seen(finished.stdout, re.findall(r"CONSOLE.*", finished.stderr))


def screenshot(page: Path, picture: Path, width: int, height: int) -> Path:
    """A picture of the page in a window of that size, PNG."""
    _run(page, f"--screenshot={picture}", "--hide-scrollbars", f"--window-size={width},{height}")
    return picture


def _run(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = page.parent / f".browser-{page.stem}"
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *options, page.resolve().as_uri(),
    ]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(profile, ignore_errors=True)
    assert finished.returncode == 0, finished.stderr
    return finished
