"""What a run directory holds, read for people: files may be missing or broken off, and nothing here raises for that."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from d1jax.telemetry.metrics import FILE_NAME, read_metrics
from d1jax.telemetry.report.wording import finite


@dataclass(frozen=True)
class Stage:
    """A stage of training: its name, and its kind (`sft`, `rl`, ...), which says what its metrics mean."""

    name: str
    kind: str


@dataclass(frozen=True)
class RunData:
    """The files of a run as they were found, and what they say together."""

    name: str
    config: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    notices: tuple[str, ...] = ()  # what is missing or unreadable, in sentences

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The configuration as plain values; empty where it cannot be read."""
        try:
            found = yaml.safe_load(self.config)
        except (yaml.YAMLError, ValueError):
            return {}
        return mapping(found)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in the order of training: those of the configuration, then others that left something behind."""
        found: dict[str, Stage] = {}
        listed = self.settings.get("stages")
        for entry in listed if isinstance(listed, list) else []:
            entry = {"name": entry} if isinstance(entry, str) else mapping(entry)
            if isinstance(name := entry.get("name"), str):
                found[name] = Stage(name, str(entry.get("kind") or self._kind(name)))
        for name in (
            *(str(entry["name"]) for entry in self.evaluated),
            *(str(row.get("stage")) for row in self.metrics),
        ):
            found.setdefault(name, Stage(name, self._kind(name)))
        return tuple(found.values())

    def _kind(self, name: str) -> str:
        """Of a stage that does not say it: its name, or what its metrics show."""
        if name in ("adapt", "sft", "rl", "preference", "generate", "reward_model"):
            return name
        return "rl" if any("reward" in row for row in self.metrics if row.get("stage") == name) else "sft"

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """The entries of the summary, one a stage that was evaluated."""
        entries = self.summary.get("stages")
        return [entry for entry in entries if mapping(entry).get("name")] if isinstance(entries, list) else []

    @cached_property
    def primary_set(self) -> str:
        """The evaluation set of the headline: as the summary, the configuration or the first evaluation has it."""
        named = self.summary.get("primary_set") or next(
            iter(mapping(mapping(self.settings.get("task")).get("eval_sets"))), None
        )
        if named:
            return str(named)
        seen = (
            key.split("/") for row in self.metrics for key in row if key.startswith("eval/") and key.endswith("/solved")
        )
        return next(("/".join(parts[1:-1]) for parts in seen), "held_out")

    def metrics_of(self, stage: str) -> list[Mapping[str, Any]]:
        """The rows of metrics.jsonl that a stage wrote."""
        return [row for row in self.metrics if str(row.get("stage")) == stage]


def read_run(run_dir: Path) -> RunData:
    """Everything a run directory holds. A file that is missing or broken becomes a notice."""
    notices: list[str] = []

    def text(name: str, meaning: str) -> str:
        try:
            return (run_dir / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            notices.append(f"{name} is missing: {meaning}.")
            return ""

    config = text("config.yaml", "the configuration is not shown")
    summary = _summary(text("summary.json", "the run was interrupted or has not been evaluated yet"), notices)
    metrics = _metrics(run_dir / FILE_NAME, notices)
    samples, torn = _json_lines(text("samples.jsonl", "no samples are shown"))
    if torn:
        notices.append(f"samples.jsonl: {torn} unreadable line(s) left out.")
    # A running total of each stage.
    diverged = sum({row.get("stage"): finite(row.get("nonfinite/total")) or 0 for row in metrics}.values())
    if diverged:
        notices.append(f"{diverged:,.0f} update(s) were not finite and were skipped (nonfinite/total).")
    return RunData(
        name=run_dir.resolve().name,
        config=config,
        summary=summary,
        metrics=tuple(row for row in metrics if finite(row.get("step")) is not None),
        samples=tuple(samples),
        notices=tuple(notices),
    )


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one: broken summaries hold anything."""
    return value if isinstance(value, Mapping) else {}


def by_sample(samples: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The samples of one prompt together, in file order: [[of the first stage, of the second], ...]."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for sample in samples:
        groups.setdefault((str(sample.get("set", "")), str(sample.get("index", ""))), []).append(sample)
    return list(groups.values())


def _summary(raw: str, notices: list[str]) -> Mapping[str, Any]:
    try:
        return mapping(json.loads(raw)) if raw else {}
    except ValueError as error:
        notices.append(f"summary.json cannot be read ({error}); evaluate the run again.")
        return {}


def _metrics(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        notices.append(f"{path.name} is missing: there are no learning curves.")
    try:
        return read_metrics(path)
    except ValueError as error:
        notices.append(str(error))
        return []


def _json_lines(text: str) -> tuple[list[dict[str, Any]], int]:
    rows, torn = [], 0
    # split("\n"), not splitlines(): model output may hold U+2028, which is no line end in JSON Lines
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    return rows, torn
