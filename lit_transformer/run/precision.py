"""The precision a machine is good at."""

from collections.abc import Mapping

import torch


def choose_precision(accelerator: str = "auto") -> tuple[str, str]:
    """A precision for the Trainer, and the reason for it in a few words.

    bf16 mixed precision where the hardware multiplies it faster than fp32: CUDA devices from compute capability 8.0,
    and processors with AVX512-BF16 or AMX. Everywhere else fp32; fp16 is never chosen, because it needs loss scaling.

    Args:
        accelerator: The Trainer's setting.

    Example:
        >>> choose_precision("mps")
        ('32-true', 'mps')
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", torch.cuda.get_device_name()
        return "32-true", f"{torch.cuda.get_device_name()} has no bf16"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        # Not in every supported torch.
        capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        for feature in ("amx_bf16", "avx512_bf16"):
            if capabilities.get(feature, False):
                return "bf16-mixed", f"this processor has {feature}"
        return "32-true", "this processor has no fast bf16"
    return "32-true", "mps"
