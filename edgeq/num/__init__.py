"""Numbers: formats, quantization, range fitting and metrics. numpy and ml_dtypes only (L1)."""
