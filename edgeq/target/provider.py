"""Sessions on any execution provider: of the runtime itself, or shipped by a Python package as a plug-in (L3).

The only place that opens one on a provider other than the CPU's. ``get_providers()`` is never believed: it lists what
was asked for, though every node may have gone to the CPU (QNN with a SoC it doesn't know, CUDA without its libraries).
``assigned`` says which provider the runtime really gave each node to; where it keeps silent, ``ran`` says who ran it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeq.errors import RuntimeUnavailableError
from edgeq.target import kernels
from edgeq.target.record import CPU, Provider

RECORD = "session.record_ep_graph_assignment_info"  # known since ONNX Runtime 1.24


def held_here(provider: Provider) -> bool:
    """Whether this Python holds ``provider``, as a plug-in or as part of its runtime."""
    import onnxruntime

    return plugged_in(provider) or provider.name in onnxruntime.get_available_providers()


def plugged_in(provider: Provider) -> bool:
    """Whether the plug-in that ships ``provider`` is installed; else its runtime must hold it."""
    return bool(provider.library) and importlib.util.find_spec(provider.library) is not None


def check_provider(provider: Provider) -> None:
    """RuntimeUnavailableError, with what to install, unless this process could open a session on ``provider``."""
    import onnxruntime

    if held_here(provider):
        return
    if provider.library:
        raise RuntimeUnavailableError(
            f"{provider.name} needs the Python module {provider.library!r}, which isn't installed",
            hint=provider.install or f"install the package that holds {provider.library!r}",
        )
    raise RuntimeUnavailableError(
        f"provider {provider.name!r} isn't in the installed onnxruntime {onnxruntime.__version__}",
        hint=provider.install or f"available here: {', '.join(onnxruntime.get_available_providers())}",
    )


def provider_version(provider: Provider) -> str:
    """Package and version that hold ``provider`` in this process, "" for the CPU's own. See ``check_provider``."""
    check_provider(provider)
    if provider.name == CPU.name:
        return ""
    module = provider.library if plugged_in(provider) else "onnxruntime"
    packages = metadata.packages_distributions()[module]
    return f"{packages[0]}-{metadata.version(packages[0])}"


class RefusedError(Exception):
    """The runtime refused a model or failed while running it: the first line of why. ``argument``: a feed was wrong."""

    def __init__(self, message: str, argument: bool = False) -> None:
        super().__init__(message)
        self.argument = argument


def runtime_errors() -> tuple[type[Exception], ...]:
    """Every class the runtime raises from, which share no base but Exception, and ours for the other process."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    classes = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (*classes, RefusedError)


def first_line(error: BaseException) -> str:
    """The first line of a runtime message without its ``[ONNXRuntimeError]`` prefix; the node, when any, is in it."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.removeprefix("[ONNXRuntimeError] : ")


def open_on(model: Path | bytes, provider: Provider, settings: Mapping[str, Any]) -> Any:
    """An InferenceSession of ``model`` on ``provider``; what that doesn't take runs on the CPU.

    ``settings``: attributes of SessionOptions. What the runtime raises passes through: its own retry on the CPU is
    switched off."""
    import onnxruntime

    check_provider(provider)
    source = model if isinstance(model, bytes) else str(model)
    options = session_options(settings, provider)
    if provider.name == CPU.name:
        kernels.register(options, model)
    if provider.name == CPU.name or plugged_in(provider):
        named = {"providers": [CPU.name]} if provider.name == CPU.name else {}
        return onnxruntime.InferenceSession(source, options, **named)
    wanted = [(provider.name, dict(provider.options)), CPU.name]
    try:
        return onnxruntime.InferenceSession(source, options, providers=wanted, enable_fallback=0)
    except RuntimeError as error:  # the provider itself; what the runtime refuses has classes of its own
        raise RuntimeUnavailableError(
            f"{provider.name} can't start here: {first_line(error).rsplit(' was false. ')[-1]}",
            hint="it needs its device's driver; `edgeq explain` says what the target needs",
        ) from error


