"""The floating-point type that a device really has, chosen once for training and encoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ebr_lib.names import Asked

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Precision:
    """The chosen type, and the reason if it is not the one asked for."""

    dtype: Dtype
    why: str = ""


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself; emulated, it is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return False
    words = set(cpuinfo.read_text().split())
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & words)


def choose_precision(asked: Asked | Dtype, device: str) -> Precision:
    """The type nearest to `asked` that the device has.

    :param asked: "auto" takes bfloat16 where the hardware has it, else float32.
    :param device: a torch device, such as "cuda:0" or "cpu"; others than these two kinds get `asked`.
    """
    import torch

    device = device.partition(":")[0]
    if device not in ("cuda", "cpu") or asked == "float32":
        return Precision("float32" if asked == "auto" else asked)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_bf16()
    if asked == "float16" and device == "cuda":
        return Precision("float16")
    if has_bf16:
        return Precision("bfloat16", "this processor has no float16; bfloat16 is the nearest" * (asked == "float16"))
    if asked == "bfloat16" and device == "cuda":
        return Precision("float16", "this GPU has no bfloat16; float16 is the nearest")
    return Precision("float32", f"this {device} has no {asked}; float32 is the nearest" * (asked != "auto"))
