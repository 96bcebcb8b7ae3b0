"""Compare edgelm with other ways to run a language model on a CPU: same model, machine, token ids and threads.

    python scripts/compare_peers.py --rounds 3 --text wikitext-2/test.txt --questions mt_bench_questions.jsonl

Uses the real model of real_model.py and bench.py's reference with random weights, unless --model names others. Makes a
virtual environment for each peer and converts the model for it (kept below --cache for the next run; `--rounds 0`
measures no speed). Then measures all peers in alternation, every measurement in a fresh process, and prints tables of
medians. With --text and --questions it also measures the cost of each peer's arithmetic: KL divergence from the fp32
model and perplexity on the text's first 40 kB, and greedy answers equal to fp32's. Needs edgelm with the extra
`export`, a C++ compiler for llama.cpp, and about 10 GB of disk space. pip's own settings decide where packages come
from. A peer that cannot be installed or that fails is reported with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import real_model
import reference_model
from given import existing_file, existing_folder
from peers import quality, report
from peers.environments import Environments, PeerError
from peers.harness import COLD
from peers.source_model import fingerprint, readable

CONTEXTS = (128, 1024, 1900)
ROOT = Path(__file__).resolve().parents[1]
KERNELS = "-kernels"
# The peer whose distributions and answers are the reference for the others.
REFERENCE = "transformers-fp32"
QUALITY = "quality"
TEXT_BYTES, WINDOW, STRIDE = 40_000, 512, 256
QUESTIONS, ANSWER_TOKENS = 80, 48
PEERS = {
    peer.name: peer
    for peer in (
        report.Peer("edgelm-int8", "edgelm, INT8, INT8 cache", "edgelm", "int8", "int8"),
        report.Peer(f"edgelm-int8{KERNELS}", "edgelm + kernels, INT8 cache", "edgelm", "int8+kernels", "int8"),
        report.Peer("edgelm-float32", "edgelm, INT8, float32 cache", "edgelm", "float32", "int8"),
        report.Peer(f"edgelm-float32{KERNELS}", "edgelm + kernels, float32 cache", "edgelm", "float32+kernels", "int8"),
        report.Peer("edgelm-int4", "edgelm, 4 bits, INT8 cache", "edgelm", "4bits", "int4"),
        report.Peer(f"edgelm-int4{KERNELS}", "edgelm + kernels, 4 bits, INT8 cache", "edgelm", "4bits+kernels", "int4"),
        report.Peer(
            f"edgelm-5.4bits{KERNELS}", "edgelm + kernels, 5.4 bits a parameter", "edgelm", "5.4bits+kernels", "int4"
        ),
        report.Peer(
            f"edgelm-6.2bits{KERNELS}", "edgelm + kernels, 6.2 bits a parameter", "edgelm", "6.2bits+kernels", "int4"
        ),
        report.Peer("genai-int8", "onnxruntime-genai, int8", "genai", "int8", "int8"),
        report.Peer("genai-int4", "onnxruntime-genai, int4", "genai", "int4", "int4"),
        report.Peer("llama.cpp-q8_0", "llama.cpp, Q8_0", "llama_cpp", "q8_0", "int8"),
        report.Peer("llama.cpp-q4_0", "llama.cpp, Q4_0", "llama_cpp", "q4_0", "int4"),
        report.Peer("llama.cpp-q4_k_m", "llama.cpp, Q4_K_M", "llama_cpp", "q4_k_m", "int4"),
        report.Peer("optimum-int8", "optimum-onnx, int8", "optimum_onnx", "int8", "int8"),
        report.Peer("ctranslate2-int8", "CTranslate2, int8", "ctranslate2", "int8", "int8"),
        report.Peer("transformers-fp32", "transformers, fp32", "transformers", "float32", "fp32"),
    )
}


def main() -> None:
    """Parse, prepare, measure, report."""
    arguments = _parse()
    models = [path.resolve() for path in arguments.model or [real_model.make(), _random_model()]]
    for model in models:
        out = arguments.out / model.name if len(models) > 1 else arguments.out
        text = compare(model, arguments, out)
        print(text)
        if arguments.markdown:
            with arguments.markdown.open("a" if model != models[0] else "w", encoding="utf-8") as file:
                file.write(f"{text}\n")


def compare(model: Path, arguments: argparse.Namespace, out: Path) -> str:
    """Prepare and measure one model, write JSON and plot; returns its tables."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    longest = config.get("max_position_embeddings", max(CONTEXTS) * 2)
    kinds = [COLD, *(str(context) for context in CONTEXTS if context + 100 <= longest)]
    failures: dict[str, dict[str, str]] = {}
    comparison = Comparison(arguments.cache.resolve(), model, config["vocab_size"], arguments.threads, failures)
    ready = [PEERS[name] for name in arguments.peers if comparison.prepare(PEERS[name])]
    rounds = [comparison.round(ready, kinds, number, arguments.rounds) for number in range(arguments.rounds)]
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine() | {"threads": arguments.threads},
        "model": {"name": model.name, "config": config},
        "versions": comparison.environments.versions,
    }
    task = quality_task(model, arguments.text, arguments.questions)
    facts["quality"] = comparison.quality(ready, task) if task is not None else {}
    found = report.summarize([PEERS[name] for name in arguments.peers], rounds, failures) | facts
    if rounds or facts["quality"]:
        out.mkdir(parents=True, exist_ok=True)
        (out / "peers.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if rounds:
        report.plot(found, out / "peers.svg")
    print(f"results are in {out}", file=sys.stderr)
    return report.markdown(found)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=_names, default=list(PEERS), help="some of " + ",".join(PEERS))
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of every measurement (%(default)s); 0: prepare only"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of each peer (%(default)s)")
    parser.add_argument(
        "--model",
        type=existing_folder,
        action="append",
        help="a Hugging Face folder, more than once for several (both models)",
    )
    parser.add_argument("--text", type=existing_file, help="UTF-8 text to measure quality on, its first 40 kB")
    parser.add_argument(
        "--questions", type=existing_file, help="JSON lines with the key turns, of which the first is asked"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "peers", help="kept environments and models")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "peers" / "results", help="for JSON and plot")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables to a file")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; there are {', '.join(PEERS)}")
    return names


