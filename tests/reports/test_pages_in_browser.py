"""The pages in a browser: nothing logged, nothing wider than a phone, and a filter that works without a server."""

import json
import re
import shutil
import subprocess

import pytest

from tests.reports.evaluated import make_evaluated
from transfgu_ray.pipeline.pages import rebuild_pages

# A window cannot be narrower than 500 px, but a frame can.
_FRAME = """<!doctype html><body><iframe width=390 height=844 src=PAGE></iframe><script>
const frame = document.querySelector("iframe"), found = {};
frame.addEventListener("load", () => {
  const page = frame.contentDocument, inside = frame.contentWindow;
  const all = (selector) => [...page.querySelectorAll(selector)];
  found.widths = [page.documentElement.scrollWidth, inside.innerWidth];
  const size = (element) => parseFloat(inside.getComputedStyle(element).fontSize);
  found.small = all("p, td, figcaption, dd").filter((element) => size(element) < 11).length;
  const words = page.getElementById("words");
  const shown = () => all(".card").filter((card) => card.offsetHeight).map((card) => card.id);
  if (words) {
    const type = (text) => { words.value = text; words.dispatchEvent(new inside.Event("input")); return shown(); };
    found.all = type("").length, found.one = type("1"), found.zebra = type("ZEBR"), found.none = type("nothing such");
    found.count = page.getElementById("count").textContent, found.nothing = !page.getElementById("nothing").hidden;
    inside.location.hash = "#concept-3";
  }
  setTimeout(() => {
    if (words) {
      found.linked = shown().length;
      page.querySelector(".map a").focus();
      found.tip = page.querySelector(".tip").textContent;
    }
    document.title = JSON.stringify(found);
  }, 300);
});
</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = make_evaluated(tmp_path_factory.mktemp("browser") / "run")
    rebuild_pages(made)
    return made


def look(run, page):
    """Return what a script finds on a page 390 px wide, and what the browser logs."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    run.folder.write_bytes("frame.html", _FRAME.replace("PAGE", page).encode())
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom",
        "--enable-logging=stderr",
        "--allow-file-access-from-files", "--virtual-time-budget=5000", f"--user-data-dir={run.folder.join('browser')}",
        f"file://{run.folder.join('frame.html')}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    logged = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)
    return json.loads(title), logged


def test_report__in_a_browser_logs_nothing_and_is_no_wider_than_a_phone(run):
    found, logged = look(run, "report.html")
    assert logged == []
    assert found["widths"] == [390, 390]
    assert found["small"] == 0


def test_atlas__in_a_browser_filters_concepts_and_describes_the_focused_one(run):
    found, logged = look(run, "atlas.html")
    assert logged == []
    assert found["widths"] == [390, 390]
    assert found["small"] == 0
    assert found["all"] == 16
    assert found["one"] == ["concept-1"], "a number matches only itself"
    assert found["zebra"] == ["concept-0"]
    assert (found["none"], found["count"], found["nothing"]) == ([], "0 concepts", True)
    assert found["tip"].startswith("concept 0 · matched to zebra")
    assert found["linked"] == 16, "a link to a hidden concept resets the filter"
