"""The report of a small real run: every section, nothing fetched from elsewhere, and a browser that finds no fault."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest
from PIL import Image
from typer.testing import CliRunner

from experiments.baselines.programs import FewerSteps
from experiments.cli import app
from experiments.grid import read_experiment
from experiments.report import write_report
from experiments.report.data import read_groups
from experiments.report.labels import program_labels
from experiments.report.results import result_section
from experiments.run import prepare, run
from experiments.run_folder import open_run
from relay.errors import BadRequest
from relay.program import Program

CONFIG = """
name: report-test
description: A <short> run & its report
workload: {name: scenes, split: validation, count: 5}
families: [mini-sdxl]
steps: [4]
programs:
  - {mode: full-cloud}
  - {mode: relay, handoff: [1, 2, 3]}
  - {mode: edge-only}
matching: [exact]
codec: [fp16, int8]
baselines: ["test_report:Few", sada]
links:
  - wifi
  - {name: far, like: lte, scaled: {real_step_s: 0.3, source: "a test (not measured)"}}
deviation: 2
times: {repeats: 1, curve: [1]}
expected:
  - {claim: relays keep quality, source: a paper, value: 1.0, where: {mode: relay, handoff: 0.5, codec: fp16, measure: ratio}}
  - {claim: never measured, value: 2, where: {mode: other}}
"""
SECTIONS = {
    "short", "front", "pictures", "intensity", "classes", "stages", "networks", "codecs", "expected", "baselines",
}  # fmt: skip
CHECK = """<script>
window.faults = [];
window.addEventListener('error', e => faults.push(String(e.message || e.target.tagName)), true);
window.addEventListener('load', () => {
  for (const image of document.images) if (!image.complete || !image.naturalWidth) faults.push('broken: ' + image.alt);
  for (const chart of document.querySelectorAll('svg.chart')) {
    const seen = [...chart.querySelectorAll('g.mark')].filter(g => { const b = g.getBBox(); return b.width + b.height > 0 });
    const size = chart.getBoundingClientRect();
    if (!seen.length || size.width < 200 || size.height < 100) faults.push('empty: ' + chart.getAttribute('aria-label'));
  }
  document.title = JSON.stringify({
    faults, images: document.images.length, charts: document.querySelectorAll('svg.chart').length, wide: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth, ground: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector('svg.chart text')).fill,
  });
});
</script>"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


ROUTING = Path(__file__).parents[2] / "docs" / "results" / "routing.md"


