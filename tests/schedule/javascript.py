"""Runs the explore page's scripts: its rules and simulator in node, the whole page in headless Chromium."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipekern.schedule import Costs, explore

PURE = ("rules.js", "fill.js", "simulate.js", "text.js")
NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_node = pytest.mark.skipif(NODE is None, reason="needs node (apt-get install nodejs)")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")

GOOD = "pipekern-schedule name=x microbatches=1 stage_rank=0,1\n0F0 0BW0\n1F0 1BW0\n"

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--window-size=1280,900",
    "--virtual-time-budget=3000",
]


def facts() -> dict[str, Any]:
    """What the page knows of each schedule."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', explore.page(), re.DOTALL)
    assert found is not None
    schedules: dict[str, Any] = json.loads(found[1])["schedules"]
    return schedules


def in_node(body: str, given: Any, folder: Path) -> Any:
    """What the function body ``body`` returns for ``given``, the page's pure scripts being in scope."""
    assert NODE is not None
    script = folder / "script.cjs"
    call = f"const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));\nconst work = () => {{{body}}};"
    parts = ['"use strict";', *map(explore.source, PURE), call, "console.log(JSON.stringify(work()));"]
    script.write_text("\n".join(parts))
    done = subprocess.run([NODE, str(script)], input=json.dumps(given), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Page(NamedTuple):
    """A page as it stands after it was loaded, and what it wrote to the console."""

    dom: str
    console: list[str]

    def text(self, name: str) -> str:
        """The text of the element with this id, which holds no other element."""
        found = re.search(rf'<(\w+)[^>]*\bid="{name}"[^>]*>(.*?)</\1>', self.dom, re.DOTALL)
        assert found is not None, f"no element {name}"
        return html.unescape(found[2])


def in_chromium(path: Path, fragment: str = "") -> Page:
    """Load the file ``path``, with ``fragment`` as the address's part after #."""
    assert CHROMIUM is not None
    profile = path.parent / "profile"
    address = path.resolve().as_uri() + fragment
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", address]
    browser = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        dom, log = browser.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(browser.pid, signal.SIGKILL)
        raise
    assert "</html>" in dom, log
    return Page(dom, [line for line in log.splitlines() if "CONSOLE" in line])


def with_script(body: str) -> str:
    """The page with a script of the test's after its own; what the function body returns is the element ``outcome``."""
    script = f"<pre id=outcome></pre><script>const work = () => {{{body}}};\n"
    script += "document.getElementById('outcome').textContent = JSON.stringify(work());</script></body>"
    return explore.page().replace("</body>", script)


def exact(costs: dict[str, Any]) -> Costs:
    """The same costs as the decimals that they are written as: the page counts in thousandths."""
    decimals = {key: None if value is None else Fraction(str(value)) for key, value in costs.items()}
    return Costs(**decimals)  # type: ignore[arg-type]
