"""Thin helpers on onnx-ir, whose ``onnx_ir.Model`` is the only model class (L2). Protobuf is seen in ``io`` alone."""