class Few(FewerSteps):
    """A baseline in a moment: one setting."""

    name = "few"
    shares = (0.1,)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of real code: one family, few steps, a prompt a class."""
    root = tmp_path_factory.mktemp("report")
    (root / "config.yaml").write_text(CONFIG)
    run(prepare(read_experiment(root / "config.yaml"), "config.yaml"), root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def page(folder):
    return write_report([folder], results=[ROUTING])


def section(text, name):
    return re.search(rf'<section id="{name}".*?</section>', text, re.DOTALL)[0]


def test_every_section_is_there_and_none_is_left_out_of_a_full_run(page):
    text = page.read_text()
    assert set(re.findall(r'<section id="(\w+)"', text)) == SECTIONS
    assert "Left out" not in text
    assert "latency, batch 1" in section(text, "short")
    assert "computed in</dt><dd>fp32" in text
    assert "(scaled)" in section(text, "stages")
    assert "a test (not measured)" in html.unescape(section(text, "networks"))
    assert 'id="origin"' in text


def test_nothing_is_fetched_from_elsewhere(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert "<script" not in text


def test_every_picture_decodes_and_has_words(page):
    images = re.findall(r'<img src="data:image/\w+;base64,([^"]+)" alt="([^"]+)"', page.read_text())
    assert len(images) >= 5 * 5  # classes x (small, three s, large)
    for data, alt in images:
        assert Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB").width > 8
        assert ": " in alt


def test_figures_for_papers_lie_beside_the_page(page, folder):
    figures = page.parent / "figures"
    names = {path.stem for path in figures.glob("*.png")}
    kinds = (
        "front",
        "intensity",
        "deviation",
        "classes",
        "stages",
        "networks",
        "codec-error",
        "codec-score",
        "pictures",
    )
    for kind in kinds:
        assert any(name.startswith(kind) for name in names), kind
    assert all(Image.open(figures / f"{name}.png").width > 600 for name in names)
    rows = list(csv.DictReader((figures / "summary.csv").open()))
    outcomes = open_run(folder).outcomes
    assert {row["program"] for row in rows} == set(outcomes["program"])
    for row in rows:
        mean = outcomes.filter(program=row["program"])["score_attributes"].mean()
        assert float(row["score"]) == pytest.approx(mean)
        assert float(row["speedup"]) > 0


def test_codecs_show_the_latents_error_beside_bytes_and_score(page, folder):
    text = section(page.read_text(), "codecs")
    stored = open_run(folder).outcomes.filter(mode="relay", handoff=1)
    for codec in ("fp16", "int8"):
        assert f"{stored.filter(codec=codec)['codec_error'].mean():.2e}" in text
    assert text.count("error of the latent, relative") == 2  # an axis of both charts


def test_the_latents_intensity_is_drawn_from_the_first_step_on(page):
    rows = list(csv.DictReader((page.parent / "figures" / "intensity-mini-sdxl.csv").open()))
    for s in (1, 2, 3):
        mine = [row for row in rows if row["label"].startswith(f"s = {s},")]
        before = [float(row["position"]) for row in mine if row["large_before"]]
        after = [float(row["position"]) for row in mine if row["relay"]]
        assert before == [float(i) for i in range(1, s + 1)]
        assert min(after) > s
        assert max(after) == 4
    text = section(page.read_text(), "intensity")
    assert text.count("first 3 steps, shared by the relays") == 1  # one line, of the longest, for all three


def test_a_claim_stands_beside_what_was_measured_or_says_that_nothing_was(page):
    text = section(page.read_text(), "expected")
    kept, never = text.index("relays keep quality"), text.index("never measured")
    assert "ratio" in text[kept:never]
    assert "s = 2, n = " in text[kept:never]
    assert "not measured here" in text[never:]


def test_a_baseline_that_does_not_apply_says_why(page, folder):
    reason = open_run(folder).facts["baselines"]["mini-sdxl"]["sada"]
    assert html.escape(reason, quote=False).replace("'", "&#39;") in section(page.read_text(), "baselines")


BAD = "<script>alert(1)</script><img src=x>\"'"


@pytest.fixture(scope="module")
def bare_page(folder, tmp_path_factory):
    """Of the same run without times, watched latents and a second codec, with markup for a prompt, by the command."""
    root = tmp_path_factory.mktemp("bare")
    shutil.copytree(folder, root / "run", ignore=shutil.ignore_patterns("times", "curves", "report"))
    rows = next((root / "run" / "outcomes").glob("*.parquet"))
    frame = pl.read_parquet(rows).filter(pl.col("codec").fill_null("fp16") == "fp16")
    unwatched = [c for c in frame.columns if c.startswith(("deviation", "intensity"))]
    first = pl.col("prompt_index") == 0
    frame.with_columns(
        *(pl.lit(None, dtype=frame[c].dtype).alias(c) for c in unwatched),
        prompt=pl.when(first).then(pl.lit(BAD)).otherwise("prompt"),
        complexity=pl.when(first).then(pl.lit("<b>$x$")).otherwise("complexity"),
    ).write_parquet(rows)
    done = CliRunner().invoke(app, ["report", str(root / "run"), "--out", str(root / "out"), "--title", BAD])
    assert str(root / "out" / "report.html") in done.stdout.replace("\n", ""), done.exception
    return root / "out" / "report.html"


def test_what_a_run_has_no_data_for_is_left_out_with_a_reason(bare_page):
    text = bare_page.read_text()
    for name in SECTIONS:
        left_out = name in ("front", "intensity", "stages", "networks", "codecs")
        assert ("Left out: " in section(text, name)) == left_out, name


def test_a_run_from_before_some_columns_were_stored_can_still_be_reported(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    for rows in (tmp_path / "run" / "outcomes").glob("*.parquet"):
        pl.read_parquet(rows).drop("codec_error", "intensity_prefix").write_parquet(rows)
    text = write_report([tmp_path / "run"]).read_text()
    assert "RMS error of the picture against fp16" in section(text, "codecs")
    assert "Left out" not in text


def test_runs_in_two_dtypes_are_not_taken_for_shards_of_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("report", "images"))
    facts = json.loads((folder / "run.json").read_text())
    assert set(facts["dtypes"].values()) == {"fp32"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"dtypes": {"mini-sdxl": "bf16"}}))
    groups = read_groups([open_run(folder), open_run(tmp_path / "run")])
    assert [group.label.split()[-1] for group in groups] == ["fp32", "bf16"]
    assert all(len(group.shards) == 1 for group in groups)


def test_text_of_a_run_is_never_markup(bare_page):
    text = bare_page.read_text()
    assert f"<h1>{html.escape(BAD, quote=False)[:40]}" in text
    assert f"</span>{html.escape(BAD, quote=False)[:40]}" in text  # as a prompt beside its pictures
    for tag in ("<script", "<img src=x", "<b>"):
        assert tag not in text


def test_tables_that_other_commands_measured_stand_in_the_same_page(page):
    shown, written = section(page.read_text(), "result-routing"), ROUTING.read_text()
    assert '<a href="#result-routing">Routing</a>' in page.read_text()
    assert shown.count("<table>") == shown.count('class="scroll"') == len(re.findall(r"^\| ---", written, re.MULTILINE))
    assert shown.count('<img src="data:image/png;base64,') == written.count("![") > 0
    assert "<h3>mini-sd3, RouteT2I" in shown
    assert "<td>83.97</td>" in shown  # the paper's


def test_a_result_is_shown_as_text_and_refused_where_its_picture_is_not_there(folder, tmp_path):
    result = tmp_path / "Own table.md"
    result.write_text("# Mine\n\n<b>bold</b> [elsewhere](http://example.org/x)\n\n![p](lost.png)\n")
    with pytest.raises(BadRequest, match=r"lost\.png cannot be shown"):
        write_report([folder], tmp_path / "out", results=[result])
    result.write_text(result.read_text().split("![")[0])
    shown = result_section(result)
    assert (shown.id, shown.title) == ("result-own-table", "Mine")
    assert "&lt;b&gt;bold&lt;/b&gt; <span>elsewhere</span>" in shown.body
    with pytest.raises(BadRequest, match=r"nowhere\.md cannot be shown"):
        result_section(tmp_path / "nowhere.md")


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="no run folder"):
        write_report([tmp_path])


def browse(page, *options, timeout=180):
    """The page's DOM after all has run, and what the browser's console said."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=5000", *options, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_browser
