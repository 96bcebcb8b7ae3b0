"""Compute a graph of `kernels.py` so many times for one row; nothing else. For counting instructions.

python products.py GRAPH TIMES
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime

if __name__ == "__main__":
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(sys.argv[1], options)
    row = np.linspace(-1, 1, 576, dtype=np.float32)[None]
    for _ in range(int(sys.argv[2])):
        session.run(None, {"x": row})
