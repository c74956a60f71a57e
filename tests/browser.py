"""A page, opened in a real browser without a window: what became of it, and what it complained about."""

import json
import re
import shutil
import subprocess

import pytest

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

# Runs before the page's own script, and tells at the end what went wrong and what was asked for.
_PROBE = """<script>
const found = {errors: [], refused: []};
addEventListener("error", (event) => found.errors.push(event.message || String(event.target)), true);
addEventListener("securitypolicyviolation", (event) => found.refused.push(event.blockedURI));
const complain = console.error;
console.error = (...words) => { found.errors.push(words.join(" ")); complain(...words); };
addEventListener("load", () => {
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  ACTION;
  const answer = document.createElement("template");
  answer.id = "probe";
  answer.dataset.found = JSON.stringify(found);
  document.body.append(answer);
});
</script>"""


def open_in_browser(page, tmp_path, action=""):
    """The DOM after loading, and `errors`, `refused` and `requests`; `action` is JavaScript that may add to `found`."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8")
    probed.write_text(text.replace("<head>", f"<head>{_PROBE.replace('ACTION', action)}", 1), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    run = subprocess.run(
        [*command, "--dump-dom", probed.as_uri()], capture_output=True, text=True, encoding="utf-8", timeout=120
    )
    answer = re.search(r'id="probe" data-found="([^"]*)"', run.stdout)
    assert answer, run.stderr[-2000:]
    return run.stdout, json.loads(answer[1].replace("&quot;", '"').replace("&amp;", "&"))
