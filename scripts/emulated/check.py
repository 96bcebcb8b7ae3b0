"""Run a model's bundles on emulated processors and compare the results with this machine's.

    scripts/arm_check.sh [--prepare] [--count] [MODEL ...]

--prepare only sets up the machines; --count only counts instructions, of a model of its own (builds QEMU, which takes
some minutes). MODEL is what `edgelm export` takes; the default is builtin:tales, and stories260k if ../shared exists.
Ends with 1 if a promise of docs/targets.md is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from edgelm.runtime.sessions import kernels
from edgelm.runtime.text.tokenizer import Tokenizer

from . import compare, counting, machines

_DEVICE = Path(__file__).with_name("device.py")
_TEXT = machines.ROOT / "export" / "text" / "default.txt"
_STORIES = machines.ROOT.parent / "shared" / "models" / "stories260k"
HOST = "this machine"


def main() -> int:
    """Parse, then run everything. Returns the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--prepare", action="store_true", help="only set up the emulated machines")
    parser.add_argument("--count", action="store_true", help="only count instructions for each token")
    arguments = parser.parse_args()
    try:
        machines.prepare()
        if arguments.count:
            part, (scheme, kv) = str(counting.model()), counting.OTHER
            bundles = {scheme: export(part, scheme) for scheme in counting.SCHEMES}
            counting.report(bundles | {f"{scheme}, {kv} cache": export(part, scheme, kv)})
        if arguments.prepare or arguments.count:
            return 0
        models = arguments.models or ["builtin:tales", *([str(_STORIES)] if _STORIES.exists() else [])]
        broken = [sentence for model in models for sentence in check_model(model)]
    except machines.NotHereError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"BROKEN: {sentence}" for sentence in broken) or "all promises hold")
    return int(bool(broken))


def check_model(model: str) -> list[str]:
    """Run a model on all cores, print the results, and return the broken promises."""
    bundle, plain = export(model, "int8-rowwise"), export(model, "fp32")
    texts = cut_text(bundle, windows=3, tokens=200)
    here, ideal = run_on(HOST, bundle, texts), run_on(HOST, plain, texts)
    print(
        f"\n{model}: {len(here.logits)} positions, perplexity {ideal.perplexity:.4f} fp32, {here.perplexity:.4f} INT8"
    )
    found, others = [], {}
    for cpu, core in machines.CORES.items():
        others[cpu] = run_on(cpu, bundle, texts)
        show(f"INT8, {cpu}", compare.difference(here, others[cpu]))
        found += broken_int8(cpu, here, others[cpu], ideal)
        if core.architecture == "aarch64":
            fp32 = run_on(cpu, plain, texts)
            show(f"fp32, {cpu}", compare.difference(ideal, fp32))
            found += broken_fp32(cpu, ideal, fp32)
    found += broken_between_arm(others)
    saturated = run_on("Haswell-noTSX", bundle, texts, "--saturate")
    show("INT8, Haswell without the option", compare.difference(here, saturated))
    return [f"{model}: {sentence}" for sentence in found]


def broken_int8(cpu: str, here: compare.Outcome, there: compare.Outcome, ideal: compare.Outcome) -> list[str]:
    """The promises that an INT8 bundle breaks on a processor, compared with this machine and the fp32 bundle."""
    apart = compare.difference(here, there)
    further = compare.divergence(ideal, there) / compare.divergence(ideal, here)
    checks = {
        "perplexity differs by more than 0.2 %": abs(apart.perplexity) > 0.002,
        "fewer than 97 % of the most likely tokens are the same": apart.same_token < 0.97,
        "a cut changes bits": not there.exact,
        "logits are shifted": abs(apart.shift) > 0.01,
        "logits are scaled": abs(apart.gain) > 0.005,
        # Roundings the other way are noise, like INT8's own error; saturation moves results away from fp32.
        "it is further from fp32 than this machine is": further > 1.3,
    }
    return [f"{cpu}: {sentence} ({apart})" for sentence, is_broken in checks.items() if is_broken]


def broken_fp32(cpu: str, here: compare.Outcome, there: compare.Outcome) -> list[str]:
    """The promises that an fp32 bundle breaks on a processor."""
    apart = compare.difference(here, there)
    same = apart.same_token == 1 and here.tokens == there.tokens
    return [] if same else [f"{cpu}: fp32 gives other tokens ({apart})"]


def broken_between_arm(others: dict[str, compare.Outcome]) -> list[str]:
    """Whether both Raspberry Pi give the same bits."""
    same = others["cortex-a72"].digest == others["cortex-a76"].digest
    return [] if same else ["INT8 gives other bits on cortex-a76 than on cortex-a72"]


def export(model: str, scheme: str, kv: str | None = None) -> Path:
    """The model's bundle for arm-cpu, exported unless an earlier run did."""
    names = [Path(model).name.replace(":", "-"), scheme, *([kv] if kv else [])]
    out = machines.FOLDER / "bundles" / "-".join(names)
    if not (out / "manifest.json").is_file():
        from edgelm.export import ExportConfig, export_model

        export_model(ExportConfig(model, target="arm-cpu", scheme=scheme, kv=kv, out=out))
    return out


def cut_text(bundle: Path, windows: int, tokens: int) -> list[list[int]]:
    """So many texts of so many tokens, consecutive in the English text that comes with edgelm."""
    ids = Tokenizer(bundle / "tokenizer.json").encode(_TEXT.read_text(encoding="utf-8"))
    return [ids[begin : begin + tokens] for begin in range(0, windows * tokens, tokens)]


def run_on(cpu: str, bundle: Path, texts: list[list[int]], *options: str) -> compare.Outcome:
    """Run a bundle with onnxruntime alone on a processor or on `HOST`. The compiled kernels never saturate, and their
    bits have their own tests."""
    folder = machines.FOLDER / "runs"
    folder.mkdir(exist_ok=True)
    name = f"{bundle.name}-{cpu.replace(' ', '-')}{''.join(options)}"
    given, out = folder / f"{name}.json", folder / f"{name}.npz"
    given.write_text(json.dumps(texts), encoding="utf-8")
    arguments = [str(_DEVICE), str(bundle), str(given), str(out), *options]
    command = [sys.executable, *arguments] if cpu == HOST else machines.command(cpu, *arguments)
    environment = {**os.environ, kernels.SWITCH: "off"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise machines.NotHereError(f"{cpu}: {done.stderr.strip()[-2000:]}")
    return compare.Outcome.read(out, json.loads(done.stdout.splitlines()[-1]))


def show(name: str, apart: compare.Difference) -> None:
    """Print a line of figures."""
    figures = ", ".join(f"{key} {value:+.2e}" for key, value in dataclasses.asdict(apart).items())
    print(f"  {name:34} {figures}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
