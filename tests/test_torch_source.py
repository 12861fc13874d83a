"""Torch modules and exported programs: what is exported is what torch computes, at the example's shape and others."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest

from edgeq.errors import ModelError, UsageError
from edgeq.ir import io, query
from edgeq.source import read_model, torch_export
from edgeq.source.parity import differences

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
HERE = "tests.torch_modules"
RNG = np.random.default_rng(3)


@pytest.fixture
def modules() -> Any:
    """Imported here and not above: torch takes seconds, and these tests are often not selected."""
    return importlib.import_module(HERE)


def run(model: onnx_ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(io.to_bytes(model)).run(None, feed)


def test_a_callable_gives_a_network_with_a_dynamic_batch():
    model, info = read_model(f"{HERE}:conv", opset=21)
    assert (info.origin, info.kind) == (f"{HERE}:conv", "torch")
    assert info.notes == ("the first axis is dynamic",)
    assert [value.name for value in model.graph.inputs] == ["image"]
    assert query.dims(model.graph.inputs[0]) == (None, 3, 8, 8)
    assert query.dims(model.graph.outputs[0]) == (None, 5)
    assert model.opset_imports[""] == 21
    assert not any(one.metadata_props for one in model.graph)
    assert not model.metadata_props
    assert [out.shape for out in run(model, {"image": np.zeros((7, 3, 8, 8), np.float32)})] == [(7, 5)]


def test_pins_give_the_shape_to_trace_with():
    model, info = read_model(f"{HERE}:ConvNet", opset=21, pins={"image": (1, 3, 8, 8)})
    assert query.dims(model.graph.outputs[0]) == (1, 5)
    assert "traced with random float32 inputs of the shapes given" in info.notes


def test_inputs_keep_the_names_of_the_arguments_and_dynamic_shapes_are_obeyed(modules):
    model, _ = read_model(f"{HERE}:two", opset=21)
    assert {value.name: query.dims(value) for value in model.graph.inputs} == {"left": (None, 4), "right": (4, 3)}
    left, right = RNG.normal(size=(9, 4)).astype(np.float32), RNG.normal(size=(4, 3)).astype(np.float32)
    product, count = run(model, {"left": left, "right": right})
    np.testing.assert_allclose(product, left @ right, atol=1e-5)
    np.testing.assert_array_equal(count, (left > 0).sum(axis=1))


def test_a_module_in_memory_takes_the_example_given(modules):
    module = modules.ConvNet()
    model, info = read_model(module, opset=21, example={"image": np.ones((1, 3, 8, 8), np.float32)})
    assert info.origin == "ConvNet"
    images = RNG.normal(size=(3, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"image": images})[0], torch_says(module, images), atol=1e-5)


def test_a_recurrent_network_computes_the_same_at_the_batches_it_says(modules):
    module = modules.Recurrent()
    model, _ = read_model(module, opset=21)
    batch = 3 if query.dims(model.graph.inputs[0])[0] is None else 2
    steps = RNG.normal(size=(batch, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"steps": steps})[0], torch_says(module, steps), atol=1e-5)


def torch_says(module: Any, array: np.ndarray) -> np.ndarray:
    import torch

    return module.eval()(torch.from_numpy(array)).detach().numpy()


def frozen(rows: str | int) -> onnx_ir.Model:
    """Doubles its rows; says how many they may be, and takes 3."""
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, [rows, 4])
    two = onnx_ir.val("two", const_value=onnx_ir.tensor(np.full((3, 4), 2, np.float32)))
    product = onnx_ir.node("Mul", [x, two])
    product.outputs[0].name = "y"
    product.outputs[0].type = x.type
    return onnx_ir.Model(
        onnx_ir.Graph([x], product.outputs, nodes=[product], initializers=[two], opset_imports={"": 21}), ir_version=10
    )


def rows() -> Any:
    import torch

    return {"x": torch.ones(3, 4)}


def test_an_axis_that_was_frozen_silently_is_named(modules):
    (difference,) = differences(frozen("rows"), modules.Doubling(), rows())
    assert difference.startswith("axis 0 of 'x' (rows) was frozen at 3: with 4, the runtime fails")


def test_an_axis_that_was_made_static_is_named():
    import torch

    asked = {"x": {0: torch.export.Dim("rows")}}
    assert torch_export.made_static(frozen(3), asked, rows()) == "torch froze axis 0 of 'x' at 3"
    assert torch_export.made_static(frozen("rows"), asked, rows()) == ""


def test_a_model_that_cannot_have_a_dynamic_batch_becomes_static():
    model, info = read_model(f"{HERE}:Fixed", opset=21)
    assert query.dims(model.graph.inputs[0]) == (2, 3, 4)
    assert info.notes[0].startswith("static shapes, since a dynamic first axis failed")


def test_an_exported_program_goes_to_a_file_and_back(tmp_path):
    import torch

    module = torch.nn.Linear(3, 2)
    program = torch.export.export(module, (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    torch.export.save(program, tmp_path / "net.pt2")
    model, info = read_model(tmp_path / "net.pt2", opset=21)
    assert info.kind == "exported-program"
    assert query.dims(model.graph.inputs[0]) == (None, 3)
    array = RNG.normal(size=(6, 3)).astype(np.float32)
    np.testing.assert_allclose(run(model, {"input": array})[0], torch_says(module, array), atol=1e-5)


def test_a_damaged_or_missing_program_is_named(tmp_path):
    (tmp_path / "cut.pt2").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ModelError, match="can't be loaded as an exported program"):
        read_model(tmp_path / "cut.pt2", opset=21)
    with pytest.raises(ModelError, match="no model file"):
        read_model(tmp_path / "none.pt2", opset=21)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("returns_a_number", ("returned int", "return a module")),
        ("number", ("is a int", "function or class")),
        ("needs", ("can't be called without arguments", "'width'")),
        ("gives_another_name", ("input 'picture'", "['image']")),
        ("gives_a_list", ("'image'", "is a list", "inputs are tensors")),
        ("ConvNet", ("no example inputs", "module.example_inputs")),
        ("ConvNett", ("has no 'ConvNett'", "did you mean 'ConvNet'?")),
    ],
)
def test_callables_that_make_no_sense_are_named(name, words):
    with pytest.raises(UsageError) as caught:
        read_model(f"{HERE}:{name}", opset=21)
    for word in words:
        assert word in str(caught.value)


def test_what_torch_cannot_trace_is_told_and_nothing_else_is_printed(capfd):
    with pytest.raises(ModelError, match=f"torch can't export '{HERE}:Branching': "):
        read_model(f"{HERE}:Branching", opset=21)
    assert capfd.readouterr() == ("", "")


def read_in_a_new_process(before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}\nfrom edgeq.source import read_model\nread_model('{HERE}:conv', opset=21)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_exporting_prints_nothing_and_the_author_to_stderr():
    done = read_in_a_new_process()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "making a network\n")


def test_without_torch_the_extra_is_named():
    done = read_in_a_new_process("import sys; sys.modules['torch'] = None")
    assert "RuntimeUnavailableError: torch is needed" in done.stderr
    assert "pip install 'edgeq[torch]'" in done.stderr
