"""Programs in texts: fenced blocks, the program that an answer offers, and the format rewards of DiffuCoder and d1.

Every function here is linear in the length of the text, but for `ast.parse`, whose memory and depth Python limits.
"""

import ast
import re
import textwrap
import warnings
from typing import NamedTuple

from d1jax.tasks.answers import last_answer

_FENCE = "```"
_PYTHON = ("python", "py", "python3")
_OPEN_TAG = "<answer>"
_OPENS_ANSWER = re.compile(r"^[ \t]*(?:</reasoning>[ \t]*)?<answer>", re.MULTILINE)
# An opening fence: alone in its line, or at the end of one that names the language.
_OPENS = re.compile(r"\s*```([^`]*)|[^`]*```[ \t]*(python|py|python3)\s*", re.IGNORECASE)
_END_OF_TEXT = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "</s>")
_LONGEST_PARSED = 1 << 20  # characters; longer programs have no syntax that anybody would wait for
# The modules that d1's reward forbids, also where they are named without an import.
FORBIDDEN = (
    "os", "sys", "shutil", "subprocess", "socket", "psutil", "ctypes", "pathlib", "builtins", "__import__",
)  # fmt: skip
_FORBIDDEN_WORD = re.compile(rf"(?<![\w.])(?:{'|'.join(FORBIDDEN)})(?!\w)")