def _random_model() -> Path:
    """The folder of the reference with random weights, built if it is missing."""
    model = ROOT / "build" / "bench" / "model"
    if not (model / "tokenizer.json").is_file():
        reference_model.build_model(model, ROOT / "scripts" / "reference" / "config.json", "float32")
    return model


def quality_task(model: Path, text: Path | None, questions: Path | None) -> dict[str, Any] | None:
    """The texts and prompts for quality, as token ids, so that no peer's tokenizer matters; None for no quality.

    Without a chat template, prompts are the bare questions.
    """
    if text is None and questions is None:
        return None
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    begin = text.read_bytes()[:TEXT_BYTES].decode("utf-8", errors="ignore") if text is not None else ""
    lines = questions.read_text(encoding="utf-8").splitlines()[:QUESTIONS] if questions is not None else []
    settings = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    ends = settings.get("eos_token_id")
    return {
        "ids": list(tokenizer(begin, verbose=False)["input_ids"]) if begin else [],
        "window": WINDOW,
        "stride": STRIDE,
        "prompts": [_prompt(tokenizer, json.loads(line)["turns"][0]) for line in lines],
        "answer_tokens": ANSWER_TOKENS,
        "ends": ends if isinstance(ends, list) else [] if ends is None else [ends],
    }


def _prompt(tokenizer: Any, question: str) -> list[int]:
    if not tokenizer.chat_template:
        return list(tokenizer(question)["input_ids"])
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


