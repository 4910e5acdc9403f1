"""Where a run stands: the part of a checkpoint that says what to do next, and how long it has taken so far."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Where the run stands: ``epoch`` and ``batch`` (within it) to do next, batches done in all, the best and where."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    best_step: int = -1
    seconds: float = 0.0  # of work in all, in this epoch, and since the last step row
    epoch_seconds: float = 0.0
    window_seconds: float = 0.0

    def add_time(self, seconds: float) -> None:
        """Count time as worked on the run, the epoch and the window of the next step row."""
        self.seconds += seconds
        self.epoch_seconds += seconds
        self.window_seconds += seconds
