"""How fast is it, and is the hardware waiting for data?"""

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_callbacks._batch import samples_and_tokens
from lit_callbacks._evaluation import EvaluationHooks
from lit_callbacks._flops import ForwardFlops, compute_dtype, measured_gemm_rate, peak_flops
from lit_callbacks._observer import Observer
from lit_callbacks._ranks import Measurement, tensor_parallel
from lit_callbacks._stopwatch import Stopwatch


class ThroughputLogger(Observer, EvaluationHooks):
    r"""Log speed, how it is spread, what is waited for, and how much of the hardware is used.

    Tokens are the elements of the batch's token ids, padding included: what it has under ``input_ids``, else its first
    integer tensor of two dimensions. Where there are none, samples alone are counted. A step is an optimizer step with
    all its micro-batches; validation is left out. Times are the host's; a GPU keeps them in pace by the data it waits
    for, not step by step.

    Model FLOPs are torch's count of the first batch's forward pass, times three for the backward pass (Chowdhery et al.
    2022, *PaLM*, appendix B: nothing for recomputation, causal attention in full), in proportion to tokens. MFU is
    their rate over the chip's peak in Lightning's tables. A CPU has no such peak: there, their rate is given over that
    of a matrix product measured on the spot, and is called so.

    Logs, every ``every_n_steps`` optimizer steps, over the steps since the last time, all ranks together; the first
    four also in ``validate`` and ``test``, where a step is a batch:
        throughput/tokens_per_second: absent if the batch has no token ids.
        throughput/samples_per_second: always.
        throughput/step_time_p50: median of the seconds that a step takes.
        throughput/step_time_p95: 95th percentile of these.
        throughput/data_wait_share: share of the time that passes between the end of a batch and the start of the next:
            loading, moving to the device, and the callbacks that come after this one.
        throughput/effective_batch_tokens: tokens per step over all ranks and micro-batches.
        throughput/effective_batch_samples: samples per step.
        throughput/model_tflops: 10¹² model FLOPs per second and device; absent in manual optimization, as are the next.
        throughput/mfu: their share of the device's peak; only on a GPU in Lightning's tables.
        throughput/gemm_utilization: their share of a measured matrix product's rate; only on a CPU.
        throughput/gpu_memory_gib: most memory that tensors have held on a device, in GiB; only with CUDA.
        throughput/training_hours: wall-clock hours in fit, over all resumes.
        throughput/total_tokens: tokens seen, over all resumes; absent without token ids.

    Args:
        every_n_steps: Optimizer steps between reports.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.

    State: hours, tokens and samples so far; exact if all ranks have batches of the same size.

    Cost: two readings of the clock and a look at the batch on each one; the first forward pass of a fit runs under the
    counter, eagerly.

    Example:
        >>> ThroughputLogger(every_n_steps=10).every_n_steps
        10
    """

    serves_shards = True
    serves_zero = True

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps)
        self._seconds_before, self._tokens_before = 0.0, 0.0
        self._watch: Stopwatch | None = None
        self._fit_began: float | None = None
        self._forward = ForwardFlops()
        self._counted = (0, 0)
        self._available: dict[str, float] | None = None
        self._device, self._dtype = torch.device("cpu"), torch.float32
        self._samples = self._tokens = self._step = 0
        self._ranks = self._sharing = 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock. The first report comes after a full period."""
        self.cadence.start(trainer.global_step + 1)
        self._fit_began = time.perf_counter()
        self._step, self._ranks = trainer.global_step, trainer.world_size
        self._device, self._dtype = trainer.strategy.root_device, compute_dtype(trainer)
        self._forward, self._counted, self._available = ForwardFlops(), (0, 0), None
        self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        self._watch = Stopwatch()
        self._sharing = tensor_parallel(trainer)[1]
        self._samples = self._tokens = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch has come; the first one is counted."""
        if self._watch is not None:
            self._watch.begin_batch()
        if not self._forward.begun and pl_module.automatic_optimization:
            self._counted = samples_and_tokens(batch)
            self.attempt(self._forward.begin, trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        self._forward.end(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; report if it is time."""
        if self._watch is None:
            return
        self._add(batch)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._watch.end_step()
            if self.cadence.due(self._step):
                self._report(trainer, pl_module, self._step - 1)
        if self._watch is not None:
            self._watch.end_batch()

    def _add(self, batch: Any) -> None:
        samples, tokens = samples_and_tokens(batch)
        self._samples += samples
        self._tokens += tokens

    def _report(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        watch = self._watch
        if watch is None or not watch.step_times:
            return
        samples, tokens = self._samples, self._tokens
        self.report(trainer, pl_module, step, lambda: self._measure(watch, samples, tokens))
        self._samples = self._tokens = 0
        watch.restart()

    def _measure(self, watch: Stopwatch, samples: int, tokens: int) -> Measurement:
        times = torch.tensor(watch.step_times)
        counted_samples, counted_tokens = self._counted
        batches = tokens / counted_tokens if counted_tokens else samples / max(counted_samples, 1)
        seen = [number / self._sharing for number in (samples, tokens)]  # by each of those that share a batch
        sums = torch.tensor([*seen, 3.0 * self._forward.total * batches])
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else 0.0
        spread = torch.quantile(times, torch.tensor([0.5, 0.95]))
        maxima = torch.cat([torch.tensor([watch.seconds, watch.waited, float(len(times)), memory]), spread])
        return Measurement({"counts": sums}, {"times": maxima})

    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """Rates over all ranks; the slowest rank is the one that counts."""
        samples, tokens, flops = total.sums["counts"].unbind()
        seconds, waited, steps, memory, p50, p95 = total.maxima["times"].unbind()
        values = {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            "step_time_p50": p50,
            "step_time_p95": p95,
            "data_wait_share": waited / seconds,
        }
        if self._fit_began is not None:
            self._tokens_before += float(tokens)
            values |= {
                "effective_batch_tokens": tokens / steps,
                "effective_batch_samples": samples / steps,
                "total_tokens": torch.tensor(self._tokens_before),
                "training_hours": torch.tensor(self._seconds() / 3600),
            }
            if memory:
                values["gpu_memory_gib"] = memory
            if flops:
                values |= self._utilization(flops / seconds / self._ranks)
        if not tokens:
            values = {name: value for name, value in values.items() if "tokens" not in name}
        return {f"throughput/{name}": value for name, value in values.items()}

    def _utilization(self, rate: Tensor) -> dict[str, Tensor]:
        if self._available is None:
            if self._device.type == "cpu":
                self._available = {"gemm_utilization": measured_gemm_rate(self._dtype)}
            else:
                peak = peak_flops(self._device, self._dtype)
                self._available = {"mfu": float(peak)} if peak else {}
        shares = {name: rate / available for name, available in self._available.items()}
        return {"model_tflops": rate / 1e12, **shares}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the rest of the steps."""
        self._report(trainer, pl_module, self._step - 1)
        self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a fit, validation does not count."""
        super().on_validation_start(trainer, pl_module)
        if self._watch is not None and trainer.state.fn == "fit":
            self._watch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the fit."""
        if self._watch is not None:
            self._watch.go_on()

    def evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._begin(trainer)

    def evaluation_batch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The batch has come."""
        if self._watch is not None:
            self._watch.begin_batch()

    def evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Count."""
        if self._watch is not None:
            self._add(batch)
            self._watch.end_step()
            self._watch.end_batch()

    def evaluation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the whole loader."""
        self._report(trainer, pl_module, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the clock."""
        super().teardown(trainer, pl_module, stage)
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the clock."""
        super().on_exception(trainer, pl_module, exception)
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._forward.end(trainer)
        self._seconds_before = self._seconds()
        self._fit_began = self._watch = None

    def _seconds(self) -> float:
        return self._seconds_before + (0.0 if self._fit_began is None else time.perf_counter() - self._fit_began)

    def state_dict(self) -> dict[str, Any]:
        """Seconds and tokens so far."""
        return {"seconds": self._seconds(), "tokens": self._tokens_before + self._tokens * self._ranks / self._sharing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._seconds_before, self._tokens_before = state_dict["seconds"], state_dict["tokens"]
