"""Pictures, for the loggers that can show them and, of those that cannot, in the run folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def logger_kind(logger: object) -> str | None:
    """``WandbLogger``, ``TensorBoardLogger`` or None.

    By name: ``lightning`` and ``pytorch_lightning`` each have their own classes.
    """
    names = {cls.__name__ for cls in type(logger).__mro__}
    return next((kind for kind in ("WandbLogger", "TensorBoardLogger") if kind in names), None)


def show_picture(trainer: Trainer, step: int, key: str, figure: "Figure", folder: Path) -> None:
    """Show a picture on every logger, over ``trainer/global_step``. On rank zero only.

    Where there is a logger that cannot show pictures, or none, it is ``figures/<key>.png`` in the run folder, where the
    newest replaces the last.

    Args:
        trainer: Whose loggers.
        step: Of the picture.
        key: Its metric key; in the file's name ``/`` is ``_``.
        figure: Drawn without pyplot, whose figures are not for threads.
        folder: The run folder.

    Raises:
        OSError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.image import imsave

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        kind = logger_kind(logger)
        if kind == "WandbLogger":
            logger.log_image(key, [pixels], step=step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")
    if not loggers or any(logger_kind(logger) is None for logger in loggers):
        path = folder / "figures" / f"{key.replace('/', '_')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, pixels)
