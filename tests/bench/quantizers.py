"""The quantizers edgeq is compared with: ``(float file, quantized file, feeds) -> note``, one function a variant.

``python quantizers.py VARIANT FLOAT.onnx SAMPLES.npz OUT.onnx`` runs one of them and prints what came of it as JSON.
It needs numpy, onnx, onnxruntime and the quantizer alone, nothing of this project, so it also runs in the environment
that ``tests.bench.apart`` makes for peers which the project doesn't install.

ONNX Runtime's follow its documentation: ``quant_pre_process``, then ``quantize_static`` in QDQ form with its defaults
(MinMax, int8 weights per tensor), per channel with uint8 activations, with Percentile or Entropy, or
``quantize_dynamic``. NNCF's is ``nncf.quantize`` on the ONNX model. onnxsim's are ``quantize_static`` behind
``simplify`` as its command line chains them (only what enters MatMul, Gemm and Conv is quantized), with every
activation (``full_graph``), ``quantize_dynamic``, and ``recommend_quantization``, which looks for the smallest scheme
with a relative error below 2 %, among weights in few bits and 16-bit floats too.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

Feed = dict[str, Any]
Feeds = Sequence[Feed]
PER_CHANNEL_OPSET = 13  # QuantizeLinear has an axis from here on


def pre_processed(path: Path, out: Path) -> tuple[Path, str]:
    """The model after ``quant_pre_process``, with less of it where all of it fails, and what was left out."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    note = ""
    for way, options in (("", {}), (" without symbolic shapes", {"skip_symbolic_shape": True})):
        try:
            with chdir(out.parent):  # where it dies it leaves files in the working directory
                quant_pre_process(str(path.resolve()), str(out), **options)
        except Exception as error:  # noqa: BLE001 - whatever the peer dies of is what these benchmarks report
            note = f"pre-process{way} failed: {first_line(error)}"[:200]
        else:
            return out, note
    return path, note


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _static(prepared: Path, path: Path, feeds: Feeds, *, method: str = "MinMax", **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Hands out the feeds, then None."""

        def __init__(self) -> None:
            self.rest = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.rest, None)

    quantize_static(str(prepared), str(path), Reader(), calibrate_method=CalibrationMethod[method], **options)


def static(prepared: Path, path: Path, feeds: Feeds, method: str = "MinMax") -> None:
    """``quantize_static`` as it comes: QDQ, int8 activations and weights per tensor."""
    _static(prepared, path, feeds, method=method)


def static_u8(prepared: Path, path: Path, feeds: Feeds) -> None:
    """uint8 activations, the runtime's advice for x86, int8 weights per tensor."""
    from onnxruntime.quantization import QuantType

    _static(prepared, path, feeds, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def static_channel(prepared: Path, path: Path, feeds: Feeds, method: str = "MinMax") -> None:
    """uint8 activations, int8 weights per channel."""
    from onnxruntime.quantization import QuantType

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    _static(prepared, path, feeds, method=method, per_channel=True, **types)


def dynamic(prepared: Path, path: Path, feeds: Feeds) -> None:
    """``quantize_dynamic`` with its defaults: int8 weights, activations quantized while running."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(prepared), str(path))


def _with(method: str, way: Callable[..., None]) -> Callable[[Path, Path, Feeds], None]:
    return lambda prepared, path, feeds: way(prepared, path, feeds, method=method)


ORT: dict[str, Callable[[Path, Path, Feeds], None]] = {
    "static": static,
    "u8": static_u8,
    "channel": static_channel,
    "percentile": _with("Percentile", static),  # slow and hungry, as are the three below
    "percentile_channel": _with("Percentile", static_channel),
    "entropy": _with("Entropy", static),
    "entropy_channel": _with("Entropy", static_channel),
    "dynamic": dynamic,
}


def nncf(source: Path, path: Path, feeds: Feeds, **options: Any) -> str:
    """``nncf.quantize`` with its defaults."""
    import nncf as toolkit  # type: ignore[import-not-found]  # only in the peers' environment
    import onnx

    onnx.save(toolkit.quantize(onnx.load(source), toolkit.Dataset(list(feeds)), **options), str(path))
    return ""


def nncf_transformer(source: Path, path: Path, feeds: Feeds) -> str:
    """As its documentation asks for transformers."""
    from nncf import ModelType

    return nncf(source, path, feeds, model_type=ModelType.TRANSFORMER)


def _simplified(source: Path) -> Any:
    import onnx
    import onnxsim  # type: ignore[import-not-found]  # as above

    return onnxsim.simplify(onnx.load(source))[0]


def onnxsim_static(source: Path, path: Path, feeds: Feeds, **options: Any) -> str:
    import onnx
    import onnxsim

    onnx.save(onnxsim.quantize_static(_simplified(source), calibration_data=feeds, **options), str(path))
    return ""


def onnxsim_full(source: Path, path: Path, feeds: Feeds) -> str:
    return onnxsim_static(source, path, feeds, full_graph=True)


def onnxsim_dynamic(source: Path, path: Path, feeds: Feeds) -> str:
    import onnx
    import onnxsim

    onnx.save(onnxsim.quantize_dynamic(_simplified(source)), str(path))
    return ""


def onnxsim_auto(source: Path, path: Path, feeds: Feeds) -> str:
    import onnx
    import onnxsim

    found = onnxsim.recommend_quantization(_simplified(source), calibration_data=feeds)
    onnx.save(found.quantized_model, str(path))
    error = f"relative error {found.report.worst_relative_l2:.3g}"
    return f"chose {found.config.scheme}/{found.config.dtype}, {error}"


OTHERS: dict[str, Callable[[Path, Path, Feeds], str]] = {
    "nncf": nncf,
    "nncf_transformer": nncf_transformer,
    "onnxsim": onnxsim_static,
    "onnxsim_full": onnxsim_full,
    "onnxsim_dynamic": onnxsim_dynamic,
    "onnxsim_auto": onnxsim_auto,
}


def quantize(variant: str, source: Path, path: Path, feeds: Feeds) -> str:
    """Run ``variant`` on ``source`` -> what had to be done apart from its defaults. Raises what the quantizer does."""
    if variant in OTHERS:
        note = OTHERS[variant](source, path, feeds)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            prepared, note = pre_processed(source, Path(scratch) / "prepared.onnx")
            ORT[variant](prepared, path, feeds)
    _loads(path)
    return note


def _loads(path: Path) -> None:
    """Some artefacts are written and can't be loaded: raise what the runtime says."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def at_opset(source: Path, path: Path, opset: int = PER_CHANNEL_OPSET) -> bool:
    """Write ``source`` raised to ``opset`` to ``path``; False, and nothing is written, where it is there already."""
    import onnx
    from onnx.version_converter import convert_version

    model = onnx.load(source)
    if max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) >= opset:
        return False
    onnx.save(convert_version(model, opset), str(path))
    return True


def at_best(variant: str, source: Path, path: Path, feeds: Feeds) -> str:
    """As ``quantize``, on the model raised to an opset that has scales per channel, else on the model as it is."""
    failed = ""
    with tempfile.TemporaryDirectory() as scratch:
        raised = Path(scratch) / "raised.onnx"
        try:
            if at_opset(source, raised):
                return _joined(f"model raised to opset {PER_CHANNEL_OPSET}", quantize(variant, raised, path, feeds))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - kept as a note beside what the model as it is gives
            failed = f"raised to opset {PER_CHANNEL_OPSET}: {first_line(error)}"[:150]
    return _joined(failed, quantize(variant, source, path, feeds))


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def pack(feeds: Feeds, path: Path) -> None:
    """Feeds of any shapes -> one ``.npz``, an array an input of a sample."""
    import numpy as np

    np.savez(path, **{f"{index}:{name}": value for index, feed in enumerate(feeds) for name, value in feed.items()})


def unpacked(path: Path) -> Iterator[Feed]:
    import numpy as np

    feeds: dict[str, Feed] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            index, _, name = key.partition(":")
            feeds.setdefault(index, {})[name] = arrays[key]
    yield from feeds.values()


def peak_bytes() -> int:
    """``VmHWM`` of this process: unlike ``ru_maxrss`` it starts anew when a program is started (man 5 proc)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main(variant: str, source: str, samples: str, out: str, count: str, most_bytes: str) -> None:
    """One quantization; the last line printed is a JSON object: error, note, seconds, peak_bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(most_bytes), int(most_bytes)))
    feeds = list(unpacked(Path(samples)))[: int(count)]
    start, error, note = time.perf_counter(), "", ""
    try:
        note = at_best(variant, Path(source), Path(out), feeds)
    except Exception as died:  # noqa: BLE001 - as above
        Path(out).unlink(missing_ok=True)
        error = first_line(died)
    seconds = round(time.perf_counter() - start, 1)
    found = {"error": error, "note": note, "seconds": seconds, "peak_bytes": peak_bytes()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
