"""Run a model in a C++ program: build the project that a package becomes, and ask it about a picture.

You learn the two lines that turn a package into a CMake project, and what the program does on its own: check every
digest, repeat the golden runs, turn a picture into the same bits that calibration saw. It needs a compiler, CMake and,
when it runs, an ONNX Runtime: here the one that Python uses.

    pip install 'edgeq[images,zoo]'
    python samples/05_cpp_program.py build/05
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
from upside_down import export, line

import edgeq

RUNTIME = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))


def main(out: Path) -> Path:
    """The program, in ``out/cpp/build``."""
    edgeq.package([export(out, "net.edgeq")], out=out / "cpp", form="cpp", force=True)
    subprocess.run(["cmake", "-S", out / "cpp", "-B", out / "cpp/build", "-DCMAKE_BUILD_TYPE=Release"], check=True)
    subprocess.run(["cmake", "--build", out / "cpp/build"], check=True)
    return next((out / "cpp/build").glob("*-run"))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/05")
    program = main(folder)
    image, turned = line(7)
    image.save(folder / "line.ppm")
    command = [program, folder / "cpp/package", folder / "line.ppm"]
    subprocess.run(command, check=True, env={**os.environ, "EDGEQ_ONNXRUNTIME": str(RUNTIME)})
    print(f"it was {'upside down' if turned else 'upright'}")  # noqa: T201
