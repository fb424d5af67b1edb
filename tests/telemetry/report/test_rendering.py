"""Whatever is printed is escaped: markup, template syntax, quotes, what HTML cannot write; and scripts run only if packaged."""

import base64
import hashlib
import json
import re

import jinja2
import pytest

from d1jax.telemetry.report.rendering import FOLDER, environment, render

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]><svg onload=alert(1)>",
    "{{ 7*7 }}",
    "{% raw %}",
    "{# gone #}",
    "\" onfocus=alert(1) x='",
    "' onfocus=alert(1) x=\"",
    "&lt;b&gt;",
    "a\x00b\x07\x1b[31m\x7f\x85",
    "\u2028\u2029\u202e\ufeff",
    "\ud800",
)


def made(source, **values):
    return environment().from_string(source).render(values)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_in_an_element_and_in_attributes_is_only_text(text):
    html = made("<p title=\"{{ t }}\" lang='{{ t }}'>{{ t }}</p>", t=text)
    assert html.count("<") == 2 and html.count(">") == 2 and html.count('"') == 2 and html.count("'") == 2
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", html)
    assert "49" not in html and ("raw" in html) == ("raw" in text) and ("gone" in html) == ("gone" in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_json_for_a_script_is_whole_and_cannot_close_it(text):
    written = made("{{ t|tojson }}", t={text: [text]})
    assert not set(written) & set("<>&'\u2028\u2029\x00") and json.loads(written) == {text: [text]}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_page_with_hostile_text_everywhere_has_the_tags_of_any_other(text):
    def tags(text):
        sample = {"prompt": text, "pieces": [text], "reveal_step": [0], "set": text, "stage": text}
        page = render("player.html.jinja", title=text, trajectories=[sample])
        return re.findall(r"<[a-z/!][^\s>]*", page)

    assert tags(text) == tags("harmless")


def test_numbers_that_json_has_no_word_for_become_null():
    assert made("{{ t|tojson }}", t=[float("nan"), float("inf"), 1.5]) == "[null,null,1.5]"


def test_a_value_that_is_not_there_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        made("{{ forgotten }}")


def test_templates_print_nothing_unescaped():
    """`packaged` is the one door for text as it stands; it takes names of files, never what came from a run."""
    for path in FOLDER.glob("*.jinja"):
        source = path.read_text(encoding="utf-8")
        assert "|safe" not in source and "Markup" not in source and "autoescape" not in source, path.name
        assert set(re.findall(r"packaged\((.*?)\)", source)) <= {"name"}, path.name


def test_the_policy_names_exactly_the_scripts_of_the_page():
    page = render("player.html.jinja", title="t", trajectories=[])
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2 and re.findall(r"'sha256-(.*?)'", page) == hashes
    assert "unsafe-inline" not in page.split("script-src")[1].split('">')[0]


def test_a_script_that_is_not_packaged_does_not_run(browser, tmp_path):
    page = render("player.html.jinja", title="t", trajectories=[])
    path = tmp_path / "player.html"
    path.write_text(page.replace("<main>", "<main onclick='window.ran = 1'><script>window.ran = 1</script>"))
    browser.open(path)
    browser.look("document.querySelector('main').click()")
    assert browser.look("window.ran === undefined") is True
