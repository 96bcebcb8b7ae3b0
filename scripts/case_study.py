"""One real model, from transformers in float32 to edgelm's bundles: time, memory, bytes, quality, answers.

    python scripts/case_study.py --texts wikitext-2/test.txt stories.txt --lambada lambada_test.jsonl \
        --questions mt_bench_questions.jsonl [--rounds 3] [--only speed quality ...] [--without pruned ...]

Uses the model of real_model.py. Results are stored below --work figure by figure: a run that was stopped continues with
the missing ones, and --only runs some parts (models, speed, quality, answers, report). Speeds are measured in
alternation, each in a process of its own. Needs edgelm with the extra `export`; uses `edgelm-kernels` if installed.
Prints the report and stores it as report.md beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import real_model
from given import existing_file
from peers.harness import memory

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "scripts" / "case_study.toml"
PROMPT = "Explain to a friend how a bicycle stays upright, and what gears are for."
ANSWER_TOKENS, SHOWN_TOKENS, QUESTIONS, PASSAGES, TEXT_BYTES = 200, 60, 20, 500, 40_000
PARTS = ("models", "speed", "quality", "answers", "report")
SOURCE = "transformers"


@dataclass(frozen=True)
class Variant:
    """A form of the model. title: in the report; share: of the float32 weights' bytes that a bundle may take; recipe:
    applied before the export."""

    name: str
    title: str
    share: float | None = None
    recipe: Path | None = None


VARIANTS = (
    Variant(SOURCE, "transformers, float32"),
    Variant("int8", "edgelm, INT8 (fits 50 % and 40 %)"),
    Variant("quarter", "edgelm, 25 % of the bytes", 0.25),
    Variant("pruned", "edgelm, 30 % fewer parameters, INT8", None, RECIPE),
)


class Study:
    """The folder, its figures, and the tools of the parts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work, self.model = arguments, arguments.work, real_model.make()
        self.work.mkdir(parents=True, exist_ok=True)
        self._file = self.work / "figures.json"
        self.figures: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self.variants = [item for item in VARIANTS if item.name not in arguments.without]

    def folder(self, variant: Variant) -> Path:
        """The folder of the source or of the variant's bundle."""
        return self.model if variant.name == SOURCE else self.work / variant.name

    def require_models(self) -> None:
        """Raises: SystemExit, if a form of the model is not made yet."""
        missing = [variant.name for variant in self.variants if not self.folder(variant).is_dir()]
        if missing:
            raise SystemExit(f"{', '.join(missing)}: not made yet below {self.work}: run with --only models first")

    def note(self, key: str, measure: Callable[[], Any]) -> None:
        """Measure a figure unless it is known, and store it at once."""
        if key in self.figures:
            return
        started = time.monotonic()
        self.figures[key] = measure()
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.figures, indent=1), encoding="utf-8")
        partial.replace(self._file)
        print(f"{key}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def run(self, *command: str) -> str:
        """The output of a command of edgelm or of this file. Raises: CalledProcessError."""
        print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT / "scripts").stdout

    def edgelm(self, *arguments: str) -> str:
        """The output of edgelm's command line."""
        return self.run(sys.executable, "-m", "edgelm.runtime.cli", *arguments)


def main() -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--texts",
        type=existing_file,
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts; the first 40 kB of each are read",
    )
    parser.add_argument("--lambada", type=existing_file, metavar="FILE", help="passages; 500 of them are read")
    parser.add_argument("--questions", type=existing_file, metavar="FILE", help="JSON lines with the key turns")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "case-study", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", choices=[v.name for v in VARIANTS[1:]])
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("texts", "lambada", "questions", "work"):
        given = getattr(arguments, name)
        resolved = [path.resolve() for path in given] if isinstance(given, list) else given and given.resolve()
        setattr(arguments, name, resolved)
    study = Study(arguments)
    if arguments.measure:
        print(json.dumps(_measure(study, *arguments.measure)))
        return
    doing = {"models": models, "speed": speed, "quality": quality, "answers": answers, "report": report}
    for part in PARTS:
        if part in arguments.only:
            if part not in ("models", "report"):
                study.require_models()
            doing[part](study)


def models(study: Study) -> None:
    """Make the bundles; record parameters and bytes."""
    whole = (study.model / "model.safetensors").stat().st_size
    study.note(f"{SOURCE}/bytes", lambda: whole)
    for variant in study.variants[1:]:
        study.note(f"{variant.name}/made", lambda variant=variant: _make(study, variant, whole))
        manifest = json.loads((study.folder(variant) / "manifest.json").read_text(encoding="utf-8"))
        study.note(f"{variant.name}/parameters", lambda found=manifest: found["model"]["parameters"])
        files = [study.folder(variant) / name for name in ("model.onnx", "model.onnx.data")]
        study.note(f"{variant.name}/bytes", lambda files=files: sum(file.stat().st_size for file in files))


