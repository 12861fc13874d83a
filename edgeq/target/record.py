"""The Target record: what a device family can do, read from one TOML file (L3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgeq.num.quant import Quant


@dataclass(frozen=True)
class Limits:
    """Hard facts a file for this target must keep.

    ``pair_sum_max``: largest magnitude two neighbouring u8 x i8 products may add to (32767 where they are added in 16
    bits, else what 32 hold).
    ``bias_bits``: width of the bias integer. ``min_scale``: smallest scale the runtime handles without underflow.
    """

    pair_sum_max: int = 2**31 - 1
    bias_bits: int = 32
    min_scale: float = 2.0**-126


@dataclass(frozen=True)
class Target:
    """A device family.

    ``isa`` lists the CPU flags it needs, ``a|b`` for either; ``session`` holds ONNX Runtime session config entries.
    """

    name: str
    summary: str
    device: str
    provider: str
    opset: int
    activations: Quant
    weights: Quant
    bias: str = "i32"
    float_format: str = "f32"
    isa: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()  # op types worth asking the oracle for an integer kernel
    through: tuple[str, ...] = ()  # data movers: codes pass, scale shared
    dynamic: tuple[str, ...] = ()  # op types with a dynamically quantized kernel
    session: dict[str, str] = field(default_factory=dict)
    threads: tuple[int, ...] = (1, 2)  # thread counts latency is measured at
    limits: Limits = Limits()
    rules: tuple[str, ...] = ()
    fuse: tuple[str, ...] = ()
    sparsity: tuple[str, ...] = ()
    memory_bytes: int | None = None
    verified: str = "documentation"  # "here" | "emulator" | "documentation"
    sources: dict[str, str] = field(default_factory=dict)  # key -> where the fact comes from
    extends: str = ""
