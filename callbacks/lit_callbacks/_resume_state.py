"""What a Lightning checkpoint leaves out of a run: random numbers, metrics, and what was logged in this epoch."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lit_callbacks._forward_state import set_values, values_of
from lit_callbacks._loader_position import loader_generators
from lit_callbacks._rng import plain_rng, rng_state, rng_state_of, set_rng_state
from lit_callbacks._shards import whole_shapes
from lit_callbacks.protocols import HasFingerprint


def randomness(trainer: Trainer) -> dict[str, Any]:
    """The states of all generators: the global ones of this rank, and those that the training loaders own."""
    return {
        "global": plain_rng(rng_state(trainer.strategy.root_device)),
        "loaders": [generator.get_state() for generator in loader_generators(trainer)],
    }


def set_randomness(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Put back what :func:`randomness` returned."""
    set_rng_state(rng_state_of(state["global"]), trainer.strategy.root_device)
    for generator, saved in zip(loader_generators(trainer), state["loaders"], strict=False):
        generator.set_state(saved.cpu())


def capture(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The state of this rank, as plain data."""
    over = _about_to_be_reset(trainer)
    metrics = {name: m for name, m in module.named_modules() if isinstance(m, Metric) and id(m) not in over}
    return {
        "randomness": randomness(trainer),
        "metrics": {name: _without_cache(values_of(metric)) for name, metric in metrics.items()},
        "logged": {key: _logged(result) for key, result in logged_means(trainer).items()},
        "logged_metrics": _logged_metrics(trainer),
        "callback_metrics": {key: _plain(value) for key, value in trainer.callback_metrics.items()},
    }


def restore(trainer: Trainer, module: LightningModule, state: Mapping[str, Any]) -> None:
    """Put back what :func:`capture` returned, but for what was logged: see :func:`add_logged`."""
    for name, metric in module.named_modules():
        if isinstance(metric, Metric) and name in state["metrics"]:
            set_values(metric, {key: _to(value, metric.device) for key, value in state["metrics"][name].items()})
    values = {key: _to(value, trainer.strategy.root_device) for key, value in state["callback_metrics"].items()}
    trainer._logger_connector._callback_metrics.update(values)
    set_randomness(trainer, state["randomness"])


def logged_means(trainer: Trainer) -> dict[str, Any]:
    """What ``self.log`` has added up in this epoch so far. Metrics that were logged keep their sums themselves."""
    results = trainer.fit_loop.epoch_loop._results
    return {
        key: result
        for key, result in results.items()
        if result.is_tensor and result.meta.on_epoch and not result.has_reset and result.update_called
    }


def add_logged(trainer: Trainer, saved: dict[str, dict[str, Any]]) -> None:
    """Add what was logged before the resume to what has been since; what is done is taken out of ``saved``.

    The entry of a name does not exist before it is logged for the first time after the resume.
    """
    for key, result in logged_means(trainer).items():
        if (before := saved.pop(key, None)) is None:
            continue
        value = before["value"].to(result.value.device)
        if result.meta.is_mean_reduction:
            result.value = value + result.value
            weight = before["cumulated_batch_size"].to(result.value.device)
            result.cumulated_batch_size = weight + result.cumulated_batch_size
        elif result.meta.is_sum_reduction:
            result.value = value + result.value
        elif result.meta.is_max_reduction or result.meta.is_min_reduction:
            result.value = result.meta.reduce_fx(value, result.value)
        result._computed = None


def _logged_metrics(trainer: Trainer) -> dict[str, str]:
    """Metrics of the module that ``self.log`` has been given in this epoch: logged name to attribute."""
    return {
        result.meta.forked_name(on_step=False): result.meta.metric_attribute
        for result in trainer.fit_loop.epoch_loop._results.values()
        if not result.is_tensor and result.meta.on_epoch and result.meta.logger and not result.has_reset
    }


def finish_metrics(trainer: Trainer, module: LightningModule, saved: Mapping[str, str]) -> dict[str, float]:
    """Compute and reset the metrics of an epoch that has had no batch since the resume: nobody else will."""
    values: dict[str, float] = {}
    modules = dict(module.named_modules())
    for name in saved.keys() - _logged_metrics(trainer).keys():
        metric = modules[saved[name]]
        assert isinstance(metric, Metric)
        values[name] = float(metric.compute())
        metric.reset()
    return values


def epoch_means(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The row of an epoch that has had no batch since the resume, from what was logged before it."""
    means: dict[str, float] = {}
    for before in saved.values():
        if before["name"] is not None:
            means[before["name"]] = float(before["value"] / before.get("cumulated_batch_size", 1))
    return means


def fingerprint(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What must be the same when a run goes on: the model's shape, the batches, and what the data says of itself."""
    whole = whole_shapes(trainer, module)
    shapes = [(name.replace("_fsdp_wrapped_module.", ""), tuple(whole[id(p)])) for name, p in module.named_parameters()]
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return {
        "world_size": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "parameters": hashlib.sha256(repr(shapes).encode()).hexdigest(),
        "data": dict(data.fingerprint()) if isinstance(data, HasFingerprint) else {},
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What both fingerprints have, and have different.

    Example:
        >>> changes({"world_size": 2, "data": {"seed": 0}}, {"world_size": 2, "data": {"seed": 1}})
        ['data.seed was 0 and is 1']
    """
    found: list[str] = []
    for key in sorted(then.keys() & now.keys()):
        if isinstance(then[key], Mapping) and isinstance(now[key], Mapping):
            found += changes(then[key], now[key], f"{prefix}{key}.")
        elif then[key] != now[key]:
            found.append(f"{prefix}{key} was {then[key]} and is {now[key]}")
    return found


def _about_to_be_reset(trainer: Trainer) -> set[int]:
    """Metrics of the validation, in its ``on_validation_end``: Lightning resets those that were logged right after."""
    if not trainer.validating:
        return set()
    results = trainer.fit_loop.epoch_loop.val_loop._results.values()
    return {id(result.value) for result in results if not result.is_tensor}


def _logged(result: Any) -> dict[str, Any]:
    name = result.meta.forked_name(on_step=False) if result.meta.logger else None
    return {**_without_cache(values_of(result)), "name": name}


def _without_cache(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if key == "_computed" else _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to(inner, device) for inner in value]
    return value.to(device) if isinstance(value, Tensor) else value
