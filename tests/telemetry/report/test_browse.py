"""Protects: whatever a model writes stays text on the page of an evaluation, every row is there, and what is cut is told."""

import json
import re

import pytest

from d1jax.telemetry.report import browse

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "\ud800 lone \udfff",
    "\x00\x1b[31m\u2028\u2029",
    "{{ 7 * 7 }} {% raw %} ${1}",
    "' onmouseover='alert(1)' \"&amp;",
    "]]></style><svg/onload=alert(1)>",
]


def sample(row, text="an answer", number=0, right=0.0, **more):
    grade = {"solved": right, "format": 1.0}
    return {"row": row, "sample": number, "prompt": "a question", "completion": text, "reference": None, "grade": grade,
            "offer": None, "tokens": 3} | more  # fmt: skip


def result(models, **more):
    line = {
        "benchmark": "gsm8k", "length": 64, "steps": 32, "temperature": 0.0, "n": 1, "samples": 1, "accuracy": 0.5,
        "grades": {"format": 0.5},
        "accuracy_ci95": [0.25, 0.75], "effective_tokens": 3.0, "cut_off": 0.1, "nfe": 32.0, "tokens_per_second": None,
        "global_ar": None, "pass@2": {"value": 0.625, "ci95": [0, 1]},
    }  # fmt: skip
    return {
        "results": {model: [line] for model in models},
        "protocol": {"name": "", "source": ""},
        "environment": {"d1jax": "1", "jax": "2", "devices": "cpu"},
        "compared": [],
    } | more


def data_of(page, name="browse"):
    (found,) = re.findall(rf'<script type="application/json" class="{name}-data">(.*?)</script>', page, re.S)
    return json.loads(found)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_nowhere_on_the_page_as_markup(text):
    models = {f"model {text}": {f"cell {text}": [
        sample(0, text, prompt=text, reference=text, offer=text, pieces=[text, text], reveal_step=[0, 1], confidence=[0.5, 0.5])
    ]}}  # fmt: skip
    told = result(models, protocol={"name": text, "source": text})
    page = browse.browse_page(told, models)
    page.encode("utf-8")
    clean = browse.browse_page(result({"m": {}}, protocol={"name": "x", "source": "y"}), {"m": {"c": [
        sample(0, "x", pieces=["x", "x"], reveal_step=[0, 1], confidence=[0.5, 0.5])
    ]}})  # fmt: skip
    tags = lambda html: re.findall(r"<(/?[a-zA-Z!][^\s>]*)", html)  # noqa: E731
    assert tags(page) == tags(clean), "no element more than on the page of harmless texts"
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f]", page)
    (row,) = data_of(page)["cells"][0]["rows"]
    assert (row["prompt"], row["reference"], row["answers"][0]["text"], row["answers"][0]["offer"]) == (text,) * 4, (
        "the reader sees it as it is"
    )
    assert data_of(page, "viewer")[0]["pieces"] == [text, text]


def test_two_models_with_hostile_names_are_compared_as_text():
    text = HOSTILE[0]
    models = {name: {"cell": [sample(0)]} for name in (text, "base")}
    told = result(models, compared=[{"cell": text, "only_first": 1, "only_second": 0, "p": 0.25}])
    page = browse.browse_page(told, models)
    assert "alert(1)</script>" not in page and "&lt;/script&gt;" in page and "McNemar p = 0.25" in page


def test_the_browser_runs_the_packaged_scripts_only():
    page = browse.browse_page(result({"m": {}}), {"m": {"c": [sample(0)]}})
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy.startswith("default-src 'none'; ") and policy.count("'sha256-") == 2
    scripts = policy.partition("script-src")[2]
    assert "unsafe" not in scripts and "http" not in policy and "eval" not in policy
    assert page.index("Content-Security-Policy") < page.index("<script")
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"


def test_the_page_never_makes_markup_of_text():
    """The data is escaped for its <script> only; the script must keep it text."""
    script = (browse.Path(browse.__file__).parent / "templates" / "browse.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|\.href", script)


def test_all_rows_and_samples_of_all_models_stand_beside_each_other():
    first = [sample(row, f"first {row}.{number}", number, right=float(row == 1)) for row in range(3) for number in range(2)]  # fmt: skip
    second = [sample(row, f"second {row}.{number}", number) for row in range(3) for number in range(2)][:-1]
    models = {"first": {"c": first, "d": first[:1]}, "second": {"c": second, "d": []}}
    page = browse.browse_page(result(models), models)
    data = data_of(page)
    assert data["models"] == ["first", "second"] and [cell["name"] for cell in data["cells"]] == ["c", "d"]
    rows = data["cells"][0]["rows"]
    assert [(row["row"], row["sample"]) for row in rows] == [(row, number) for row in range(3) for number in range(2)]
    assert [row["answers"][0]["text"] for row in rows] == [one["completion"] for one in first]
    assert [row["answers"][1] and row["answers"][1]["text"] for row in rows] == [one["completion"] for one in second] + [None]  # fmt: skip
    assert [row["answers"][0]["right"] for row in rows] == [False, False, True, True, False, False]
    assert data["cells"][1]["rows"][0]["answers"][1] is None
    assert "62.5 %" in page and "more samples are in the JSONL" not in page


def test_what_is_cut_is_told(monkeypatch):
    monkeypatch.setattr(browse, "MOST_ROWS", 4)
    monkeypatch.setattr(browse, "MOST_CHARACTERS", 10)
    models = {"m": {"c": [sample(row, "x" * 11, prompt="p" * 10) for row in range(7)], "d": [sample(0)]}}
    page = browse.browse_page(result(models), models)
    rows = data_of(page)["cells"][0]["rows"]
    assert [row["row"] for row in rows] == [
        0,
        1,
        2,
        3,
    ] and "3 more samples are in the JSONL files beside this page" in page
    assert rows[0]["answers"][0]["text"] == "x" * 10 + " … (11 characters)" and rows[0]["prompt"] == "p" * 10


def test_few_completions_are_played_and_from_all_cells(monkeypatch):
    monkeypatch.setattr(browse, "PLAYED", 4)
    played = {"pieces": ["a"], "reveal_step": [0], "confidence": [0.5]}
    models = {"m": {cell: [sample(row, **played) for row in range(16)] for cell in "cdefg"}}
    found = data_of(browse.browse_page(result(models), models), "viewer")
    assert len(found) == 4 and len({one["set"] for one in found}) == 4


def test_an_answer_of_0_is_shown():
    models = {"m": {"c": [sample(0, offer="0", reference=0)]}}
    (row,) = data_of(browse.browse_page(result(models), models))["cells"][0]["rows"]
    assert row["answers"][0]["offer"] == "0" and row["reference"] == "0"


def test_a_page_is_written_whole(tmp_path):
    models = {"m": {"c": [sample(0, "\ud800")]}}
    browse.write_browse_page(tmp_path / "report.html", result(models), models)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == browse.browse_page(result(models), models)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
