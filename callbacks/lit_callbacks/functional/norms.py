"""Norms of many tensors."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    r"""L2 norm of each tensor, computed in fp32 or wider.

    Args:
        tensors: Any shapes, devices and floating-point types; sparse tensors are summed over repeated indices first.

    Returns:
        Shape ``(len(tensors),)``, fp32, on the device of the first tensor (CPU when there is none). A norm beyond
        ``1.8e19`` may come out as infinite, since its square overflows.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.tensor([300.0], dtype=torch.float16)])
        tensor([  5., 300.])
    """
    if not tensors:
        return torch.zeros(0)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    for index, tensor in enumerate(dense):
        groups[tensor.device, tensor.dtype].append(index)
    norms = list(dense)
    for (_, dtype), indices in groups.items():
        wide = torch.promote_types(dtype, torch.float32)
        for index, norm in zip(indices, torch._foreach_norm([dense[i] for i in indices], 2, dtype=wide), strict=True):
            norms[index] = norm
    return torch.stack([norm.to(dense[0].device, torch.float32) for norm in norms])


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    r"""Global L2 norm :math:`\sqrt{\sum_t \sum_i t_i^2}` of many tensors.

    Args:
        tensors: As for :func:`tensor_norms`.

    Returns:
        Shape ``()``, fp32; 0 when there are no tensors.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)])
        tensor(5.)
    """
    norm: Tensor = torch.linalg.vector_norm(tensor_norms(tensors))
    return norm