def session_options(settings: Mapping[str, Any], provider: Provider) -> Any:
    """SessionOptions with ``settings``, the provider's config entries and, for a plug-in, its devices here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    for key, value in provider.session.items():
        options.add_session_config_entry(key, value)
    if provider.name != CPU.name:
        options.add_session_config_entry(RECORD, "1")
    if plugged_in(provider):
        _add_plugin(options, provider)
    return options


def _add_plugin(options: Any, provider: Provider) -> None:
    import onnxruntime

    _register(provider)
    devices = [
        device
        for device in onnxruntime.get_ep_devices()
        # Virtual devices, on which one can only compile, are registered for the whole process by any plug-in's wish.
        if device.ep_name == provider.name and device.device.metadata.get("is_virtual") != "1"
    ]
    if not devices:
        raise RuntimeUnavailableError(
            f"{provider.library} is installed, but {provider.name} finds no device here",
            hint="run it on a machine with the device; `edgeq explain` says what the target needs",
        )
    options.add_provider_for_devices(devices, dict(provider.options))


@dataclass(frozen=True)
class Owner:
    """Who runs a node of the graph as it was partitioned: after fusions and layout passes."""

    provider: str
    op: str


def assigned(session: Any) -> dict[str, Owner]:
    """Node -> its owner, as the runtime tells; nodes without a name are one."""
    parts = session.get_provider_graph_assignment_info()
    return {node.name: Owner(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()}


# Providers of which a runtime that holds them names hardly a node: onnxruntime-webgpu 1.27.0 none of 87 it then runs,
# or two of 183. As plug-ins they are named in full.
SILENT = frozenset({"WebGpuExecutionProvider"})


def silent(provider: Provider) -> bool:
    """Whether ``assigned`` can't be believed, and only a run tells who runs what."""
    return provider.name in SILENT and not plugged_in(provider)


def profiling(prefix: Path) -> dict[str, Any]:
    """Settings of a session that ``ran`` can be asked of."""
    return {"enable_profiling": True, "profile_file_prefix": str(prefix)}


@dataclass(frozen=True)
class Ran:
    """A node that ran. ``real``: a float enters or leaves it."""

    name: str
    owner: Owner
    real: bool


def ran(session: Any) -> list[Ran]:
    """The nodes of every run so far, in order, from the profiler, which ends; see ``profiling``."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return [
        Ran(event["name"].removesuffix("_kernel_time"), Owner(facts["provider"], facts["op_name"]), _real(facts))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and (facts := event["args"])
    ]


def _real(facts: Mapping[str, Any]) -> bool:
    kinds = {kind for side in ("input_type_shape", "output_type_shape") for entry in facts[side] for kind in entry}
    return any("float" in kind or kind == "double" for kind in kinds)


def check_taken(session: Any, provider: Provider) -> None:
    """``check_owners`` of who was given the nodes, as far as the runtime tells."""
    if provider.name != CPU.name and not silent(provider):
        check_owners(assigned(session).values(), provider)


def check_owners(owners: Iterable[Owner], provider: Provider) -> None:
    """RuntimeUnavailableError when the CPU got every node, which the runtime doesn't call an error."""
    if all(owner.provider != provider.name for owner in owners):
        told = ", ".join(f"{key}={value}" for key, value in provider.options.items())
        raise RuntimeUnavailableError(
            f"{provider.name} took no node: all of the model would run on the CPU (options: {told or 'none'})",
            hint="its log says why: a device or option it doesn't know, or formats it has no kernel for",
        )


def _register(provider: Provider) -> None:
    """Register a plug-in under the provider's own name, which some take for the name of their devices; once only."""
    import onnxruntime

    if all(device.ep_name != provider.name for device in onnxruntime.get_ep_devices()):
        path = importlib.import_module(provider.library).get_library_path()
        try:
            onnxruntime.register_execution_provider_library(provider.name, path)
        except Exception as error:  # the runtime's refusals share no type
            raise RuntimeUnavailableError(
                f"{provider.library} can't be loaded: {str(error).strip().splitlines()[0]}",
                hint=f"install versions of onnxruntime and {provider.library} that belong together",
            ) from error