@pytest.mark.parametrize("view", ["desktop, light", "phone, dark"])
def test_a_browser_finds_no_error_no_broken_image_and_no_empty_chart(page, tmp_path, view):
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    checked = tmp_path / "checked.html"
    checked.write_text(text.replace("</title>", "</title>" + CHECK, 1))
    options = (
        ["--window-size=1280,900"]
        if "desktop" in view
        else ["--window-size=390,844", "--blink-settings=preferredColorScheme=0"]
    )
    dom, said = browse(checked, *options)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))
    assert found["faults"] == []
    assert said == []
    assert found["images"] == text.count("<img ")
    assert found["charts"] == text.count("<svg ") >= 9
    assert found["overflow"] <= 0
    light = view.endswith("light")
    assert (found["ground"] == "rgb(255, 255, 255)") == light
    ink = [int(value) for value in re.findall(r"\d+", found["ink"])[:3]]
    assert (sum(ink) < 200) == light  # the charts' ink is the page's


@in_browser
def test_the_page_as_it_is_says_nothing_on_the_console(page, tmp_path):
    shutil.copy(page, tmp_path / "page.html")
    dom, said = browse(tmp_path / "page.html")
    assert "</footer>" in dom
    assert said == []


def test_relays_of_as_many_steps_on_schedules_of_other_lengths_are_told_apart():
    legs = ("0-14/small:28:22-28", "0-14/small:12:6-12", "0-11/small:28:19-28")
    texts = [f"mini-sdxl/large:28:{leg}/match=exact/codec=fp16/guidance=2,2/conditioning=encode" for leg in legs]
    labels = program_labels([Program.parse(text) for text in texts])
    assert list(labels.values()) == ["s = 14, n = 6 of 28", "s = 14, n = 6 of 12", "s = 11, n = 9"]
