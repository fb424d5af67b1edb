"""The player's own page: one offline file whose text stays text, and which a keyboard can play."""

import json

import pytest

from d1jax.telemetry.report.player import player_page, write_player

NASTY = "</script><img src=x onerror=alert(1)></title>\"'&<>"
SAMPLES = [
    {"set": "prompt", "index": 1, "prompt": "say abc", "pieces": ["a", "b", "c", "<end>", "<end>"],
     "reveal_step": [0, 2, 1, 2, -1], "confidence": [0.9, 0.5, 0.25, 1.0, 0.0]},
    {"set": "prompt", "index": 2, "prompt": NASTY, "pieces": [NASTY, "x\n", "z"], "reveal_step": [1, -1, 0],
     "confidence": [0.5, 0.0, 0.75]},
]  # fmt: skip
CELLS = "[...document.querySelectorAll('.viewer-out .viewer-cell')]"


def test_the_page_is_whole_and_asks_for_nothing():
    page = player_page(SAMPLES, "a title")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert "<title>a title</title>" in page and "default-src 'none'" in page
    assert "http://" not in page and "https://" not in page and "@import" not in page and "url(" not in page


def test_text_never_becomes_markup():
    page = player_page(SAMPLES, NASTY)
    assert "<img" not in page and page.count("</title>") == 1 and page.count("</script>") == 3
    data = page.split('class="viewer-data">')[1].split("</script>")[0]
    assert json.loads(data)[1]["prompt"] == NASTY


def test_without_a_trajectory_the_page_says_so():
    assert "No denoising trajectories" in player_page([{"prompt": "a"}], "t")


def test_written_beside_then_renamed(tmp_path):
    write_player(tmp_path / "out.html", SAMPLES, "t")
    write_player(tmp_path / "out.html", SAMPLES[:1], "again")
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").read_text() == player_page(SAMPLES[:1], "again")


# -- in a browser, from disk -------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, tmp_path):
    write_player(tmp_path / "player.html", SAMPLES, "the player")
    browser.problems.clear()
    browser.open(tmp_path / "player.html")
    yield browser
    assert browser.problems == []


def status(browser):
    return browser.look("document.querySelector('.viewer-status').textContent")


def masked(browser):
    return browser.look(f"{CELLS}.map((one) => one.classList.contains('viewer-mask'))")


def test_the_keys_work_as_soon_as_the_page_is_open(opened):
    opened.press("Home")
    assert status(opened) == "step 0 of 3: 0 of 4 tokens committed" and masked(opened) == [True] * 4
    opened.press("ArrowRight")
    assert status(opened) == "step 1 of 3: 1 of 4 tokens committed" and masked(opened) == [False, True, True, True]
    opened.press("End")
    opened.press("ArrowLeft")
    assert masked(opened) == [False, True, False, True]
    opened.press(" ")
    assert opened.look("document.querySelector('.viewer-play').textContent") == "Pause"


def test_the_slider_steps_by_keyboard_to_the_whole_text(opened):
    opened.look("document.querySelector('.viewer-slider').focus()")
    opened.press("Home")
    seen = []
    for _ in range(4):  # one more than there are steps
        opened.press("ArrowRight")
        seen.append((opened.look("document.querySelector('.viewer-slider').value"), 4 - sum(masked(opened))))
    assert seen == [("1", 1), ("2", 2), ("3", 4), ("3", 4)]
    assert opened.look(f"{CELLS}.map((one) => one.textContent)") == ["a", "b", "c", "<end>"]
    assert (
        opened.look("document.querySelector('.viewer-after').textContent")
        == "1 position after the end was never decoded."
    )
    assert "step 3 of 3" in opened.look("document.querySelector('.viewer-slider').getAttribute('aria-valuetext')")


def test_colours_by_confidence_and_by_step(opened):
    opened.press("End")
    shade = f"{CELLS}.map((one) => one.style.background)"
    by_confidence = opened.look(shade)
    opened.look("document.querySelector('[data-by=step]').click()")
    by_step = opened.look(shade)
    assert all(by_confidence) and all(by_step) and by_confidence != by_step
    assert by_step[1] == by_step[3] != by_step[0]  # committed in one step


def test_another_sample_whose_text_is_shown_as_text(opened):
    labels = "[...document.querySelector('.viewer-sample').options].map((one) => one.text)"
    assert opened.look(labels) == ["prompt 1", "prompt 2"]
    opened.look(
        "(() => { const s = document.querySelector('.viewer-sample'); s.value = 1; s.dispatchEvent(new Event('change')); })()"
    )
    opened.look("document.querySelector('.viewer-slider').focus()")
    opened.press("End")
    assert opened.look("document.querySelector('.viewer-prompt').textContent") == NASTY
    # Between decoded tokens a position that never was keeps its place; behind them it is only counted.
    assert opened.look(f"{CELLS}.map((one) => one.textContent)") == [NASTY, "·", "z"]
    assert opened.look("document.images.length") == 0


def test_the_page_fits_a_telephone(browser, tmp_path):
    long = {**SAMPLES[0], "pieces": ["word "] * 200, "reveal_step": list(range(200)), "confidence": [0.5] * 200}
    write_player(tmp_path / "player.html", [long], "a-model-with-a-long-name-" * 8)
    browser.open(tmp_path / "player.html", width=420)
    assert browser.look("document.documentElement.scrollWidth") <= 420
