"""Reading, writing and naming model files: the one place that sees protobuf (L2).

Weights stay lazy: ``read`` memory-maps external data and nothing here copies a model's weights twice. ``write`` uses
one external file beside the model once the weights pass ``INLINE_BYTES``, since protobuf ends at 2 GiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from edgeq.errors import ModelError, OutputError

INLINE_BYTES = 1 << 30


def read(path: str | Path) -> ir.Model:
    """An ``.onnx`` file -> Model. Raises ModelError for a missing or damaged file and for external data that is
    missing, too short or outside the model's folder (a file from elsewhere must not read this machine's files)."""
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no model file {str(path)!r}", hint="check the path; for torch use pkg.module:callable")
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except DecodeError as error:
        raise ModelError(
            f"{str(path)!r} is not a complete ONNX file: {error}", hint="export or copy it again"
        ) from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{str(path)!r} holds no graph", hint="export or copy it again")
    _refuse_sparse(proto, path)
    try:
        model: ir.Model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, ir.serde.SerdeError) as error:
        raise ModelError(
            f"{str(path)!r} is not a valid ONNX model: {_root(error)}", hint="run onnx.checker on it"
        ) from error
    _sort(model, path)
    ir.external_data.set_base_dir(model.graph, path.parent)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _check_external(value.const_value, path)
    return model


def _sort(model: ir.Model, path: Path) -> None:
    """Put nodes behind what they read, as ONNX asks: converters forget to, and the runtime doesn't mind."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        try:
            graph.sort()  # leaves what is in order as it is, bodies too
        except ValueError as error:
            raise ModelError(
                f"{str(path)!r} has nodes that wait for each other: {_root(error)}", hint="export it again"
            ) from error


def _root(error: BaseException) -> BaseException:
    """What went wrong first: onnx-ir wraps it once for each level, with the whole graph as text."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _refuse_sparse(proto: onnx.ModelProto, path: Path) -> None:
    """onnx-ir drops sparse initializers without a word (measured on 1.1.0); losing weights must be loud."""
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(
            f"{str(path)!r} stores {name!r} as sparse_initializer, which edgeq doesn't read yet",
            hint="store it as a dense initializer",
        )


def _check_external(tensor: ir.ExternalTensor, model_path: Path) -> None:
    folder = model_path.parent.resolve()
    file = (folder / tensor.location).resolve()
    if not file.is_relative_to(folder):
        raise ModelError(
            f"weight {tensor.name!r} of {str(model_path)!r} points outside its folder: {str(tensor.location)!r}",
            hint="keep external data beside the model",
        )
    if not file.is_file():
        raise ModelError(
            f"external data {str(tensor.location)!r} of weight {tensor.name!r} is missing beside {str(model_path)!r}",
            hint="copy the data file together with the model",
        )
    end = (tensor.offset or 0) + (tensor.length if tensor.length is not None else tensor.nbytes)
    if file.stat().st_size < end:
        raise ModelError(
            f"external data {str(tensor.location)!r} ends at byte {file.stat().st_size}, "
            f"weight {tensor.name!r} needs {end}",
            hint="the file is cut off; copy it again",
        )


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, bodies included."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def to_bytes(model: ir.Model) -> bytes:
    """Model -> serialized ONNX with its weights inside. For models under ``INLINE_BYTES``."""
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def write(model: ir.Model, path: str | Path) -> None:
    """Model -> file, whole or not at all; weights beyond ``INLINE_BYTES`` go to ``<name>.data`` beside it."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        if weight_bytes(model) > INLINE_BYTES:
            # The data file's name is recorded in the model, so it can't be renamed with it: write it first.
            ir.save(model, partial, format="protobuf", external_data=path.name + ".data")
        else:
            partial.write_bytes(to_bytes(model))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"can't write {str(path)!r}: {error.strerror}", hint="check the folder and free space"
        ) from error


def model_files(path: Path) -> Iterator[Path]:
    """Paths relative to the model's folder: the model and its external data. ModelError when it can't be read."""
    yield Path(path.name)
    tensors = (value.const_value for graph in read(path).graphs() for value in graph.initializers.values())
    yield from sorted({Path(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def size_bytes(path: str | Path) -> int:
    """Bytes on disk of a model with its external data files."""
    path = Path(path)
    return sum((path.parent / name).stat().st_size for name in model_files(path))


def digest(model: ir.Model) -> str:
    """sha256 of structure and weights, independent of where the weights are stored."""
    hasher = hashlib.sha256()
    for graph in model.graphs():
        for name in sorted(graph.initializers):
            tensor = graph.initializers[name].const_value
            if tensor is not None:
                hasher.update(f"{name}:{tensor.dtype}:{tensor.shape}".encode())
                hasher.update(tensor.tobytes())
        for value in (*graph.inputs, *graph.outputs):
            hasher.update(f"{value.name}:{value.dtype}:{value.shape}".encode())
        for node in graph:
            hasher.update(_node_text(node).encode())
    return hasher.hexdigest()


def _node_text(node: ir.Node) -> str:
    """A node as text; bodies are hashed as graphs of their own."""
    edges = [value.name if value is not None else "" for value in node.inputs], [value.name for value in node.outputs]
    attributes = sorted(
        f"{name}={_value_text(attr)}"
        for name, attr in node.attributes.items()
        if isinstance(attr, ir.Attr) and attr.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    )
    return f"{node.domain}:{node.op_type}:{edges}:{attributes}"


def _value_text(attr: ir.Attr) -> str:
    if attr.type == ir.AttributeType.TENSOR:
        return hashlib.sha256(attr.value.tobytes()).hexdigest()
    return str(attr.value)


def file_digest(path: Path) -> str:
    """sha256 of a model file and of the external data ``write`` puts beside it."""
    hasher = hashlib.sha256()
    for file in (path, path.with_name(path.name + ".data")):
        if file.is_file():
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    hasher.update(chunk)
    return hasher.hexdigest()
