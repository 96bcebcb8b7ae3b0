"""Write docs/models.md: what export does with each model type that the tests run.

The verdicts are those of tests/model_zoo.py, and tests/test_models.py holds each of them.

    python scripts/list_models.py [--print]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.model_zoo import REFUSED, SAME  # noqa: E402, the tests are no installed package

_HEAD = """# Model types

Written by `python scripts/list_models.py`. Nothing in edgelm names an architecture: this is what was tried, not what is
allowed. Each type runs in `tests/test_models.py` as a random model of two layers. *Same tokens*: the fused fp32 graph
gives the very tokens of transformers' `generate(do_sample=False)` over 32 steps from two prompts, one longer than the
sliding window, and row-wise INT8 with an INT8 cache stays near it. *Refused*: not by way of fused attention.

What fused attention refuses is traced as the model writes it. `tests/test_plain.py` holds that for bloom, codegen,
falcon, gemma4_text, gpt_neo, gptj, lfm2 and xglm, and token by token for mamba2 and mpt. Where neither way gives
torch's tokens, the export ends with an error and writes nothing.
"""


def document() -> str:
    """The whole text of docs/models.md."""
    rows = [(name, "fused", "same tokens") for name in SAME]
    rows += [(name, "none", f"refused: {refusal.reason}") for name, refusal in REFUSED.items()]
    lines = [f"| `{name}` | {path} | {result} |" for name, path, result in sorted(rows)]
    count = f"{len(SAME)} types give the same tokens, {len(REFUSED)} are refused there."
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