def _make(study: Study, variant: Variant, whole: int) -> float:
    """Make a bundle; returns the seconds it took."""
    started, source = time.monotonic(), str(study.model)
    if variant.recipe is not None:
        smaller = str(study.work / f"{variant.name}-folder")
        study.edgelm("compress", source, "--recipe", str(variant.recipe), "--out", smaller, "--force")
        source = smaller
    size = () if variant.share is None else ("--size", str(int(variant.share * whole)))
    study.edgelm("export", source, "--out", str(study.folder(variant)), "--force", *size)
    return time.monotonic() - started


def speed(study: Study) -> None:
    """Answers of 200 tokens to a chat prompt, in alternation."""
    for index in range(study.arguments.rounds):
        for variant in study.variants:
            study.note(f"{variant.name}/speed/{index}", lambda variant=variant: _apart(study, variant, "speed"))


def answers(study: Study) -> None:
    """Greedy answers to the questions."""
    if study.arguments.questions is not None:
        for variant in study.variants:
            study.note(f"{variant.name}/answers", lambda variant=variant: _apart(study, variant, "answers"))


def quality(study: Study) -> None:
    """Perplexities of the texts, and LAMBADA."""
    cut = [_cut(study, path) for path in study.arguments.texts]
    for variant in study.variants:
        model = str(study.folder(variant))
        for text in cut:
            key = f"{variant.name}/perplexity/{text.stem}"
            study.note(key, lambda text=text, model=model: _evaluated(study, model, "--text", str(text)))
        if study.arguments.lambada is not None:
            passages = study.work / "passages.jsonl"
            lines = study.arguments.lambada.read_text(encoding="utf-8").splitlines()[:PASSAGES]
            passages.write_text("\n".join(lines) + "\n", encoding="utf-8")
            study.note(
                f"{variant.name}/lambada",
                lambda model=model, passages=passages: _evaluated(study, model, "--lambada", str(passages)),
            )


def _cut(study: Study, path: Path) -> Path:
    kept = study.work / f"{path.parent.name}-{path.stem}.txt"
    kept.write_bytes(path.read_bytes()[:TEXT_BYTES].decode("utf-8", "ignore").encode())
    return kept


def _evaluated(study: Study, model: str, *what: str) -> Any:
    return json.loads(study.edgelm("eval", model, *what, "--json"))


def _apart(study: Study, variant: Variant, what: str) -> Any:
    """A measurement in a process of its own."""
    questions = study.arguments.questions
    given = ("--questions", str(questions)) if questions else ()
    command = (sys.executable, __file__, "--work", str(study.work), "--measure", variant.name, what, *given)
    return json.loads(study.run(*command))


def _measure(study: Study, name: str, what: str) -> Any:
    variant = next(item for item in VARIANTS if item.name == name)
    generate, tokenizer = _load(study, variant)
    if what == "speed":
        return _timed(generate, _chat(tokenizer, PROMPT))
    lines = study.arguments.questions.read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    asked = [json.loads(line)["turns"][0] for line in lines]
    ends = {tokenizer.eos_token_id}
    found = []
    for question in asked:
        tokens = list(generate(_chat(tokenizer, question), SHOWN_TOKENS))
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        found.append([question, tokenizer.decode(tokens[:end])])
    return found


def _load(study: Study, variant: Variant) -> tuple[Callable[[list[int], int], Iterator[int]], Any]:
    """A generating function, and the variant's tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(study.folder(variant), local_files_only=True)
    if variant.name == SOURCE:
        import torch
        from peers.transformers import Loaded

        module = transformers.AutoModelForCausalLM.from_pretrained(study.model, dtype=torch.float32).eval()
        return Loaded(module).generate, tokenizer
    from edgelm.runtime import load

    engine = load(study.folder(variant), response_cache=False, prefix_cache=False)

    def generate(ids: list[int], count: int) -> Iterator[int]:
        # No draft tokens: a damaged model repeats itself, which they would make look fast.
        for chunk in engine.stream(token_ids=ids, max_tokens=count, min_tokens=count, lookup=False):
            yield from chunk.token_ids

    return generate, tokenizer


def _chat(tokenizer: Any, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _timed(generate: Callable[[list[int], int], Iterator[int]], ids: list[int]) -> dict[str, float]:
    """Times of the second answer, to a prompt that is in no cache; the first answer, to the same tokens from the end,
    warms up. A prompt with the same beginning would leave keys and values that the second one continues."""
    for _ in generate(ids[::-1], 8):
        pass
    started, first, count = time.perf_counter(), 0.0, 0
    for _ in generate(ids, ANSWER_TOKENS):
        first = first or time.perf_counter() - started
        count += 1
    seconds = time.perf_counter() - started
    if count != ANSWER_TOKENS:
        raise SystemExit(f"{count} tokens came instead of {ANSWER_TOKENS}")
    return {"first_s": first, "answer_s": seconds, **memory()}


def report(study: Study) -> None:
    """Print the known figures, and store the report."""
    from case_study_report import markdown

    text = markdown(study.figures, {variant.name: variant.title for variant in study.variants})
    (study.work / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
