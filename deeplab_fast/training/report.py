"""Output of a run while it trains: progress bar, terminal lines, log and TensorBoard pictures."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .._io.overlay import overlay, painting_of
from ..models.preprocessing import network_input
from ..models.sliding_window import predict_labels
from . import distributed
from .data import SegmentationData
from .log import Log
from .metrics import Scores
from .run_folder import RunFolder
from .schedule import Schedule
from .state import TrainingState

_NUM_PICTURES = 4  # validation images that are drawn after each evaluation


class Report:
    """Output of a run. Only rank 0 writes. Entering the context shows the progress bar.

    Args:
        state: the state to report on.
        schedule: length of the run.
        batch_size: images per update, for the images per second.
    """

    def __init__(self, state: TrainingState, schedule: Schedule, batch_size: int) -> None:
        self.state, self.schedule, self.batch_size = state, schedule, batch_size
        self.log: Log | None = None
        self.restart_clock()

    def open_log(self, folder: RunFolder) -> None:
        """Open the log at the state's update. Before that nothing is logged."""
        self.log = Log(folder.path, self.state.step, self.state.evaluated)

    def __enter__(self) -> Report:
        self.bar = tqdm(
            desc="training",
            total=self.schedule.num_steps,
            initial=self.state.step,
            unit="update",
            dynamic_ncols=True,
            disable=None if distributed.rank() == 0 else True,
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.close()
        if self.log is not None:
            self.log.close()

    def advance(self) -> None:
        """Move the progress bar by one update."""
        self.bar.update()

    def restart_clock(self) -> None:
        """Measure the speed from now on, so that the time of an evaluation does not count."""
        self.clock, self.clock_step = time.perf_counter(), self.state.step

    def loss(self) -> None:
        """Show and log loss, learning rate and speed since the last call."""
        state = self.state
        seconds, updates = time.perf_counter() - self.clock, state.step - self.clock_step
        speed = updates * self.batch_size / seconds
        self.bar.set_postfix_str(f"loss {state.loss:.3f}, {speed:.1f} images/s")
        learning_rate = state.optimizer.param_groups[0]["lr"]
        self._log(loss=state.loss, learning_rate=learning_rate, images_per_second=speed)
        self.restart_clock()

    def scores(self, scores: Scores, data: SegmentationData) -> None:
        """Log the scores of an evaluation and draw the first images of its data."""
        values = scores.as_dict()
        names = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
        self._log(**{f"val_{name}": values[name] for name in names})
        self._log(**{f"val_iou/{name}": value for name, value in values["iou"].items()})
        if self.log is not None and self.log.writer is not None:
            self._draw(self.log, data)

    def _log(self, **values: float | None) -> None:
        if self.log is not None:
            self.log.scalars(self.state.step, **values)

    def _draw(self, log: Log, data: SegmentationData) -> None:
        model = self.state.result.eval()
        painting = painting_of(data.classes, len(data.classes))
        for index in range(min(_NUM_PICTURES, len(data))):
            image, ground_truth = data.read(index)
            prediction = self._predict(model, image)
            pictures = [
                image,
                overlay(image, prediction, painting),
                overlay(image, ground_truth, painting),
            ]
            log.picture(self.state.step, f"val/{index} image, prediction, ground truth", pictures)
        self.state.train_mode()

    def _predict(self, model: Any, image: Image.Image) -> np.ndarray:
        pixels = network_input(image, model.preprocessing, model.align_corners)
        with self.state.autocast():
            size = image.height, image.width
            return predict_labels(model, pixels.to(self.state.device), size).cpu().numpy()

    def epoch(self, scores: Scores | None) -> None:
        """Print the loss and the main scores, if there are any, after an evaluation."""
        epoch = self.state.step // self.schedule.steps_per_epoch
        line = f"epoch {epoch} of {self.schedule.epochs}: loss {self.state.loss:.3f}"
        if scores is not None:
            line += (
                f", mean IoU {100 * scores.miou:.2f} %, "
                f"pixel accuracy {100 * scores.pixel_accuracy:.2f} %"
            )
            if scores.only_prediction is not None:
                line += f", all pixels predicted as {scores.only_prediction}"
        self._print(line)

    def finished(self, folder: RunFolder) -> None:
        """Print the folder of the models and the best score."""
        miou = self.state.best_miou
        best = "" if miou is None else f", best mean IoU {100 * miou:.2f} %"
        self._print(f"finished: models in {folder.path}{best}")

    def _print(self, line: str) -> None:
        if distributed.rank() == 0:
            tqdm.write(line)
