"""Files in ONNX Runtime's own format, for its minimal builds: optimised already, with the kernels they need (L3)."""

from __future__ import annotations

import logging
from pathlib import Path

from edgeq.errors import ModelError
from edgeq.target.provider import first_line, runtime_errors, session_options
from edgeq.target.record import Target


def write_ort(model: Path, target: Target, path: Path) -> Path:
    """``model`` as the CPU's provider runs it, in the runtime's format at ``path``; beside it the configuration that a
    build with these kernels and types alone is made from, whose path is returned."""
    import onnxruntime
    from onnxruntime.tools.ort_format_model import create_config_from_models

    options = session_options(
        {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
         "optimized_model_filepath": str(path)}, target.execution,
    )  # fmt: skip
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:  # blocked layouts fit the width of this machine's vectors alone
        onnxruntime.InferenceSession(
            str(model), options, providers=[target.provider], disabled_optimizers=["NchwcTransformer"]
        )
    except runtime_errors() as error:
        raise ModelError(
            f"onnxruntime can't convert {model}: {first_line(error)}", hint="see `edgeq inspect`"
        ) from error
    config = path.with_suffix(".config")
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it tells where it wrote
    create_config_from_models([path], config, enable_type_reduction=True)
    config.write_text(config.read_text(encoding="utf-8").replace(str(path), path.name), encoding="utf-8")
    return config
