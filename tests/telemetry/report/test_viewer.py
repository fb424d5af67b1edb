"""The denoising player: its data survive the way into the page, and text in them cannot become markup."""

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d1jax.telemetry.report.rendering import environment
from d1jax.telemetry.report.viewer import trajectories, trajectory

SAMPLE = {
    "stage": "rl", "set": "held_out", "index": 3, "prompt": "10\n34", "text": "1234", "reference": "1234",
    "grade": {"solved": 1.0}, "pieces": ["1", "2", "3", "<end>", ""], "reveal_step": [0, 3, 1, 3, -1],
    "confidence": [0.99, 0.5, 0.25, 1.0, 0.0], "columns": 4,
}  # fmt: skip
NASTY = "</script><img src=x onerror=alert(1)><!--<script>\"'&<>\u2028\u2029\ud800"


class Page(HTMLParser):
    """Start tags with attributes, and the text of every <script>, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._inside = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._inside = True
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        if tag == "script":
            self._inside = False

    def handle_data(self, data):
        if self._inside:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)


def viewer_html(samples):
    return environment().get_template("viewer.jinja").module.viewer(trajectories(samples))


def data_of(fragment):
    return [json.loads(text) for attrs, text in Page(fragment).scripts if attrs.get("class") == "viewer-data"]


def test_payload_round_trip():
    (samples,) = data_of(viewer_html([SAMPLE, {**SAMPLE, "columns": None}]))
    assert samples[0] == {
        "stage": "RL", "set": "held-out", "index": 3, "prompt": "10\n34", "pieces": SAMPLE["pieces"],
        "reveal": SAMPLE["reveal_step"], "confidence": SAMPLE["confidence"], "columns": 4, "solved": 1.0, "steps": 4,
    }  # fmt: skip
    assert samples[1]["columns"] is None


def test_nasty_text_stays_text():
    nasty = {**SAMPLE, "prompt": NASTY, "pieces": [NASTY] * 5, "stage": NASTY, "set": NASTY}
    fragment = viewer_html([nasty])
    (samples,) = data_of(fragment)
    assert samples[0]["pieces"] == [NASTY] * 5 and samples[0]["prompt"] == NASTY
    assert [tag for tag, _ in Page(fragment).tags] == [tag for tag, _ in Page(viewer_html([SAMPLE])).tags]
    assert "<img" not in fragment and "\u2028" not in fragment and "innerHTML" not in fragment


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_json_in_a_page_is_inert_and_lossless(text):
    written = environment().from_string("{{ value|tojson }}").render(value={"t": text})
    assert not set(written) & set("<>&'\u2028\u2029")
    assert json.loads(written)["t"] == text


@pytest.mark.parametrize(
    "change",
    [{"pieces": None}, {"reveal_step": [0]}, {"reveal_step": ["0"] * 5}, {"pieces": [], "reveal_step": []}],
)
def test_samples_without_a_trajectory_are_left_out(change):
    assert trajectory({**SAMPLE, **change}) is None
    assert "No denoising trajectories" in viewer_html([{**SAMPLE, **change}])


def test_odd_numbers_become_null():
    payload = trajectory({**SAMPLE, "confidence": [float("nan"), None, "x", 2.0, 0.5], "columns": -1, "grade": None})
    assert payload["confidence"] == [None, None, None, 1.0, 0.5]
    assert payload["columns"] is None and payload["solved"] is None


def test_controls_have_names():
    tags = Page(viewer_html([SAMPLE])).tags
    slider = next(attrs for tag, attrs in tags if tag == "input")
    assert slider["type"] == "range" and slider["aria-label"]
    assert any(attrs.get("aria-live") for _, attrs in tags)
