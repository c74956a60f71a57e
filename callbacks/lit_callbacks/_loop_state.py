"""Corrections to the loop progress in a checkpoint, so that Lightning goes on where the run was."""

from typing import Any


def rerun_validation(loops: dict[str, Any]) -> None:
    """Let the validation that is due, or under way, be run from its beginning when the run goes on.

    Lightning 2.6.6 takes a checkpoint saved in front of a validation, or inside it, as one saved behind it, and leaves
    the validation out.

    Args:
        loops: ``checkpoint["loops"]``, changed in place.
    """
    fit = loops["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    for count in (batches["total"], batches["current"]):
        count["completed"] = count["processed"] = count["ready"]
    validation = fit["epoch_loop.val_loop.batch_progress"]
    done = validation["total"]["completed"]
    validation["total"] = {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
    validation["current"] = dict.fromkeys(validation["current"], 0)


def begin_epoch(loops: dict[str, Any]) -> None:
    """Let the epoch that has just been started begin with its first batch when the run goes on.

    At ``on_train_epoch_start`` the counters are still those of the epoch before, of which all batches are done;
    Lightning 2.6.6 would take the new epoch for done, and lose it.

    Args:
        loops: ``checkpoint["loops"]``, changed in place.
    """
    fit = loops["fit_loop"]
    fit["epoch_loop.batch_progress"]["is_last_batch"] = False
    for name in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress"):
        fit[name]["current"] = dict.fromkeys(fit[name]["current"], 0)
