"""``runtime.tracking``: a run's numbers for TensorBoard, through Lightning's own logger.

    tensorboard --logdir <runtime.output_dir>/<name>/logs

The step of every number is its round. A client's numbers go by its folder's name: one group a
number, one line a client.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pfl_lm.federation.messages import Update
from pfl_lm.federation.watch import RoundReport, Watch, Watches, Workload
from pfl_lm.files import explained
from pfl_lm.quantities import without_layers

if TYPE_CHECKING:
    from lightning.pytorch.loggers import TensorBoardLogger

    from pfl_lm.recipe import RuntimeOptions

FOLDER = "logs"


@contextmanager
def tracked(
    watch: Watch, runtime: RuntimeOptions, run_folder: Path, slugs: Mapping[str, str]
) -> Iterator[Watch]:
    """Return ``watch``, joined by the tracker that the recipe asks for, which is closed at the end.

    Raises:
        RunFolderError: its files cannot be written.
    """
    if runtime.tracking == "none":
        yield watch
        return
    tracker = TensorBoard(run_folder / FOLDER, slugs)
    try:
        yield Watches(watch, tracker)
    except BaseException:
        with suppress(Exception):  # what ended the run is what a person should hear of
            tracker.close()
        raise
    tracker.close()


class TensorBoard(Watch):
    """Writes what it is told of rounds and turns to event files.

    Args:
        folder: where they go; it is this tracker's alone.
        slugs: what each client is called in them.
    """

    def __init__(self, folder: Path, slugs: Mapping[str, str]) -> None:
        self.folder = folder
        self.slugs = slugs
        self._logger: TensorBoardLogger | None = None

    def begin(self, workload: Workload) -> None:
        """Start afresh, or go on: a run that begins again with another rate keeps nothing."""
        from lightning.pytorch.loggers import TensorBoardLogger

        self.close()
        with explained(self.folder):
            if workload.done is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._logger = TensorBoardLogger(self.folder, name="", version="")

    def turn(self, update: Update) -> None:
        """Write the numbers of one client's turn: its losses, its norms, its means of P and γ."""
        slug = self.slugs[update.client]
        numbers = {**without_layers(update.summary), "seconds": update.seconds}
        self._write(update.round, {f"{name}/{slug}": value for name, value in numbers.items()})

    def round(self, report: RoundReport) -> None:
        """Write the numbers of a round, and see that they and its turns' are on disk."""
        numbers: dict[str, float] = {
            "validation/mean": report.mean,
            "validation/worst": report.worst,
            "round/bytes_up": report.bytes_up,
            "round/seconds": report.seconds,
        }
        if report.train_loss is not None:
            numbers["train/loss"] = report.train_loss
        self._write(report.round, numbers)
        if self._logger is not None:
            with explained(self.folder):
                self._logger.experiment.flush()

    def close(self) -> None:
        """Write what is still in memory, and close the files."""
        if self._logger is not None:
            with explained(self.folder):
                self._logger.experiment.close()
        self._logger = None

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._logger is None:
            return
        with explained(self.folder):
            for name, value in numbers.items():
                self._logger.experiment.add_scalar(name, value, step)
