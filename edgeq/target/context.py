"""EP contexts: a model compiled ahead of time for one device, and proof of which (L3).

The runtime writes a small ONNX file around the provider's binary, with what it was compiled for in its metadata. Where
a library only emulates the device it loads a context of any other one and runs it (QNN on x86-64), so the metadata is
compared before anything is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from edgeq.errors import ModelError
from edgeq.target.isolated import call
from edgeq.target.provider import RefusedError, session_options
from edgeq.target.record import Provider, Target

PREFIX = "ep_compatibility_info."
CONTEXT = "EPContext"
ENDS = ("QuantizeLinear", "DequantizeLinear")  # of inputs and outputs, which stay with the CPU

# Provider -> option: the field of its compatibility text, split at colons, that must be the option's value; "sdk" says
# which version compiled it. QNN's, as onnxruntime-qnn 2.7.0 writes it: v2:6:2.51.0:5.51.0:75:57:0:0.
FIELDS: dict[str, dict[str, int]] = {"QNNExecutionProvider": {"sdk": 2, "htp_arch": 4, "soc_model": 5}}


@dataclass(frozen=True)
class Compiled:
    """A compiled file. ``made_for``: what it, or what compiled it, says of the device, and the ``sdk``. ``nodes``: its
    op types, of a context or a Core ML package. ``fidelity``: metric -> its worst value over outputs and runs, beside
    the CPU's; None where it wasn't run."""

    path: Path
    made_for: Mapping[str, str]
    nodes: Mapping[str, int] = field(default_factory=dict)
    fidelity: Mapping[str, float] | None = None


def compile_context(model: Path, target: Target, path: Path) -> Compiled:
    """Compile ``model`` for ``target`` to ``path``, with the binary beside it.

    Raises ModelError when the provider refuses it, leaves nodes to the CPU, or compiled for another device."""
    provider = target.execution
    try:
        call(provider, _compile, model, path, provider)
    except RefusedError as error:
        raise ModelError(f"{provider.name} can't compile {model}: {error}", hint="see `edgeq inspect`") from error
    made = read_context(path)
    if made is None:
        raise ModelError(
            f"{provider.name} compiled nothing of {model}", hint="pin its shapes, and export it for this target first"
        )
    check_context(path, provider)
    left = [op for op in made.nodes if op not in (CONTEXT, *ENDS)]
    if left:
        raise ModelError(
            f"{provider.name} leaves {', '.join(left)} of {model} to the CPU",
            hint=f"export it for {target.name} first; `edgeq inspect -t {target.name}` says what it takes",
        )
    return made


def _compile(model: Path, path: Path, provider: Provider) -> None:
    """Runs in the isolated process. By default the runtime's fusions, on which Q/DQ rely, would be off."""
    import onnxruntime

    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    compiler = onnxruntime.ModelCompiler(session_options({}, provider), str(model), graph_optimization_level=level)
    compiler.compile_to_file(str(path))


def read_context(path: Path) -> Compiled | None:
    """What the file at ``path`` was compiled for; None when it holds no context."""
    model = ir.load(path)
    nodes = Counter(node.op_type for node in model.graph)
    if CONTEXT not in nodes:
        return None
    for provider, fields in FIELDS.items():
        words = model.metadata_props.get(PREFIX + provider, "").split(":")
        if len(words) > max(fields.values()):
            return Compiled(path, {name: words[index] for name, index in fields.items()}, nodes)
    raise ModelError(f"{path} is compiled, and doesn't say for what", hint="compile it again with edgeq compile")


def check_context(path: Path, provider: Provider) -> None:
    """ModelError when ``path`` holds a context for another device than ``provider``'s options name."""
    made = read_context(path)
    if made is None:
        return
    for option, found in made.made_for.items():
        wanted = provider.options.get(option, found)
        if found != wanted:
            raise ModelError(
                f"{path} is compiled for {option} {found}, {provider.name} is to run it on {wanted}",
                hint="use the context for this device, or compile one",
            )
