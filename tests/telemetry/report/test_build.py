"""The report: written from anything, with the numbers of the summary, and with no text that becomes markup."""

import json
import re
from html.parser import HTMLParser

import pytest

from d1jax.telemetry.metrics import MetricsLog
from d1jax.telemetry.report.build import report_html, write_report
from d1jax.telemetry.report.results import verdict
from d1jax.telemetry.report.run_data import RunData

NASTY = "</script><img src=x onerror=alert(1)>\"'&<>\u2028\ud800"
VOID = {"meta", "link", "br", "input", "img"}


class Page(HTMLParser):
    """Tags and visible text; fails on tags that are not closed in order, as hand-made HTML may be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.rows, self.data = [], [], "", [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.data.append(data)
            return
        self.text += data
        if "tr" in self.open:
            self.rows[-1] += data + " "


def score(n, rate, low, high, **others):
    return {"n": n, "solved_rate": rate, "solved_rate_ci95": [low, high], **others}


def summary(after=0.4213):
    sft, rl = score(1024, 0.2734, 0.24, 0.3, cell_accuracy=0.71), score(1024, after, 0.39, 0.4512, cell_accuracy=0.8)
    second = score(256, 0.25, 0.2, 0.31, cell_accuracy=0.69)
    return {
        "task": "sudoku",
        "decoding": {"steps": 8, "completion_length": 16},
        "primary_set": "held_out",
        "stages": [
            {"name": "sft", "step": 90, **sft, "sets": {"held_out": sft, "d1_eval_256": second}},
            {"name": "rl", "step": 40, **rl, "sets": {"held_out": rl}},
        ],
        "baselines": {"held_out": {"first_candidate": score(1024, 0.111, 0.09, 0.13, cell_accuracy=0.5)}},
        "environment": {"jax": "0.10.2"},
        "wall_seconds": {"sft": 30.1, "rl": 150.2},
    }


ORDER = {
    "local_ar": {"1": 0.5, "2": 0.25}, "global_ar": {"1": 0.75, "4": 1.0},
    "heat_map": {"share": [[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]], "steps": 4, "columns": 6},
    "first_step": {"entropy": [0.1, 1.5, 2.5, 2.5, 2.5, 2.25], "confidence": [0.9, 0.5, 0.25, 0.25, 0.25, 0.5], "rows": 8},
}  # fmt: skip


def with_order(**changes):
    data = summary()
    for stage in data["stages"]:
        stage["sets"]["held_out"]["decoding_order"] = {**ORDER, **changes}
    return data


def sample(stage, text="4312", **change):
    base = {
        "stage": stage, "set": "held_out", "index": 3, "prompt": "0310", "text": text, "reference": "4312",
        "grade": {"solved": float(text == "4312"), "cell_accuracy": 0.75}, "pieces": list(text),
        "reveal_step": [0, 1, 0, 1], "confidence": [0.9] * 4, "columns": 2,
    }  # fmt: skip
    return {**base, **change}


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\nname: <b>&\n")
    (run / "summary.json").write_text(json.dumps(summary()))
    with MetricsLog(run) as log:
        for step in range(1, 31):
            log.write("sft", step, {"loss": 3 / step, "time/step_s": 0.5})
        for step in range(1, 41):
            log.write("rl", step, {
                "reward": step / 40, "kl": float("nan") if step == 5 else 0.01 * step, "eval/held_out/solved": 0.3,
                "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.1, "time/rollout_s": 2.0, "time/update_s": 1.0,
            })  # fmt: skip
    lines = [sample("sft", "4311"), sample("rl")]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_full_run_has_every_section_in_order(run_dir):
    page = Page(write_report(run_dir).read_text())
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert ids == ["results", "curves", "samples", "player", "time", "setup"]
    assert "my-run" in page.text and "seed: 0" in page.text and "0.10.2" in page.text
    assert sorted(p.name for p in run_dir.iterdir() if "report" in p.name) == ["report.html"]


def test_the_numbers_are_those_of_the_summary(run_dir):
    page = Page(write_report(run_dir).read_text())
    text = page.text.replace("\u202f", " ")
    assert "27.3 % → 42.1 % of 1,024 held-out problems solved at 8 denoising steps" in text
    assert "the 95 % intervals do not overlap" in text
    rows = [" ".join(row.replace("\u202f", " ").split()) for row in page.rows]
    assert "after SFT 1,024 27.3 % [24.0, 30.0] 71.0 %" in rows
    assert "after RL 1,024 42.1 % [39.0, 45.1] 80.0 %" in rows
    assert "after SFT 256 25.0 % [20.0, 31.0] 69.0 %" in rows
    assert "baseline: first candidate 1,024 11.1 % [9.0, 13.0] 50.0 %" in rows
    assert "RL rollout 80.0 2.00 53 %" in rows
    assert "RL everything else 30.2 – 20 %" in rows


def test_every_row_of_the_results_has_the_columns_of_the_head(run_dir):
    """A short row would shift the axis of the interval plots against its marks."""
    html = write_report(run_dir).read_text().split('<table class="results">')[1].split("</table>")[0]
    widths = set()
    for row in html.split("<tr")[1:]:
        cells = re.findall(r"<t[hd]([^>]*)>", row)
        widths.add(sum(int((re.search(r'colspan="(\d+)"', cell) or [0, 1])[1]) for cell in cells))
    assert widths == {5}


def test_the_chart_data_are_those_of_the_metrics(run_dir):
    page = Page(write_report(run_dir).read_text())
    charts_data = [json.loads(d) for d in page.data if d.startswith('{"box"')]
    kl = next(c for c in charts_data if c["series"][0]["name"] == "nats per token")["series"][0]
    assert kl["x"] == list(range(1, 41))
    assert kl["y"][4] is None and kl["y"][39] == 0.4
    titles = re.findall(
        r'<span class="name">(.*?)</span>', report_html(RunData("r")) + write_report(run_dir).read_text()
    )
    assert titles == [
        "SFT loss", "Solved, during RL", "Reward", "KL to the reference", "Clipped tokens", "Time per step, SFT",
        "Time per phase, RL",
    ]  # fmt: skip


@pytest.mark.parametrize("missing", ["config.yaml", "summary.json", "metrics.jsonl", "samples.jsonl"])
def test_a_missing_file_is_said_and_survived(run_dir, missing):
    (run_dir / missing).unlink()
    assert f"{missing} is missing" in Page(write_report(run_dir).read_text()).text


def test_an_empty_directory_still_gets_a_report(tmp_path):
    page = Page(write_report(tmp_path).read_text())
    assert "No evaluation is recorded" in page.text
    assert not [tag for tag, _ in page.tags if tag == "section"]


def test_broken_files_are_said_and_survived(run_dir):
    (run_dir / "summary.json").write_text('{"task": ')
    (run_dir / "metrics.jsonl").write_text('garbage\n{"stage": "sft", "step": 1}\n')
    (run_dir / "samples.jsonl").write_text(json.dumps(sample("sft")) + "\n[1]\n{torn")
    text = Page(write_report(run_dir).read_text()).text
    assert "summary.json cannot be read" in text and "line 1" in text and "2 unreadable line(s)" in text


@pytest.mark.parametrize(
    "odd",
    [
        {"stages": None}, {"stages": [None, {}, {"name": "sft"}]}, {"stages": [{"name": "sft", "solved_rate": "nan"}]},
        {"stages": [{"name": "sft", "solved_rate": 0.5, "solved_rate_ci95": None}], "decoding": None},
        {"baselines": {"held_out": None}, "wall_seconds": {"sft": None}, "environment": []},
        {"stages": [{"name": "sft", "sets": {"held_out": {"solved_rate": float("nan"), "n": None}}}]},
    ],
)  # fmt: skip
def test_partial_summaries(odd):
    Page(report_html(RunData("run", summary=odd)))


def test_an_interrupted_run_reports_its_last_evaluation():
    rows = ({"stage": "rl", "step": 20, "eval/held_out/solved": 0.25},)
    text = verdict(RunData("run", metrics=rows)).replace("\u202f", " ")
    assert text == "25.0 % of held-out problems solved at RL step 20; no final evaluation is recorded."


def test_overlapping_intervals_are_called_so():
    data = summary(after=0.29)
    data["stages"][1]["sets"]["held_out"]["solved_rate_ci95"] = [0.26, 0.32]
    assert "the 95\u202f% intervals overlap." in verdict(RunData("run", summary=data))


@pytest.mark.parametrize("columns", [2, None])
def test_untrusted_text_never_becomes_markup(run_dir, columns):
    clean = [(tag, sorted(attrs)) for tag, attrs in Page(write_report(run_dir).read_text()).tags]
    nasty = summary()
    nasty["task"] = nasty["primary_set"] = NASTY
    nasty["environment"] = {NASTY: NASTY}
    nasty["stages"][0]["name"] = NASTY
    nasty["decoding"] = {NASTY: NASTY}
    (run_dir / "summary.json").write_text(json.dumps(nasty))
    (run_dir / "config.yaml").write_bytes(NASTY.encode("utf-8", "surrogatepass"))
    cells = [NASTY] * 4
    one = sample(NASTY, NASTY, prompt=NASTY, reference=NASTY, set=NASTY, index=NASTY, pieces=cells, columns=columns)
    (run_dir / "samples.jsonl").write_text(json.dumps(one) + "\n")
    with MetricsLog(run_dir) as log:
        log.write("rl", 41, {f"eval/{NASTY}/solved": 0.5})
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert "<img" not in html and not [tag for tag, _ in page.tags if tag == "img"]
    allowed = {name for _, names in clean for name in names}
    assert {name for _, attrs in page.tags for name in attrs} <= allowed
    assert "onerror" in page.text, "the text itself is shown"


def test_the_page_asks_for_nothing(run_dir):
    html = write_report(run_dir).read_text()
    assert "http://" not in html and "https://" not in html
    for tag, attrs in Page(html).tags:
        for name in ("src", "href", "xlink:href", "action"):
            assert attrs.get(name, "data:,") == "data:,", (tag, attrs)
    assert "@import" not in html and "url(" not in html
    assert "default-src 'none'" in html


def test_wrong_cells_are_marked_and_a_solved_puzzle_has_none(run_dir):
    html = write_report(run_dir).read_text()
    before, after = html.split("<h4>SFT")[1].split("<h4>RL")
    assert before.count("wrong") == 1
    assert "wrong" not in after.split("<section")[0]


# -- the order of decoding ---------------------------------------------------------------------------------------------


def order_section(data):
    html = report_html(RunData("run", summary=data))
    Page(html)
    return html.split('<section id="order"')[1].split("</section>")[0] if 'id="order"' in html else ""


def test_the_order_of_decoding_is_drawn_from_the_summary():
    section = order_section(with_order())
    assert re.findall(r'<span class="name">(.*?)</span>', section) == [
        "Order of decoding, SFT", "Order of decoding, RL", "Local autoregressiveness @k",
        "Global autoregressiveness @k", "Entropy, all masked", "Confidence, all masked",
    ]  # fmt: skip
    drawn = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', section)]
    assert drawn[0]["series"] == [{"name": n, "x": [1.0, 2.0], "y": [0.5, 0.25]} for n in ("SFT", "RL")]
    assert drawn[2]["series"][0]["x"] == [1, 2, 3, 4, 5, 6] and drawn[2]["series"][0]["y"][0] == 0.1
    assert [one["at"] for one in drawn] == ["k", "k", "position", "position"]


def test_the_section_stands_between_the_player_and_the_time(run_dir):
    (run_dir / "summary.json").write_text(json.dumps(with_order()))
    ids = [attrs["id"] for tag, attrs in Page(write_report(run_dir).read_text()).tags if tag == "section"]
    assert ids == ["results", "curves", "samples", "player", "order", "time", "setup"]


def test_the_order_is_no_column_of_the_results():
    html = report_html(RunData("run", summary=with_order()))
    assert "decoding order" not in html.split('<table class="results">')[1].split("</table>")[0]


def test_without_the_data_there_is_no_section():
    assert order_section(summary()) == ""


@pytest.mark.parametrize(
    "broken",
    [
        None, [], {"share": None}, {"share": [[]], "steps": 1, "columns": 1}, {"share": [[1.0], [1.0, 2.0]], "steps": 2, "columns": 2},
        {"share": [["x"]], "steps": 1, "columns": 1}, {"share": [[float("nan")]], "steps": 1, "columns": 1},
        {"share": [[1.0]], "steps": 0, "columns": 1}, {"share": [[0.0]], "steps": 1, "columns": 1}, {"share": [], "steps": 1, "columns": 1},
    ],
)  # fmt: skip
def test_a_broken_heat_map_is_left_out_and_the_curves_stay(broken):
    section = order_section(with_order(heat_map=broken))
    assert "Order of decoding" not in section and "Local autoregressiveness" in section


@pytest.mark.parametrize("broken", [None, {"1": None}, {"x": 1.0}, [0.5], {"1": "<b>"}])
def test_a_broken_curve_is_left_out(broken):
    section = order_section(with_order(local_ar=broken, first_step=broken))
    assert "Local auto" not in section and "Entropy" not in section and "Order of decoding" in section


# -- in a browser, from disk -------------------------------------------------------------------------------------------


def test_curves_are_read_by_keyboard_and_pointer(browser, run_dir):
    browser.problems.clear()
    browser.open(write_report(run_dir))
    readout = "document.querySelector('figure.chart .readout').textContent"
    browser.look("document.querySelector('figure.chart > svg').focus()")
    browser.press("ArrowRight", times=2)
    assert browser.look(readout) == "step 2: 1.5"
    browser.look("document.querySelector('figure.chart > svg').blur()")
    assert browser.look(readout) == ""
    place = browser.look(
        "(() => { const b = document.querySelector('figure.chart > svg').getBoundingClientRect();"
        " scrollTo(0, b.top - 200); const c = document.querySelector('figure.chart > svg').getBoundingClientRect();"
        " return [c.left + c.width / 2, c.top + c.height / 2]; })()"
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    assert re.fullmatch(r"step 1[3-7]: 0\.\d+", browser.look(readout))
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_report_fits_a_telephone_in_light_and_dark(browser, run_dir, dark):
    browser.open(write_report(run_dir), width=400, dark=dark)
    assert browser.look("document.documentElement.scrollWidth") <= 400
    ground = browser.look("getComputedStyle(document.body).backgroundColor")
    ink = browser.look("getComputedStyle(document.querySelector('text.tick')).fill")
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ground, ink)]
    assert (bright[0] < bright[1]) == dark
