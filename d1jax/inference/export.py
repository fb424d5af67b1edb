"""An export stage: the weights of a run as a checkpoint that others load."""

from __future__ import annotations

from pathlib import Path

from d1jax.config import ExportConfig, UserError
from d1jax.files import check_new, write_json
from d1jax.inference.policy import Policy, save_pretrained
from d1jax.models import processes


def check_export(config: ExportConfig, stage: str, out: Path, record: Path) -> None:
    """Raises UserError, before anything is trained, where an export that has not begun yet could not be written to `out`."""
    if record.exists():
        return
    try:
        check_new(out)
    except OSError as error:
        raise UserError(f"stage {stage!r}: {error}") from None


def export(policy: Policy, config: ExportConfig, weights: str, out: Path, record: Path) -> None:
    """Writes `record`, {"out", "weights": the stage whose weights these are}, then the checkpoint. Does nothing where that was done.

    The record comes first: it says that `out` is this stage's own, so that a run which was killed between the two goes on.
    """
    if processes.agreed(lambda: is_exported(out, record)):
        return
    write_json(record, {"out": str(out), "weights": weights})
    save_pretrained(policy, out, native=config.form == "d1jax", dtype=config.weights_dtype or None)


def is_exported(out: Path, record: Path) -> bool:
    """Whether the checkpoint is there; it is written beside and renamed, so it is whole then."""
    return record.exists() and out.is_dir() and any(out.iterdir())
