"""Compute graphs with a kernel library in a process of its own: for another processor, or for other code on this one.

python run_with_kernels.py FOLDER LIBRARY

FOLDER holds NAME.onnx with inputs in NAME.0.npz, NAME.1.npz, ... Prints a digest of all outputs for each input.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import onnxruntime

THREADS = 2


def main(folder: Path, library: str) -> None:
    for path in sorted(folder.glob("*.onnx")):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("edgelm.threads", str(THREADS))
        options.add_session_config_entry("edgelm.own_threads", "1")
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for inputs in sorted(folder.glob(f"{path.stem}.*.npz")):
            with np.load(inputs) as feeds:
                found = session.run(None, dict(feeds))
            print(inputs.name, hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
