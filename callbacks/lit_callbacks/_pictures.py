"""Pictures, for the loggers that can show them and, of those that cannot, in the run folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
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
    pixels = _pixels(figure)
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        kind = logger_kind(logger)
        if kind == "WandbLogger":
            logger.log_image(key, [pixels], step=step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_image(key, pixels, step, dataformats="HWC")
    if needs_files(trainer):
        _save(pixels, key, folder)


def needs_files(trainer: Trainer) -> bool:
    """Whether there is a logger that cannot show pictures, or none."""
    return not trainer.loggers or any(logger_kind(logger) is None for logger in trainer.loggers)


def save_picture(key: str, figure: "Figure", folder: Path) -> None:
    """Write ``figures/<key>.png`` in the run folder, in place of the last.

    Raises:
        OSError: If the file cannot be written.
    """
    _save(_pixels(figure), key, folder)


def _pixels(figure: "Figure") -> "npt.NDArray[np.uint8]":
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _save(pixels: "npt.NDArray[np.uint8]", key: str, folder: Path) -> None:
    from matplotlib.image import imsave

    path = folder / "figures" / f"{key.replace('/', '_')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, pixels)