class Comparison:
    """One model for several peers. `failures` holds the reason of each failure, by peer and stage."""

    def __init__(self, cache: Path, model: Path, vocab: int, threads: int, failures: dict[str, dict[str, str]]) -> None:
        self.environments = Environments(cache, threads)
        self._work = cache / "models" / f"{model.name}-{fingerprint(model)}"
        self._model = readable(model, self._work / "model")
        self._vocab = vocab
        self._threads = threads
        self._failures = failures

    def prepare(self, peer: report.Peer) -> bool:
        """Install, convert, and run once to fill the system's file cache. Returns whether all of it succeeded."""
        for stage, work in (("installation", self._install), ("conversion", self._convert)):
            print(f"{peer.name}: {stage}", file=sys.stderr, flush=True)
            try:
                work(peer)
            except PeerError as error:
                self._fail(peer, stage, error)
                return False
        return self._measure(peer, COLD) is not None

    def _install(self, peer: report.Peer) -> None:
        self.environments.install(peer.adapter)

    def _convert(self, peer: report.Peer) -> None:
        folder = self._folder(peer)
        stamp, made_by = folder / "converted.json", self.environments.identity(peer.adapter)
        if not stamp.is_file() or json.loads(stamp.read_text(encoding="utf-8")) != made_by:
            shutil.rmtree(folder, ignore_errors=True)
            self._harness(peer, "convert", "--model", str(self._model))
            stamp.write_text(json.dumps(made_by), encoding="utf-8")

    def round(self, peers: list[report.Peer], kinds: list[str], number: int, rounds: int) -> dict[str, Any]:
        """Figures by peer name. Each kind of measurement runs on all peers, in the opposite order in every second
        round."""
        figures: dict[str, dict[str, Any]] = {peer.name: {} for peer in peers}
        for kind in kinds:
            print(f"round {number + 1} of {rounds}: {kind}", file=sys.stderr, flush=True)
            for peer in peers[:: -1 if number % 2 else 1]:
                if kind not in self._failures.get(peer.name, {}):
                    figures[peer.name] |= self._measure(peer, kind) or {}
        return figures

    def quality(self, peers: list[report.Peer], task: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Figures by peer name, the reference's first; the reference is prepared even if it is not among the peers."""
        reference = PEERS[REFERENCE]
        if reference not in peers and not self.prepare(reference):
            return {}
        file = self._work / "task.json"
        file.write_text(json.dumps(task), encoding="utf-8")
        found: dict[str, dict[str, Any]] = {}
        for peer in [reference, *(peer for peer in peers if peer is not reference)]:
            print(f"{peer.name}: {QUALITY}", file=sys.stderr, flush=True)
            words = ["--task-file", str(file), "--threads", str(self._threads)]
            words += ["--reference"] if peer is reference else []
            try:
                found[peer.name] = json.loads(self._harness(peer, QUALITY, *words))
            except PeerError as error:
                self._fail(peer, QUALITY, error)
                if peer is reference:
                    return {}
                continue
            expected = found[reference.name]["answers"]
            found[peer.name] |= quality.equal_answers(expected, found[peer.name]["answers"])
        (self._work / quality.REFERENCE_NAME).unlink(missing_ok=True)  # gigabytes, and nothing else needs them
        return {name: {"label": PEERS[name].label, **figures} for name, figures in found.items()}

    def _measure(self, peer: report.Peer, kind: str) -> dict[str, Any] | None:
        words = ["--kind", kind, "--threads", str(self._threads), "--vocab", str(self._vocab)]
        try:
            found: dict[str, Any] = json.loads(self._harness(peer, "measure", *words))
        except PeerError as error:
            self._fail(peer, kind, error)
            return None
        return found

    def _harness(self, peer: report.Peer, task: str, *words: str) -> str:
        return self.environments.harness(peer.adapter, [task, peer.adapter, peer.variant], self._folder(peer), words)

    def _folder(self, peer: report.Peer) -> Path:
        """With and without kernels, the bundle is the same."""
        return self._work / peer.name.removesuffix(KERNELS)

    def _fail(self, peer: report.Peer, stage: str, error: PeerError) -> None:
        print(f"{peer.name}: {stage} failed: {error}", file=sys.stderr, flush=True)
        self._failures.setdefault(peer.name, {})[stage] = str(error)


def machine() -> dict[str, Any]:
    """The machine that was measured."""
    import psutil

    name, flags = platform.processor() or platform.machine(), set()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = [line.partition(":") for line in cpu.read_text(encoding="utf-8").splitlines()]
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
        flags = {flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split()}
    told = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")
    return {
        "cpu": name,
        "features": [flag for flag in told if flag in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
