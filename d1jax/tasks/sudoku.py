"""4x4 Sudoku: rows from a generator or a file, and a verifier that knows only the rules.

Exactly 288 complete grids exist, so every question about a puzzle (its completions, whether it has one or more) is
answered by comparing it with all of them at once. Grids are strings of 16 digits, left to right and top to bottom; 0 is
a blank in a puzzle.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from d1jax.tasks.answers import answer_text, as_answer, check_request, check_style
from d1jax.tasks.grading.stored import completion_of
from d1jax.tasks.task import UNDECIDED, DataError, Row

TRAIN_GRIDS = 200  # of 288, as in SPG; the other 88 are for test
_CHUNK = 512  # puzzles drawn together; part of what (split, count, seed) means, so a change gives other rows
_KEYS = (("Puzzle", "Solution"), ("puzzle", "solution"), ("input", "output"))
_STORED_PUZZLE = re.compile(r"(?<![0-9])[0-4]{16}(?![0-9])")

UNITS: tuple[tuple[int, ...], ...] = (
    *(tuple(range(4 * row, 4 * row + 4)) for row in range(4)),
    *(tuple(range(column, 16, 4)) for column in range(4)),
    *(tuple(corner + offset for offset in (0, 1, 4, 5)) for corner in (0, 2, 8, 10)),
)
"""Cells of the 12 rows, columns and 2x2 boxes."""

PEERS = tuple(
    frozenset(other for unit in UNITS if cell in unit for other in unit if other != cell) for cell in range(16)
)

INSTRUCTIONS = """\
Below is a 4x4 Sudoku. It is written as 16 characters: the four rows one after another, each from left to \
right. A 0 marks an empty cell.
Replace every 0 by a digit from 1 to 4, and leave the other digits as they are, so that no row, no column and \
none of the four 2x2 corner boxes holds a digit twice.

Puzzle: {puzzle}

