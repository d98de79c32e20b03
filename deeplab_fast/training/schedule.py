"""Updates after which a run logs, evaluates and ends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Length and intervals of a run.

    Args:
        steps_per_epoch: updates per epoch.
        epochs: epochs of the whole run.
        evaluate_every: epochs from one evaluation to the next.
        log_every: updates from one line in the log to the next.
    """

    steps_per_epoch: int
    epochs: int
    evaluate_every: int = 1
    log_every: int = 10

    @property
    def num_steps(self) -> int:
        """Updates of the whole run."""
        return self.steps_per_epoch * self.epochs

    def evaluates_after(self, step: int) -> bool:
        """True if the model is evaluated and the state saved after ``step`` updates."""
        every = self.steps_per_epoch * self.evaluate_every
        return step % every == 0 or step >= self.num_steps

    def logs_after(self, step: int) -> bool:
        """True if the loss is logged after ``step`` updates."""
        return self.evaluates_after(step) or step % self.log_every == 0
