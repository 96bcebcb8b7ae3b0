"""Train the small story model that ships with the project, from two public texts.

Covers the whole recipe: cleaning the texts, the byte-level BPE tokenizer, the schedule, and the resulting Hugging Face
folder. Needs torch, transformers, tokenizers and safetensors; nothing in the project imports it.

Two kinds of text are mixed. The stories (TinyStories) are the target, but they are under one megabyte, so general
English (WikiText-2) fills more than half of the rows at first and fades out. The seed splits the stories into three
parts: one to train on, one that chooses the checkpoint, one that only the final report reads.

Every batch and every dropout mask is a function of the seed and the step, so a run that is stopped and resumed with
``--resume`` takes the same steps as an uninterrupted one. The same seed and number of threads on the same machine give
the same model. Nothing is written in place: a file appears complete or not at all. No pickle is read or written.

    python scripts/train_example_model.py --texts TEXTS --out OUT

``TEXTS`` holds ``tinystories/tinystories_1000.json`` (a JSON list of stories) and ``wikitext-2/train.txt``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from example_model.batches import Batches
from example_model.checkpoints import Checkpoints, write_json
from example_model.model import (
    Optimizers,
    add_dropout,
    build_model,
    build_optimizers,
    end_of_text,
    pace_at,
    tokenizer_settings,
    train_tokenizer,
)
from example_model.texts import STORIES, WIKITEXT, Recipe, Stories, read_stories, wikitext_paragraphs
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM

SAMPLE_PROMPTS = ("Once upon a time", "One day, a little girl named Lily", "Tom and his dog")


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of this program."""

    recipe: Recipe
    texts: Path
    out: Path
    work: Path
    threads: int
    check_every: int
    resume: bool


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a list of stories, the end of each story included."""

    loss: float
    perplexity_per_token: float
    perplexity_per_word: float
    bits_per_byte: float
    tokens: int


@torch.inference_mode()
def score(model: LlamaForCausalLM, tokenizer: Tokenizer, stories: list[str]) -> Score:
    """Predict each story on its own, from the end-of-text token to the end-of-text token, in float32."""
    model.train(False)
    end = end_of_text(tokenizer)
    nats, tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor([[end, *tokenizer.encode(story).ids, end]])
        logits = model(ids[:, :-1], use_cache=False).logits[0].float()
        nats += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    model.train(True)
    return Score(
        loss=nats / tokens,
        perplexity_per_token=math.exp(nats / tokens),
        perplexity_per_word=math.exp(nats / sum(len(story.split()) for story in stories)),
        bits_per_byte=nats / math.log(2) / sum(len(story.encode()) for story in stories),
        tokens=tokens,
    )


@torch.inference_mode()
def continue_greedily(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    """Return the prompt and the likeliest continuation, up to the end of the story."""
    model.train(False)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    generate = cast(Any, model).generate
    output = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=end_of_text(tokenizer),
    )
    model.train(True)
    return str(tokenizer.decode(output[0].tolist()))


# --- files ------------------------------------------------------------------------------------------------------------


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, positions: int) -> None:
    """Write the Hugging Face folder; each file is renamed into place once all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        partial = Path(name)
        model.save_pretrained(partial)
        ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
        cast(Any, GenerationConfig)(**ends).save_pretrained(partial)
        tokenizer.save(str(partial / "tokenizer.json"))
        write_json(partial / "tokenizer_config.json", tokenizer_settings(positions))
        for file in sorted(partial.iterdir()):
            file.chmod(0o644)  # safetensors makes it readable only for its owner
            file.replace(folder / file.name)


# --- the run ----------------------------------------------------------------------------------------------------------


def train_step(model: LlamaForCausalLM, optimizers: Optimizers, rows: Tensor, pace: float) -> float:
    """Take one step at a share of the peak learning rates; returns the loss before it."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(rows[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * pace
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, batches: Batches, dev: list[str], run: Run) -> None:
    """Take the steps of the recipe; leaves the best weights on the development stories in the model."""
    recipe, checkpoints = run.recipe, Checkpoints(run.work)
    optimizers = build_optimizers(model, recipe)
    first, best = checkpoints.load_state(model, optimizers) if run.resume else (0, math.inf)
    add_dropout(model, recipe.dropout)
    model.train(True)
    started, running = time.monotonic(), 0.0
    for step in range(first, recipe.steps):
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        loss = train_step(model, optimizers, batches.at(step), pace_at(step, recipe))
        running = loss if step == first else 0.98 * running + 0.02 * loss
        done = step + 1
        if done % run.check_every and done != recipe.steps:
            continue
        result = score(model, tokenizer, dev)
        pace = (done - first) * recipe.tokens_per_step / (time.monotonic() - started)
        report(f"step {done}: train {running:.3f}, dev {result.loss:.4f}, {pace:.0f} tokens/s")
        if result.loss < best:
            best = result.loss
            checkpoints.save_best(model)
        checkpoints.save_state(done, best, model, optimizers)
    checkpoints.load_best(model)


def report(line: str) -> None:
    """Print and flush, so that a log file can be followed."""
    print(line, flush=True)


def report_result(model: LlamaForCausalLM, tokenizer: Tokenizer, stories: Stories, run: Run) -> None:
    """Measure the rounded model once on stories that nothing else has read, and print samples."""
    numbers = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dev": dataclasses.asdict(score(model, tokenizer, stories.dev)),
        "held_out": dataclasses.asdict(score(model, tokenizer, stories.held_out)),
        "samples": [continue_greedily(model, tokenizer, prompt, 250) for prompt in SAMPLE_PROMPTS],
        "recipe": dataclasses.asdict(run.recipe),
    }
    write_json(run.work / "report.json", numbers)
    report(json.dumps(numbers, indent=2))


def parse_arguments(arguments: list[str]) -> Run:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--texts", type=Path, required=True, help="folder of the two texts")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and the report; OUT.work unless given")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--check-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --work")
    recipe = parser.add_argument_group("recipe")
    for field in dataclasses.fields(Recipe):
        recipe.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    for text in (STORIES, WIKITEXT):
        if not (given["texts"] / text).is_file():
            parser.error(f"--texts: there is no {text} in {given['texts']}")
    chosen = Recipe(**{field.name: given.pop(field.name) for field in dataclasses.fields(Recipe)})
    given["work"] = given["work"] or given["out"].with_name(given["out"].name + ".work")
    if given["resume"] and not Checkpoints(given["work"]).has_state():
        parser.error(f"--resume: there is no checkpoint in {given['work']}")
    return Run(recipe=chosen, **given)


def main(arguments: list[str]) -> None:
    """Train, export, measure."""
    run = parse_arguments(arguments)
    torch.set_num_threads(run.threads)
    recipe = run.recipe
    stories = read_stories(run.texts / STORIES, recipe)
    tokenizer = train_tokenizer(stories.train, recipe.vocabulary)
    batches = Batches(stories.train, list(wikitext_paragraphs(run.texts / WIKITEXT)), tokenizer, recipe)
    model = build_model(recipe, end_of_text(tokenizer))
    report(f"tokens: {batches.sizes}, parameters: {sum(weight.numel() for weight in model.parameters())}")
    train(model, tokenizer, batches, stories.dev, run)
    exact = score(model, tokenizer, stories.dev).loss
    cast(Any, model).half()
    export(model, tokenizer, run.out, recipe.positions)
    cast(Any, model).float()
    report(f"dev loss before rounding to float16 {exact:.6f}")
    report_result(model, tokenizer, stories, run)


if __name__ == "__main__":
    main(sys.argv[1:])