Think it through between <reasoning> and </reasoning>. Then write the finished grid between <answer> and \
</answer> as 16 digits in the same order, with nothing between them."""


@functools.cache
def all_grids() -> np.ndarray:
    """The 288 complete grids as digits `[288, 16]`, in lexicographic order."""
    found: list[list[int]] = []

    def extend(grid: list[int]) -> None:
        if len(grid) == 16:
            found.append(grid)
            return
        taken = {grid[peer] for peer in PEERS[len(grid)] if peer < len(grid)}
        for digit in range(1, 5):
            if digit not in taken:
                extend([*grid, digit])

    extend([])
    grids = np.array(found, dtype=np.int8)
    grids.flags.writeable = False  # the cache hands the same array to everyone
    return grids


def _one_hot(cells: np.ndarray) -> np.ndarray:
    return (cells[:, :, None] == np.arange(1, 5)).reshape(len(cells), 64).astype(np.float32)


@functools.cache
def _grids_one_hot() -> np.ndarray:
    return _one_hot(all_grids()).T.copy()


def fitting(puzzles: np.ndarray) -> np.ndarray:
    """Which grids complete which puzzles: `[A, 16]` digits with 0 for blanks -> `[A, 288]` booleans."""
    # The product counts agreeing clues (at most 16, so exact in float32); it is much faster than comparing
    # [A, 288, 16] cells.
    return _one_hot(puzzles) @ _grids_one_hot() == (puzzles > 0).sum(axis=1, keepdims=True)


def completions(puzzle: str) -> list[str]:
    """Every valid completion of a puzzle string, in lexicographic order."""
    cells = np.array([[int(digit) for digit in puzzle]])
    return ["".join(map(str, grid)) for grid in all_grids()[fitting(cells)[0]]]


def _share(hits: list[bool]) -> float:
    return sum(hits) / len(hits) if hits else 1.0


@dataclass(frozen=True)
class Sudoku:
    """4x4 Sudoku.

    Fields: `style` "bare" (the puzzle string alone) or "instruct" (rules in words, answer in tags); `blanks`, pairs of
    a number of blank cells and its weight; `unique`, whether generated puzzles have one completion only; `split_seed`,
    which grids are for training.

    The default weights are those of the training file of d1, measured on the 256 rows that SPG (arXiv 2510.09541)
    published of it.
    """

    name: ClassVar[str] = "sudoku"
    alphabet: ClassVar[str] = "01234\n"

    style: str = "bare"
    blanks: tuple[tuple[int, float], ...] = ((7, 0.32), (8, 0.32), (9, 0.30), (11, 0.05), (12, 0.01))
    unique: bool = True
    split_seed: int = 0

    def __post_init__(self) -> None:
        check_style(self.name, self.style)
        most = 12 if self.unique else 16  # no 4x4 puzzle with three clues has a single completion
        for count, weight in self.blanks:
            if not (1 <= count <= most and weight > 0):
                raise ValueError(
                    f"sudoku: blanks = ({count}, {weight}): give 1 to {most} blank cells "
                    f"(unique = {self.unique}) and a weight > 0"
                )
        if not self.blanks:
            raise ValueError("sudoku: blanks is empty; give at least one pair (number of blank cells, weight)")

    def generate(self, split: str, count: int, seed: int) -> list[Row]:
        """`count` distinct puzzles whose solutions belong to the split. Raises ValueError when there are not that many.

        The number of blanks is drawn once and kept while grid and mask are redrawn until the puzzle is unique, so that
        the weights are those of the puzzles that come out, as they were measured.
        """
        check_request(self.name, split, count)
        order = np.random.default_rng(self.split_seed).permutation(len(all_grids()))
        pool = order[:TRAIN_GRIDS] if split == "train" else order[TRAIN_GRIDS:]
        rows: dict[str, Row] = {}
        chunk = idle = 0
        while len(rows) < count:
            before = len(rows)
            for puzzle, solution in self._draw(np.random.default_rng([seed, split == "test", chunk]), pool):
                rows.setdefault(puzzle, {"puzzle": puzzle, "solution": solution})
            chunk += 1
            idle = idle + 1 if len(rows) == before else 0
            if idle == 20:
                raise ValueError(
                    f"sudoku: count = {count}, but after {len(rows)} distinct {split} puzzles with "
                    f"blanks = {self.blanks} no new one turned up; ask for fewer rows or allow other numbers of blanks"
                )
        return list(rows.values())[:count]

    def _draw(self, rng: np.random.Generator, pool: np.ndarray) -> list[tuple[str, str]]:
        counts, weights = np.array([pair[0] for pair in self.blanks]), np.array([pair[1] for pair in self.blanks])
        blank_count = rng.choice(counts, size=_CHUNK, p=weights / weights.sum())
        puzzles, solutions = np.zeros((2, _CHUNK, 16), dtype=np.int8)
        todo = np.arange(_CHUNK)
        while len(todo):
            grids = all_grids()[rng.choice(pool, size=len(todo))]
            rank = rng.random((len(todo), 16)).argsort(axis=1)
            drawn = np.where(rank < blank_count[todo, None], 0, grids)
            keep = fitting(drawn).sum(axis=1) == 1 if self.unique else np.ones(len(todo), dtype=bool)
            puzzles[todo[keep]], solutions[todo[keep]] = drawn[keep], grids[keep]
            todo = todo[~keep]
        return [
            ("".join(map(str, p)), "".join(map(str, s)))
            for p, s in zip(puzzles.tolist(), solutions.tolist(), strict=True)
        ]

    def parse(self, record: dict[str, Any], where: str) -> Row:
        """Reads the keys Puzzle/Solution (d1, SPG), puzzle/solution, and input/output (Dream); whitespace inside a grid
        is ignored.
        """
        keys = next((pair for pair in _KEYS if pair[0] in record), None)
        if keys is None:
            names = ", ".join(map(repr, record)) or "none"
            raise DataError(
                f"{where}: no puzzle among the keys ({names}); name it 'puzzle', and 'solution' if there is one"
            )
        puzzle = _grid(record[keys[0]], "01234", f"{where}: {keys[0]}", "16 digits 0-4, with 0 for a blank cell")
        if "0" not in puzzle:
            raise DataError(
                f"{where}: {keys[0]} = {puzzle!r} has no blank cell; mark the cells to fill with 0, or drop the row"
            )
        fits = completions(puzzle)
        if not fits:
            raise DataError(
                f"{where}: {keys[0]} = {puzzle!r} has no valid completion; correct its given digits or drop the row"
            )
        if record.get(keys[1]) is None:
            return {"puzzle": puzzle}
        solution = _grid(record[keys[1]], "1234", f"{where}: {keys[1]}", "16 digits 1-4")
        if solution not in fits:
            raise DataError(
                f"{where}: {keys[1]} = {solution!r} is not a valid completion of {puzzle!r} "
                f"(one is {fits[0]}); correct it or leave it out"
            )
        return {"puzzle": puzzle, "solution": solution}

    def from_stored(self, record: dict[str, Any], where: str) -> Row:
        """The row of a stored generation: the puzzle is 16 digits in its question or prompt. Raises DataError."""
        question, solution, _ = completion_of(record, where)
        found = _STORED_PUZZLE.findall(question) or ["".join(question.split())]
        return self.parse({"puzzle": found[-1], "solution": solution}, where)

    @property
    def columns(self) -> int | None:
        """A bare answer is a grid of four columns."""
        return 4 if self.style == "bare" else None

    def prompt(self, row: Row) -> str:
        return as_lines(row["puzzle"]) if self.style == "bare" else INSTRUCTIONS.format(puzzle=row["puzzle"])

    def target(self, row: Row) -> str | None:
        solution = row.get("solution")
        if solution is None:
            return None
        return as_lines(solution) if self.style == "bare" else as_answer(solution, self.style)

    def _read(self, text: str) -> tuple[str, bool]:
        """The answer as 16 cells (0 where one is missing), and whether exactly 16 digits were given."""
        answer = (answer_text(text, self.style) or "").replace(UNDECIDED, "0")
        digits = "".join(char for char in answer if char in "0123456789")
        return digits[:16].ljust(16, "0"), len(digits) == 16

    def rewards(self, row: Row, text: str) -> dict[str, float]:
        """From the puzzle and the rules alone; the stored solution is never read, and any valid completion counts.

        `solved`: a valid grid that keeps the given cells. `units`: share of the 12 rows, columns and boxes that hold
        1-4 once each in the grid as answered. `clues`: share of the given cells that are kept. `cells`: share of the
        blank cells that agree with the valid completion nearest to the answer. A missing cell is wrong.

        Differs from the paper: d1's only reward is `cells` against the one stored solution, which marks a correct answer
        wrong where a puzzle has more than one.
        """
        cells, complete = self._read(text)
        units = _share([{cells[cell] for cell in unit} == set("1234") for unit in UNITS])
        clues = _share([answer == given for answer, given in zip(cells, row["puzzle"], strict=True) if given != "0"])
        solved = float(complete and units == 1.0 and clues == 1.0)
        return {"solved": solved, "units": units, "clues": clues, "cells": _nearest(row["puzzle"], cells)}

    def grade(self, row: Row, text: str) -> dict[str, float]:
        """`solved`: any valid completion counts. `cell_accuracy`: share of the blank cells that agree with the valid
        completion nearest to the answer. `stored_cell_accuracy`: the same share against the stored solution.

        Differs from the paper: d1 reports `stored_cell_accuracy`, which marks a correct answer wrong where a puzzle has
        more than one solution (a quarter of its test puzzles). It is kept to compare with published numbers; without a
        stored solution it equals `cell_accuracy`. d1's evaluation also looks for a grid outside the answer tags, which
        is not done here.
        """
        rewards, stored = self.rewards(row, text), row.get("solution")
        nearest = rewards["cells"]
        return {
            "solved": rewards["solved"],
            "cell_accuracy": nearest,
            "stored_cell_accuracy": nearest
            if stored is None
            else _agreement(row["puzzle"], self._read(text)[0], stored),
        }

    def has_reference(self, row: Row) -> bool:
        return True  # judged by the rules

    def problem_key(self, row: Row) -> str:
        return row["puzzle"]

    def solution_key(self, row: Row) -> str | None:
        """The stored solution, or the only completion; None where several complete the puzzle and none is stored."""
        if row.get("solution") is not None:
            return row["solution"]
        fits = completions(row["puzzle"])
        return fits[0] if len(fits) == 1 else None

    def baselines(self, row: Row) -> dict[str, str]:
        """`constant`: all ones. `first_candidate`: each blank takes the smallest digit that the given cells of its row,
        column and box allow. `greedy_fill`: the same, but earlier fills count as given too. Neither searches; where no
        digit is allowed, 1.
        """
        answers = {
            "constant": "1" * 16,
            "first_candidate": _fill(row["puzzle"], look_back=False),
            "greedy_fill": _fill(row["puzzle"], look_back=True),
        }
        return {name: as_answer(answer, self.style) for name, answer in answers.items()}


def _agreement(puzzle: str, cells: str, solution: str) -> float:
    """The share of the blank cells that agree with a solution."""
    return _share([cells[cell] == solution[cell] for cell, given in enumerate(puzzle) if given == "0"])


def _nearest(puzzle: str, cells: str) -> float:
    """The share of the blank cells that agree with the valid completion that agrees most; 0 where there is no valid one."""
    return max((_agreement(puzzle, cells, solution) for solution in completions(puzzle)), default=0.0)


def _fill(puzzle: str, look_back: bool) -> str:
    cells = list(puzzle)
    seen = cells if look_back else puzzle
    for cell in range(16):
        if puzzle[cell] == "0":
            taken = {seen[peer] for peer in PEERS[cell]}
            cells[cell] = next((digit for digit in "1234" if digit not in taken), "1")
    return "".join(cells)


def as_lines(cells: str) -> str:
    """Four lines of four cells. The line breaks tell a model without absolute positions where a row begins."""
    return "".join(f"{cells[start : start + 4]}\n" for start in range(0, 16, 4))


def _grid(value: Any, digits: str, what: str, form: str) -> str:
    cells = "".join(value.split()) if isinstance(value, str) else ""
    if len(cells) != 16 or not set(cells) <= set(digits):
        raise DataError(f"{what} = {value!r} is not a 4x4 grid; write a string of {form}")
    return cells
