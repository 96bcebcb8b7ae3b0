"""Write docs/models.md: export's result for each model type that the tests run.

The verdicts come from tests/model_zoo.py, and tests/test_models.py checks each of them.

    python scripts/list_models.py [--print]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from edgelm.export.tracing.ways import FUSED, PLAIN, STEPWISE  # noqa: E402
from tests.model_zoo import NOT_TRIED, REFUSED, SAME, SAME_TOO  # noqa: E402, the tests are no installed package

_HEAD = """# Model types

Written by `python scripts/list_models.py`. Nothing in edgelm names an architecture: the table lists what was tried, not
what is allowed. Each type runs in `tests/test_models.py` as a random model of few layers. The ways to trace it are
tried in order. The first one counts that gives exactly the tokens of transformers' `generate(do_sample=False)` over 32
steps from two prompts, one longer than the sliding window. The logits of a prompt in pieces must be torch's within
1e-4; in row-wise INT8, with an INT8 cache where attention is fused, the model must stay near these logits.

- *Fused*: attention is ONNX Runtime's `GroupQueryAttention`, which writes an INT8 or float32 cache in place.
- *Plain*: attention as the model writes it, a float32 cache that grows by concatenation, and whatever other states the
  model keeps (convolutions, recurrences).
- *Token by token*: plain, one token a step, also in the prompt, for modeling code that loops over tokens.

If no way gives torch's tokens, the export ends with an error and writes nothing.
"""


def document() -> str:
    """The whole text of docs/models.md."""
    words = {FUSED: "fused", PLAIN: "plain", STEPWISE: "token by token"}
    rows = [(name, words[path], "same tokens") for name, path in (SAME | SAME_TOO).items()]
    rows += [(name, "none", f"refused: {reason}") for name, reason in REFUSED.items()]
    rows += [(name, "", f"not tried: {reason}") for name, reason in NOT_TRIED.items()]
    lines = [f"| `{name}` | {path} | {result} |" for name, path, result in sorted(rows)]
    count = (
        f"Of transformers' types, {len(SAME | SAME_TOO)} give the same tokens, {len(REFUSED)} are refused, and "
        f"{len(NOT_TRIED)} were not tried, most of which are no text decoders."
    )
    return "\n".join([_HEAD, count, "", "| model type | path | result |", "|---|---|---|", *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/models.md from the table in tests/model_zoo.py.")
    parser.add_argument("--print", action="store_true", help="print the text, write nothing")
    if parser.parse_args().print:
        sys.stdout.write(document())
    else:
        (ROOT / "docs" / "models.md").write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
