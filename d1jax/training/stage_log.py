"""What a stage leaves behind while it runs: metrics, progress, checkpoints; and where it goes on after a stop.

log = StageLog(run, metrics, stop, stage, config)
items, first = log.resume({"trainable": ..., "optimizer": ...})
for step in range(first, steps):
    ...
    log.log_metrics(step + 1, values, watch=("reward",))
    log.save_checkpoint(step + 1, {"trainable": ..., "optimizer": ...})
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

import jax
from jax import Array

from d1jax.config import Config, UserError
from d1jax.config.errors import CannotSave, Diverged
from d1jax.config.stage import Stage
from d1jax.config.training import TrainingConfig
from d1jax.files import write_json
from d1jax.models import processes
from d1jax.telemetry.metrics import MetricsLog, read_metrics
from d1jax.telemetry.progress import Progress
from d1jax.training.profile import Profile
from d1jax.training.stopping import StopRequest, stop_for
from d1jax.weights.checkpoints import Checkpoints, DamagedCheckpoint
from d1jax.weights.run import RunDirectory, read_record

RECENT = 100  # steps that a check may look back


class Clock:
    """Seconds between laps, under the names that metrics have."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Adds the time since the lap before to what is filed under the name."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


class StageLog:
    def __init__(self, run: RunDirectory, metrics: MetricsLog, stop: StopRequest, stage: Stage, config: Config) -> None:
        self.stage = stage.name
        self._kind = stage.kind  # what its settings are called by
        self._section: TrainingConfig = config.section_of(stage)
        self.steps = self._section.steps
        self._run, self._config, self._metrics, self._stop = run, config, metrics, stop
        keep = self._kept if config.keep_last else None
        self._checkpoints = Checkpoints(run.checkpoints(self.stage), owner=True, keep=keep)
        self._progress: Progress | None = None
        self._profile: Profile | None = None
        self._held: tuple[int, Mapping[str, Any], Sequence[str]] | None = (
            None  # the metrics of a step that are still on their way
        )
        self._began = time.perf_counter()
        self._recent: list[Mapping[str, float]] = []  # metrics of the last steps, those before a stop included
        self._watched: dict[int, float] = {}  # step -> share of the watched evaluation set that was solved then

    def note(self, line: str) -> None:
        """A line for the log."""
        if self._progress is None:
            print(f"{self.stage}: {line}", file=sys.stderr)
        else:
            self._progress.note(f"{self.stage}: {line}")

    def notes(self, lines: Iterable[str]) -> None:
        """Lines for the log."""
        for line in lines:
            self.note(line)

    def evaluates(self, step: int) -> bool:
        """Whether the watched set is evaluated after this step; where it selects, also after the last one."""
        evaluation = self._config.evaluation
        due = bool(evaluation.every) and step % evaluation.every == 0
        return due or (evaluation.select != "" and step == self.steps)

    def selected(self) -> dict[str, Any] | None:
        """{"set", "step", "solved", "candidates": {step: solved}} of the checkpoint that `evaluation.select` chooses; None without it.

        The best of the steps that were evaluated; of equals the later. Candidates are also those that `keep_last` has removed since:
        the best of many is better by chance, however few are left.
        """
        name = self._config.evaluation.select
        saved = {step: self._watched[step] for step in self._checkpoints.steps() if step in self._watched}
        if not name or not saved:
            return None
        step = _best(saved)
        return {"set": name, "step": step, "solved": saved[step], "candidates": dict(sorted(self._watched.items()))}

    def resume(self, items: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """(items, first step to do): as given, or as the last good checkpoint has them. A damaged one is set aside, not deleted.

        Raises UserError where a checkpoint is of a step that the stage does not have.
        """
        first = 0
        while (saved := self._checkpoints.latest()) is not None:
            if saved > self.steps:
                raise UserError(
                    f"{self._run.checkpoints(self.stage) / str(saved)} is of step {saved}, but stage {self.stage!r} has steps = "
                    f"{self.steps}; move that folder away, or raise the steps in a new run_dir"
                )
            try:
                items, first = self._checkpoints.load(saved, items), saved
                break
            except DamagedCheckpoint as error:
                self._set_aside(error)
        self._recent, watched, missing = processes.agreed(lambda: self._logged(first))
        self._watched |= {step: solved for step, solved in watched}
        if missing:
            self.note(
                f"{self._metrics.path} lacks {len(missing)} of the {first} steps that are saved: {spans(missing)}; "
                "curves and times are without them"
            )
        if first < self.steps:
            if processes.is_first():
                self._profile = Profile(self._config.profile, self._run.profile(self.stage), first)
            self._progress = Progress(self.stage, self.steps, initial=first)
            self._progress.__enter__()
            if first:
                self._progress.note(f"{self.stage}: continuing after step {first}")
        return items, first

    def _logged(self, first: int) -> tuple[list[dict[str, Any]], list[tuple[int, float]], list[int]]:
        """(the last rows of this stage in the log, the watched evaluations as (step, solved), which of the `first` steps are not there)."""
        rows = [row for row in read_metrics(self._metrics.path) if row["stage"] == self.stage]
        watched = [(row["step"], row[self._watched_metric]) for row in rows if self._watched_metric in row]
        missing = sorted(set(range(1, first + 1)) - {row["step"] for row in rows})
        return rows[-RECENT:], watched, missing

    def _set_aside(self, error: DamagedCheckpoint) -> None:
        """Moves a damaged newest checkpoint away, and forgets what the stage will write again."""
        self._checkpoints.set_aside(error.step - 1, self._run.damaged(self.stage))
        good = self._checkpoints.latest()
        self.note(
            f"{error}. It is now in {self._run.damaged(self.stage)}; "
            + (f"going on from step {good}" if good else "no earlier one is there, so the stage begins again")
        )
        self._metrics.rewind(processes.agreed(lambda: self._run.saved_steps(self._config.stage_names)))

    @property
    def recent(self) -> list[Mapping[str, float]]:
        """Metrics of the last steps, those before a stop included."""
        self._write_held()
        return self._recent

    def log_metrics(self, step: int, values: Mapping[str, float | Array], watch: Sequence[str]) -> None:
        """Writes the metrics of a step: those that are numbers at once. Those that the devices may still be computing are written when the
        next ones come, or they are asked for, or a checkpoint is due, so that the devices are at the next step while the host waits.

        Raises Diverged when too many updates in a row were skipped, and CannotSave. time/step_s is all that has passed since the step
        before: compilation, evaluation and saving too.
        """
        self._write_held()
        now = time.perf_counter()
        values, self._began = {**values, "time/step_s": now - self._began}, now
        self._held = step, values, watch
        computed = not any(isinstance(value, Array) for value in values.values())
        if step == self.steps or computed or (self._profile is not None and self._profile.is_edge(step)):
            self._write_held()
        if self._profile is not None and (line := self._profile.done(step)):
            self.note(line)

    def _write_held(self) -> None:
        """Writes the metrics that are held."""
        if self._held is None:
            return
        (step, values, watch), self._held = self._held, None
        check_in_place(self._metrics, f"{self.stage} step {step}")
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        self._metrics.write(self.stage, step, values)
        self._recent = [*self._recent, values][-RECENT:]
        self._note_watched(step, values)
        self._progress.update({name: values[name] for name in watch if name in values})
        in_a_row = int(values["nonfinite/in_a_row"])
        problem = bad_updates_of(self.stage, step, self._section, in_a_row, self._config.max_bad_updates)
        if problem:
            bad_steps = -(-in_a_row // self._section.updates_per_step)
            good = max((saved for saved in self._checkpoints.steps() if saved <= step - bad_steps), default=0)
            advice = f"start a new run_dir with a lower {self._kind}.optimizer.learning_rate"
            raise Diverged(
                f"{problem}; the last good checkpoint is step {good}; {advice} and init_from this one"
                if good
                else f"{problem}; {advice}, and check the weights that it starts from"
            )

    def quarantine(self, step: int, steps: int, signs: Sequence[str]) -> NoReturn:
        """Sets aside what was saved in the last `steps` steps, which were bad, and raises Diverged with what was seen."""
        # The first bad step decoded with the weights of the checkpoint before it, so that one is not good either.
        good = max((saved for saved in self._checkpoints.steps() if saved < step - steps), default=0)
        collapsed = self._run.collapsed(self.stage)
        moved = self._checkpoints.set_aside(good, collapsed)
        raise Diverged(
            f"{self.stage} step {step}: the policy has collapsed; for {steps} steps in a row it showed {', '.join(signs)}. "
            + (f"The last good checkpoint is step {good}" if good else f"No checkpoint of {self.stage} is from before")
            + (f"; steps {moved} are now in {collapsed}" if moved else "")
            + f". In a new run_dir, with init_from this one, try a lower {self._kind}.optimizer.learning_rate, a KL term, or "
            f"{self._kind}.collapse = ignore"
        )

    def save_checkpoint(
        self, step: int, items: dict[str, Any], stream: Callable[[], dict[str, Any] | None] = lambda: None
    ) -> None:
        """Saves a checkpoint when one is due or a signal has come; then, after a signal, raises Stopped. stream: asked for what a stream of
        data needs to go on, which `stream_at` gives back.

        Raises CannotSave where the disk is full, or the directory may not be written to or is not there any more.
        """
        candidate = self._config.evaluation.select != "" and self.evaluates(step)
        due = candidate or step % self._config.checkpoint_every == 0 or step == self.steps
        signum = self._stop.heard()
        if due or signum is not None:
            self._write_held()
            check_in_place(self._metrics, f"{self.stage} step {step}")
            try:
                self._metrics.to_disk()
                self._save_stream(step, stream())  # before the checkpoint, which is never without it
                self._checkpoints.save(step, items)
            except OSError as error:
                raise CannotSave(
                    f"{self.stage} step {step}: the checkpoint cannot be saved: {error}; make room, or give the right to write "
                    "there. What was saved before is good, and the same command continues from it"
                ) from None
        stop_for(signum, f"{self.stage} step {step}")

    def _save_stream(self, step: int, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        there = {*self._checkpoints.steps(), step}  # all processes ask
        if not processes.is_first():
            return
        folder = self._run.streams(self.stage)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{step}.json", state)
        for file in folder.glob("*.json"):
            if file.stem.isdigit() and int(file.stem) not in there:
                file.unlink()

    def stream_at(self, step: int) -> dict[str, Any] | None:
        """What was saved of a stream of data with the checkpoint of a step; None before the first. Raises UserError where it is gone."""
        if step == 0:
            return None
        file = self._run.streams(self.stage) / f"{step}.json"
        state = processes.agreed(lambda: read_record(file) if file.exists() else None)
        if state is None:
            raise UserError(
                f"{file} is gone: it says where the text of stage {self.stage!r} goes on after step {step}; put it back, or do the stage "
                f"again with --from {self.stage}"
            )
        return state

    def _kept(self, saved: list[int]) -> set[int]:
        collapse = getattr(self._section, "collapse", None)
        return kept_steps(saved, self._config.keep_last, self._watched, collapse.patience if collapse else 0)

    def _note_watched(self, step: int, values: Mapping[str, float]) -> None:
        solved = values.get(self._watched_metric)
        if solved is not None:
            self._watched[step] = solved

    @property
    def _watched_metric(self) -> str:
        return f"eval/{self._config.watched_set}/solved"

    def __enter__(self) -> StageLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()
        if self._progress is not None:
            self._progress.__exit__(kind, value, trace)
        self._checkpoints.close()


def bad_updates_of(stage: str, step: int, section: TrainingConfig, in_a_row: int, limit: int) -> str | None:
    """What to say where a stage cannot go on, or has learnt nothing, because its last `in_a_row` updates were not finite; else None."""
    updates = section.steps * section.updates_per_step
    if step == section.steps and in_a_row >= updates:
        return f"{stage} step {step}: all {updates} updates of the stage were NaN or infinite and were skipped, so nothing was learnt"
    if in_a_row >= limit:
        return f"{stage} step {step}: the last {in_a_row} updates were NaN or infinite and were skipped"
    return None


def _best(solved: Mapping[int, float]) -> int:
    """The step with the highest share solved, of equals the later."""
    return max(solved, key=lambda step: (solved[step], step))


def kept_steps(saved: Sequence[int], last: int, solved: Mapping[int, float], look_back: int) -> set[int]:
    """Which of the checkpoints of a stage stay: the `last` ones; the best by the watched evaluation set (of equals the later); and
    those that a roll-back may want, which is to before the bad ones of the last `look_back` steps."""
    kept = set(saved[-last:])
    scored = {step: solved[step] for step in saved if step in solved}
    kept |= {_best(scored)} if scored else set()
    before = max((step for step in saved if step <= saved[-1] - look_back), default=0)
    return kept | {step for step in saved if step >= before}


def check_in_place(metrics: MetricsLog, where: str) -> None:
    """Raises CannotSave where the run directory was renamed or removed: what is written now would begin another one."""
    if not metrics.in_place():
        raise CannotSave(
            f"{where}: the run directory {metrics.path.parent} was renamed or removed while the run was under way; "
            f"its metrics are now at {metrics.whereabouts()}. Stopped; the same command with --run_dir there continues"
        )


def spans(steps: Iterable[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    found: list[list[int]] = []
    for step in steps:
        if found and found[-1][1] == step - 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)