class Block(NamedTuple):
    """One fenced block: the word after its opening fence, its lines, whether a closing fence follows, and its lines' places."""

    label: str
    code: str
    closed: bool
    first: int
    last: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, in order.

    A fence stands in a line of its own; it also opens where ```python ends a line, and closes where it ends a line of code.
    """
    found, label, start, inside = [], "", -1, []
    for number, line in enumerate(text.split("\n")):
        bare = line.strip()
        if start < 0:
            opening = _OPENS.fullmatch(line)
            if opening:
                label, start, inside = (opening[1] or opening[2] or "").strip().casefold(), number, []
        elif bare == _FENCE or (bare.endswith(_FENCE) and _closes(bare)):
            if bare != _FENCE:
                inside.append(line.rstrip()[: -len(_FENCE)])
            found.append(Block(label, "\n".join(inside), True, start, number))
            start = -1
        else:
            inside.append(line)
    if start >= 0:
        found.append(Block(label, "\n".join(inside), False, start, text.count("\n")))
    return found


def _closes(line: str) -> bool:
    """`return x```` closes a block; a line that mentions ```marks``` does not."""
    return line.count(_FENCE) == 1


def without_end(text: str) -> str:
    """The text up to its end-of-text tokens, where the tokenizer has left them in it."""
    text = text.rstrip()
    while text.endswith(_END_OF_TEXT):
        text = next(text.removesuffix(token) for token in _END_OF_TEXT if text.endswith(token)).rstrip()
    return text


def offered_code(text: str, style: str) -> str | None:
    """The program that a text offers, or None.

    The last complete python block, else the last complete one without a language, else the one that the text is cut off
    in. Inside of the last answer tags where there are some; a tag that is never closed reaches to the end. Without any
    fence: all of it in style bare, nothing in instruct.
    """
    text = without_end(text.replace("\r\n", "\n"))
    tagged = last_answer(text)
    if tagged is not None:
        # last_answer strips, and the indentation of a first line is part of a program.
        start = text.rfind(_OPEN_TAG, 0, text.rfind("</answer>")) + len(_OPEN_TAG)
        text = text[start : text.index("</answer>", start)]
    elif (unclosed := _last_line_that_opens(text)) is not None:
        text = unclosed
    found = blocks(text)
    python = [block for block in found if block.label in _PYTHON]
    plain = [block for block in found if not block.label]
    for some in (python, plain):
        complete = [block for block in some if block.closed]
        if complete:
            return complete[-1].code
    for block in (*python[-1:], *plain[-1:]):
        return block.code
    return text.strip("\n") if style == "bare" and not found and text.strip() else None


def _last_line_that_opens(text: str) -> str | None:
    """What follows the last answer tag that begins a line, if there is a fence in it: other tags may be part of a program."""
    openings = list(_OPENS_ANSWER.finditer(text))
    rest = text[openings[-1].end() :] if openings else ""
    return rest if _FENCE in rest else None


def parses(code: str) -> bool:
    """Whether the text is a Python program, as far as syntax goes."""
    return tree_of(code) is not None


def tree_of(code: str) -> ast.Module | None:
    if len(code) > _LONGEST_PARSED:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a model's program is not for the terminal
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def code_format(text: str) -> float:
    """1.0: any text, then one python block that parses, and nothing else; 0.5: it does not parse; 0.0: another layout.

    Source: DiffuCoder, arXiv 2506.20639, format reward.
    Differs from the released code: end-of-text tokens and white space at the end do not matter (there, exactly one newline
    must follow the fence), nor do spaces after the word python; three backticks inside of a line of code are no fence.
    """
    text = without_end(text.replace("\r\n", "\n"))
    found = blocks(text)
    if len(found) != 1:
        return 0.0
    block = found[0]
    lines = text.split("\n")
    opening, before = lines[block.first].rpartition(_FENCE)[2], "\n".join(lines[: block.first])
    if opening.strip() != "python" or _FENCE in before or not block.closed:
        return 0.0
    if block.last != len(lines) - 1 or not block.code.strip():
        return 0.0
    return 1.0 if parses(block.code) else 0.5


def xml_format(text: str) -> float:
    """d1's format reward for code: 0.125 for each of the four tags that occurs exactly once, on a line of its own, and 0.5
    where the python block stands inside of the answer tags. 0.0 without a python block.

    Source: d1, arXiv 2504.12216 v2, as restated in SPG, App. G.1.
    Differs from the released code of d1's other tasks: text behind the last tag takes nothing off, and a text may end at it.
    """
    text = without_end(text.replace("\r\n", "\n"))
    if not any(block.label in _PYTHON for block in blocks(text)):
        return 0.0
    lines = [line.strip() for line in text.split("\n")]
    tags = sum(
        lines.count(tag) == text.count(tag) == 1 for tag in ("<reasoning>", "</reasoning>", _OPEN_TAG, "</answer>")
    )
    answer = last_answer(text)
    inside = answer is not None and any(block.label in _PYTHON and block.closed for block in blocks(answer))
    return 0.125 * tags + 0.5 * inside


def uses_forbidden(code: str) -> bool:
    """Whether the program imports or names one of FORBIDDEN. In a program that does not parse, words count.

    A variable or an attribute of that name counts, too: `sys.exit` does, `self.os` does not.
    """
    tree = tree_of(code)
    if tree is None:
        return _FORBIDDEN_WORD.search(code) is not None
    for node in ast.walk(tree):
        named = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [node.module or ""]
        elif isinstance(node, ast.Name):
            named = [node.id]
        if any(name.split(".")[0] in FORBIDDEN for name in named):
            return True
    return False


def completed(stub: str, entry_point: str, code: str) -> str:
    """The program that `code` makes of a stub (imports, helpers, a signature and its docstring): HumanEval's form.

    `code` may be the whole function, which keeps what the stub has before it, or only its body, indented or not.
    """
    tree = tree_of(code)
    if tree is not None and defines(tree, entry_point):
        return f"{_before(stub, entry_point)}\n{code}"
    first = code.lstrip("\n")
    # A body whose first line has lost its indentation, in a text without space around it, is one, too.
    bodies = (code,) if first[:1].isspace() else (textwrap.indent(code, "    "), f"    {first}")
    for body in bodies:
        program = f"{stub.rstrip()}\n{body}"
        if parses(program):
            return program
    return code


def defines(tree: ast.Module, name: str) -> bool:
    """Whether the program gives `name` a value at its top level: def, class, import or assignment."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.Import | ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            return True
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return True
    return False


def _before(stub: str, entry_point: str) -> str:
    """What a stub has above the function to be completed."""
    tree = tree_of(f"{stub.rstrip()}\n    pass")
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.FunctionDef) and node.name == entry_point:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(stub.split("\n")[: first - 1])
    return ""
