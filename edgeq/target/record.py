"""The Target record: what a device family can do, read from one TOML file (L3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
class Provider:
    """An ONNX Runtime execution provider and what a session on it is opened with.

    ``library``: the Python module that ships it as a plug-in, "" where the runtime itself holds it. ``session``:
    session config entries. ``install``: what to do where it is missing. ``environment``: the Python environment whose
    own runtime holds it where this one doesn't, of ``packages``. ``threads_option``: its option that is the number of
    threads, where it has a pool of its own.
    """

    name: str = "CPUExecutionProvider"
    library: str = ""
    install: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    environment: str = ""
    packages: Sequence[str] = ()
    threads_option: str = ""


CPU = Provider()


@dataclass(frozen=True)
class Target:
    """A device family.

    ``isa`` lists the CPU flags it needs, ``a|b`` for either; ``session`` holds ONNX Runtime session config entries.
    ``library``, ``install``, ``environment``, ``packages``, ``threads_option``, ``options``: see ``Provider``;
    ``toolkit``: what compiles for it, when that is what the environment holds instead of the provider;
    ``device_files``: patterns of files of which Linux has one where the device is, and software stands in where it has
    none. ``choices``: option -> the values it may have -> what each means. ``whole``: a float node costs more than any
    integer one, or leaves the provider. ``static``: takes fixed shapes only. ``emulator``: machines (``x64``) where the
    provider's library does what the device would, not as fast.
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
    library: str = ""
    install: str = ""
    environment: str = ""
    packages: tuple[str, ...] = ()
    toolkit: str = ""
    threads_option: str = ""
    device_files: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    choices: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: bool = False
    static: bool = False
    emulator: tuple[str, ...] = ()
    session: dict[str, str] = field(default_factory=dict)
    threads: tuple[int, ...] = (1, 2)  # thread counts latency is measured at
    limits: Limits = Limits()
    rules: tuple[str, ...] = ()
    fuse: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()  # of edgeq's own library, for what is faster with them
    sparsity: tuple[str, ...] = ()
    memory_bytes: int | None = None
    verified: str = "documentation"  # "here" | "emulator" | "documentation"
    sources: dict[str, str] = field(default_factory=dict)  # key -> where the fact comes from
    extends: str = ""

    @property
    def execution(self) -> Provider:
        """What a file for this target runs on. The environment of a toolkit holds no provider."""
        environment, packages = ("", ()) if self.toolkit else (self.environment, self.packages)
        return Provider(
            self.provider,
            self.library,
            self.install,
            self.options,
            self.session,
            environment,
            packages,
            self.threads_option,
        )

    @property
    def simulation(self) -> Provider:
        """Where its arithmetic is studied: the CPU computes each Q/DQ as ONNX defines it, on every machine and fast."""
        return self.execution if self.provider == CPU.name else CPU
