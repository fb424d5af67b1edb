"""Cards of samples: grids and texts, with whatever grades a task gave."""

from d1jax.telemetry.report.samples import card

PUZZLE = {
    "stage": "sft",
    "set": "mine",
    "index": 1,
    "prompt": "1.\n.2",
    "reference": "12\n12",
    "columns": 2,
    "pieces": list("1212"),
}


def test_the_grades_of_any_task_are_told_where_a_text_is_not_solved():
    grade = {"solved": 0.0, "well_formed": 0.25, "odd": None}
    found = card(
        [{**PUZZLE, "grade": grade}, {**PUZZLE, "stage": "rl_1", "grade": {"solved": 1.0, "well_formed": 1.0}}, PUZZLE]
    )
    assert found.title == "mine 1"
    assert [one.title for one in found.versions] == ["Prompt", "SFT", "RL 1", "SFT", "Reference"]
    assert [one.solved for one in found.versions] == [None, False, True, None, None]
    assert [one.grades for one in found.versions] == ["", "well formed 25\u202f%", "", "", ""]


def test_a_grid_shows_clues_open_cells_and_what_is_wrong():
    prompt, answer, reference = card([{**PUZZLE, "pieces": list("1222")}]).versions
    assert (
        prompt.grid.cells == [("given", "1"), ("open", ""), ("open", ""), ("given", "2")]
        and prompt.typed == '"1.\\n.2"'
    )
    assert [css for css, _ in answer.grid.cells] == ["given", "open", "open wrong", "given"]
    assert reference.grid.spoken == "1 2; 1 2"


def test_text_stays_text():
    versions = card([{"prompt": "<b>", "text": "{{ x }}", "reference": None, "columns": None}]).versions
    assert [(one.text, one.grid) for one in versions] == [("<b>", None), ("{{ x }}", None)]
