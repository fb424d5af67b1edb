"""The weights that a run holds in memory while it goes from stage to stage."""

from __future__ import annotations

from d1jax.config.stage import START, TRAINING, Stage
from d1jax.models import processes
from d1jax.models.transformer import Variables
from d1jax.weights.run import RunDirectory
from d1jax.weights.variables import RunModel, reward_variables_at, start_variables, variables_at


class Held:
    """The weights of the last stage that trained, or of the one that a stage names; `name` says of which (START: before any)."""

    def __init__(self, built: RunModel, run: RunDirectory) -> None:
        self._built, self._run = built, run
        self._reward_models = {stage.name for stage in built.config.stages if stage.kind == "reward_model"}
        self._last = self.name = START
        self.variables = start_variables(built, run)

    def before(self, stage: Stage) -> Variables:
        """The weights that a stage works with, read where they are not held."""
        wanted = stage.weights or self._last
        if wanted in self._reward_models:
            return reward_variables_at(self._built, self._run, wanted)  # of an earlier reward model, which is no policy
        if wanted == START != self.name:
            self.variables = start_variables(self._built, self._run)
        elif wanted != self.name:
            self.variables, _ = variables_at(self._built, self._run, wanted)
        self.name = wanted
        return self.variables

    def after(self, stage: Stage, variables: Variables) -> None:
        """Holds what a stage has trained."""
        self.variables, self.name, self._last = variables, stage.name, stage.name

    def skip(self, stage: Stage) -> None:
        """A stage that is finished already: later ones go on from what it has trained."""
        if stage.kind in TRAINING and processes.agreed(self._run.checkpoints(stage.name).is_dir):
            self._last = stage.name

    def take(self, stage: Stage, step: int) -> None:
        """Holds the checkpoint of a step of the stage that has trained last: the one that goes on."""
        self.variables, _ = variables_at(self._built, self._run, stage.name, step)
