"""Checkpoints that are written while training goes on."""

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_callbacks.checkpointing.atomic_checkpoint_io import AtomicCheckpointIO


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """Copy a checkpoint into host memory that is kept, and let a thread write it.

    ``Trainer(plugins=[BackgroundCheckpointIO()])``, beside :class:`VerifiedCheckpoint`: what is not yet committed does
    not count, and an older checkpoint is deleted when the newer one is. Lightning's ``AsyncCheckpointIO`` takes fresh
    memory for each save. A second save waits for the first.

    Raises:
        OSError: At the next save, or at the end, if a save in the background has failed.

    State: none.

    Cost: training waits for one copy of the checkpoint (``benchmarks/checkpoint_cost.py``), whose memory is kept; the
    writing thread takes some of Python's lock and of the processor.
    """

    def __init__(self) -> None:
        self._copy = ReusedCopy()
        self._executor: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copy, and return; the save before this one has been written by then."""
        failure = self._wait()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        copied = self._copy.of(checkpoint)
        self._under_way = self._executor.submit(self._write, copied, path, storage_options)
        if failure is not None:
            raise failure

    def _write(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Wait, and read."""
        self.finish()
        return super().load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Wait, and delete."""
        self.finish()
        super().remove_checkpoint(path)

    def has_failed(self) -> bool:
        """Whether the last save has failed, as far as is known yet."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def finish(self) -> None:
        """Wait for what is being written."""
        if (failure := self._wait()) is not None:
            raise failure

    def teardown(self) -> None:
        """Wait, and let the thread go."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        self.finish()

    def _wait(self) -> OSError | None:
        under_way, self._under_way = self._under_way, None
        error = None if under_way is None else under_way.exception()
        return None if error is None else OSError(f"a save in the background has failed: {error}")


class ReusedCopy:
    """Copies of nested data, tensor by tensor, into memory that the next copy takes again.

    Tensors that share memory share it in the copy, so that a file does not grow by tied weights.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def of(self, data: Any) -> Any:
        """A copy that stays as it is until the next one is made.

        Example:
            >>> source = {"a": torch.zeros(2), "n": [1]}
            >>> copied = ReusedCopy().of(source)
            >>> _ = source["a"].add_(1)
            >>> copied
            {'a': tensor([0., 0.]), 'n': [1]}
        """
        sources: dict[int, Tensor] = {}
        _collect(data, sources)
        self._make_room([source.numel() for source in sources.values()], any(s.is_cuda for s in sources.values()))
        buffers = dict(zip(sources, self._buffers, strict=False))
        if sources:
            torch._foreach_copy_(list(buffers.values()), list(sources.values()), non_blocking=True)
        for device in {source.device for source in sources.values() if source.device.type != "cpu"}:
            torch.get_device_module(device).synchronize(device)
        return _rebuild(data, buffers)

    def _make_room(self, sizes: list[int], pinned: bool) -> None:
        for i, size in enumerate(sizes):
            if i == len(self._buffers):
                self._buffers.append(torch.empty(0, dtype=torch.uint8))
            if self._buffers[i].numel() != size:
                self._buffers[i] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def _bytes(tensor: Tensor) -> Tensor:
    """The whole memory behind a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _collect(data: Any, sources: dict[int, Tensor]) -> None:
    if isinstance(data, Tensor):
        if _is_plain(data) and (key := data.untyped_storage()._cdata) not in sources:
            sources[key] = _bytes(data)
    elif isinstance(data, Mapping | list | tuple):
        for item in data.values() if isinstance(data, Mapping) else data:
            _collect(item, sources)


def _rebuild(data: Any, buffers: Mapping[int, Tensor]) -> Any:
    if isinstance(data, Tensor):
        if not _is_plain(data):
            return data.detach().clone() if data.layout != torch.strided else data.detach().resolve_conj().clone()
        storage = buffers[data.untyped_storage()._cdata].untyped_storage()
        return torch.empty(0, dtype=data.dtype).set_(storage, data.storage_offset(), data.size(), data.stride())
    if isinstance(data, dict):
        copied = copy.copy(data)  # with its attributes: a state_dict has the versions of its modules
        for key, value in data.items():
            copied[key] = _rebuild(value, buffers)
        return copied
    if type(data) in (list, tuple):
        return type(data)(_rebuild(item, buffers) for item in data)
    return copy.deepcopy(data)


def _is_plain(tensor: Tensor) -> bool:
    """Dense, of torch's own class, and what its memory says: others, such as sparse or conjugated ones, are not."""
    ours = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return ours and not (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
