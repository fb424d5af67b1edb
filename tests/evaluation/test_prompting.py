"""Protects: worked examples are seeded and never a test problem; templates, chats and prefill reach the model as they are written."""

from dataclasses import dataclass, field

import pytest

from d1jax.config import UserError
from d1jax.config.benchmark import BenchmarkConfig
from d1jax.data.tokenizers import CharacterTokenizer
from d1jax.evaluation.prompting import Prompter, choose_shots
from d1jax.tasks.gsm8k import Gsm8k

TASK = Gsm8k(style="bare")
ROW = TASK.parse({"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, "here")


def row(number, solution="It is so."):
    answer = f"{solution}\n#### {number}" if solution else str(number)
    return TASK.parse({"question": f"{number} + 0?", "answer": answer}, "here")


@dataclass
class Chatty:
    """A tokenizer with a chat template, whose ids are what it was asked."""

    chats: bool = True
    asked: list = field(default_factory=list)

    def prompt(self, prompt):
        self.asked.append(("prompt", prompt))
        return [1]

    def encode(self, text):
        self.asked.append(("encode", text))
        return [2, 3]


def shots_of(**changes):
    config = BenchmarkConfig(**{"few_shot": 4, "style": "bare", **changes})
    return choose_shots(TASK, config, [row(number) for number in range(20)], [row(3), row(5)]).shots


def test_worked_examples_are_chosen_by_the_seed():
    assert shots_of() == shots_of() and len(set(shots_of())) == 4
    assert shots_of() != shots_of(seed=1)
    assert shots_of(few_shot=2) == shots_of()[:2]
    question, answer = shots_of()[0]
    assert question.endswith(" + 0?") and answer == f"It is so.\n#### {question.split()[0]}"


@pytest.mark.parametrize("seed", range(5))
def test_no_worked_example_is_a_test_problem(seed):
    """Not in other capitals and spacing either."""
    config = BenchmarkConfig(few_shot=18, seed=seed)
    test = [{**row(3), "question": "3  +\n0?"}, row(5)]
    found = {question.split()[0] for question, _ in choose_shots(TASK, config, [row(n) for n in range(20)], test).shots}
    assert found == {str(number) for number in range(20)} - {"3", "5"}


def test_too_few_worked_examples_are_told():
    rows = [row(1), row(2, None), row(3), row(4)]
    with pytest.raises(UserError) as found:
        choose_shots(TASK, BenchmarkConfig(few_shot=3), rows, [row(3)])
    assert str(found.value) == (
        "few_shot = 3: of 4 rows for worked examples only 2 have a worked answer and are no test problem; lower it, or name other "
        "rows with --shots"
    )


def test_one_problem_is_no_two_worked_examples():
    with pytest.raises(UserError, match="of 3 rows for worked examples only 1"):
        choose_shots(TASK, BenchmarkConfig(few_shot=2), [row(1), row(1), row(1)], [])


def prompter(shots=(), **settings):
    return Prompter(TASK, BenchmarkConfig(**settings), shots)


def test_fields_of_a_template_are_filled_in_once():
    template = "Q: {prompt} ({question}) \\boxed{} {"
    assert prompter(template=template).asked(ROW) == "Q: 1 + 1? (1 + 1?) \\boxed{} {"
    hostile = {**ROW, "question": "{answer} {prompt} {nothing} \\1"}
    assert prompter(template="{question}!").asked(hostile) == "{answer} {prompt} {nothing} \\1!"
    with pytest.raises(UserError, match="{nothing} is no field of this task's rows; choices: .*prompt, question"):
        prompter(template="{nothing}").asked(ROW)


def test_a_chat_has_the_system_message_the_examples_and_the_question():
    tokenizer = Chatty()
    made = prompter((("q", "a"),), system="Be brief.", template="{question} Go.", prefill="<r>")
    assert made.ids(ROW, tokenizer) == [1, 2, 3], "what the answer begins with follows the prompt"
    assert tokenizer.asked == [
        ("prompt", [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"}, {"role": "user", "content": "1 + 1? Go."},
        ]),
        ("encode", "<r>"),
    ]  # fmt: skip


def test_a_text_has_the_examples_before_the_question():
    tokenizer = Chatty()
    prompter((("q", "a"), ("r", "b")), chat=False).ids(ROW, tokenizer)
    assert tokenizer.asked == [("encode", "q\na\n\nr\nb\n\n1 + 1?\n")], "no chat is made of it"
    assert prompter(chat=False).text(ROW) == "1 + 1?"


def test_a_tokenizer_without_a_chat_continues_a_text():
    tokenizer = Chatty(chats=False)
    prompter((("q", "a"),)).ids(ROW, tokenizer)
    assert tokenizer.asked == [("prompt", "q\na\n\n1 + 1?\n")]


def test_a_system_message_that_no_chat_would_hold_is_told():
    for tokenizer in (Chatty(chats=False), CharacterTokenizer("1 +?")):
        with pytest.raises(UserError, match=r"system = 'Be brief\.': the checkpoint has no chat template.*--system ''"):
            prompter(system="Be brief.").ids(ROW, tokenizer)


def test_a_prompt_that_cannot_be_written_names_the_task():
    with pytest.raises(UserError, match="a prompt of task 'gsm8k' cannot be written"):
        prompter().ids({**ROW, "question": "ü?"}, CharacterTokenizer("abc?"))
