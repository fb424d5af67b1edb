"""What pages, docstrings and comments name is there: files, settings, and the headings that another page points to."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from d1jax.config import Config
from d1jax.config.parse import parse
from d1jax.config.stage import SECTIONS
from d1jax.config.values import hints_of, is_section_type, keys_of

ROOT = Path(__file__).resolve().parents[1]
# The table of methods is of d1jax 0.1 and has its names.
HISTORY = "docs/experiments.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(path for folder in ("d1jax", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py"))
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))

# A file by its path or by its name alone, or several (configs/runs/*_8b.yaml); what begins with a variable part (RUN/...) is none of ours.
FILE = re.compile(r"(?<![\w/.{}<>*-])((?:[\w.*-]+/)*[\w*-]+\.(?:py|md|yaml))(?![\w/])")
# Of a run directory, of the user, or of another project.
OTHERS = {
    "config.yaml", "yours.py", "tests/tasks/test_yours.py", "d1jax/tasks/yours.py", "file.yaml", "train.yaml",
    "src/countdown.py", "my/file.py", "my_rewards.py", "make_rows.py", "sums.yaml",
}  # fmt: skip
EVERY = {
    path.name
    for folder in ("d1jax", "tests", "benchmarks", "tools", "configs", "docs")
    for path in (ROOT / folder).rglob("*")
}
EVERY |= {path.name for path in ROOT.glob("*.md")}


def text_of(path: Path) -> str:
    """A page; the docstrings of a module; the comments of a recipe."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        return "\n".join(one for one in found if one)
    if path.suffix == ".yaml":
        return "\n".join(re.findall(r"#(.*)", text))
    return text


def is_there(name: str, page: Path) -> bool:
    if "/" not in name:
        return name in EVERY or "*" in name
    return any(
        any(folder.glob(name)) for folder in (ROOT, ROOT / "d1jax", ROOT / "configs", page.parent) if ".." not in name
    )


@pytest.mark.parametrize("kind", ["pages", "docstrings", "recipes"])
def test_every_file_that_is_named_is_there(kind):
    missing = []
    for path in {"pages": PAGES, "docstrings": MODULES, "recipes": RECIPES}[kind]:
        for name in FILE.findall(text_of(path)):
            written = name.isupper() or re.search(r"[A-Z]{4,}\.", name)  # --rl FILE.yaml, configs/methods/NAME.yaml
            if name not in OTHERS and not written and not name.startswith("runs/") and not is_there(name, path):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


def test_every_setting_that_is_named_is_one():
    names = {name for name, _ in keys_of(Config)}
    sections = "|".join(name for name, hint in hints_of(Config).items() if is_section_type(hint))
    setting = re.compile(rf"(?<![\w/.])(?:--)?((?:{sections})(?:\.[a-z]\w*)+)(?![\w(/])")
    unknown = []
    for path in (*PAGES, *RECIPES):
        if path.relative_to(ROOT).as_posix() == HISTORY:
            continue
        for name in setting.findall(text_of(path)):
            mapping = name.rpartition(".")[0].endswith(("reward_weights", "eval_sets", "task.options"))
            if name not in names and not mapping and not name.endswith((".py", ".md")):
                unknown.append(f"{path.relative_to(ROOT)}: {name}")
    assert unknown == []


def test_every_kind_of_stage_has_its_place_in_the_pages():
    for page in ("README.md", "docs/runs.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [kind for kind in SECTIONS if kind not in text] == []


def test_every_link_between_pages_leads_somewhere():
    broken = []
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def test_every_piece_of_yaml_in_the_pages_is_a_configuration(tmp_path):
    found = [block for path in PAGES for block in blocks(path, "yaml")]
    assert found
    for block in found:
        (tmp_path / "page.yaml").write_text(block, encoding="utf-8")
        parse(["--config", str(tmp_path / "page.yaml")])


def test_every_training_command_in_the_pages_and_recipes_is_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)  # names of files are relative to the repository
    lines = [line for path in PAGES for block in blocks(path, "") for line in block.splitlines()]
    lines += [line for path in RECIPES for line in text_of(path).splitlines()]
    commands = [line.partition("-m d1jax.train ")[2].split("  #")[0] for line in lines if "-m d1jax.train --" in line]
    assert len(commands) > 8
    for command in commands:
        if "--help" not in command:
            parse(shlex.split(command, comments=True))
