"""Train the small story model that ships with the project, from two public texts.

Owns the whole recipe: cleaning the texts, the byte-level BPE tokenizer, the schedule, and the Hugging Face folder that
comes out. Needs torch, transformers, tokenizers and safetensors; nothing of the project imports it.

Two kinds of text are mixed. The stories (TinyStories) are the target, but there is under one megabyte of them, so
general English (WikiText-2) fills more than half of the rows at first and fades out. The stories fall into three parts
by the seed: one to train on, one that chooses the checkpoint, one that only the final report reads.

Every batch and every dropout mask is a function of the seed and the step, so a run that is stopped and started again
with ``--resume`` takes the same steps as one that was not. The same seed and number of threads on the same machine give
the same model. Nothing is written in place: a file appears complete or not at all. No pickle is read or written.

    python scripts/train_example_model.py --texts TEXTS --out OUT

``TEXTS`` holds ``tinystories/tinystories_1000.json`` (a JSON list of stories) and ``wikitext-2/train.txt``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

STORIES = Path("tinystories", "tinystories_1000.json")
WIKITEXT = Path("wikitext-2", "train.txt")
END_OF_TEXT = "<|endoftext|>"
GIRLS = (
    "Lily", "Anna", "Mia", "Sara", "Lucy", "Sarah", "Molly", "Jane", "Lila", "Jill", "Daisy", "Sue", "Sally", "Amy",
    "Mary", "Jenny", "Emma", "Grace", "Ella",
)  # fmt: skip
BOYS = (
    "Ben", "Tom", "Timmy", "Jack", "Tim", "Sam", "Max", "John", "Bob", "Joe", "Jimmy", "Tommy", "Billy", "Andy",
    "Benny", "James", "Jake", "Jim", "Frank", "George",
)  # fmt: skip
INSIDE_SHARE = 0.5  # of the rows of stories: open inside a story
MARKED_SHARE = 0.25  # of the rows of stories: open with END_OF_TEXT and a whole story
SAMPLE_PROMPTS = ("Once upon a time", "One day, a little girl named Lily", "Tom and his dog")


Optimizers = list[torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; each field is a flag of the same name."""

    seed: int = 1
    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    feed_forward: int = 512
    positions: int = 1024
    steps: int = 2800
    tokens_per_step: int = 2048
    window: int = 256
    long_window: int = 1024
    long_share: float = 0.3
    learning_rate: float = 3e-3
    block_learning_rate: float = 0.02
    weight_decay: float = 0.1
    dropout: float = 0.15
    rename_share: float = 0.5
    first_story_share: float = 0.4
    last_story_share: float = 1.0
    dev_stories: int = 50
    held_out_stories: int = 50


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
class Stories:
    """The three disjoint parts of the stories."""

    train: list[str]
    dev: list[str]
    held_out: list[str]


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a model predicts a list of stories, the end of each story included."""

    loss: float
    perplexity_per_token: float
    perplexity_per_word: float
    bits_per_byte: float
    tokens: int


# UTF-8 punctuation read as Windows-1252. The bare pair comes last: it is a closing quote, whose third byte got lost
# because Windows-1252 has no character for it.
BROKEN_PUNCTUATION = (
    ("\u00e2\u20ac\u0153", '"'),
    ("\u00e2\u20ac\u2122", "'"),
    ("\u00e2\u20ac\u201c", " - "),
    ("\u00e2\u20ac\u201d", " - "),
    ("\u00e2\u20ac", '"'),
)


# --- texts ------------------------------------------------------------------------------------------------------------


def repair_story(text: str) -> str:
    """Undo UTF-8 that was once read as Windows-1252, and write quotes and dashes in ASCII.

    ASCII because nearly all stories use it already: a second spelling of a quote would only thin out the examples.
    """
    for broken, plain in BROKEN_PUNCTUATION:
        text = text.replace(broken, plain)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n\n", text)).strip()


def undo_wikitext_tokenisation(line: str) -> str:
    """Join what WikiText split: numbers, hyphens, punctuation, brackets, contractions and quotes."""
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r" ([,.;:!?%)\]]|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)", r"\1", line)
    line = re.sub(r"([(\[$£]) ", r"\1", line)
    line = re.sub(r'" ([^"]*?) "', r'"\1"', line)
    return re.sub(r"(\w) ' (?=\w)", r"\1' ", line)


def is_whole(sentence: str) -> bool:
    """Tell whether a sentence has no hole, no foreign letters, and closes the quotations that it opens."""
    return "<unk>" not in sentence and sentence.isascii() and sentence.count('"') % 2 == 0


def wikitext_paragraphs(path: Path) -> Iterator[str]:
    """Yield the paragraphs without their headings and without the sentences that are not whole.

    A sentence with a hole teaches wrong grammar; leaving it out costs less than leaving the hole.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("="):
            continue
        sentences = re.split(r"(?<= [.!?]) (?=[A-Z\"])", line.strip())
        kept = [sentence for sentence in sentences if is_whole(sentence)]
        if kept:
            yield undo_wikitext_tokenisation(" ".join(kept))


def read_stories(path: Path, recipe: Recipe) -> Stories:
    """Read and split the stories; the split depends on the seed alone."""
    texts = [repair_story(text) for text in json.loads(path.read_text(encoding="utf-8"))]
    random.Random(recipe.seed).shuffle(texts)  # noqa: S311  (no secret)
    dev_end = recipe.held_out_stories + recipe.dev_stories
    return Stories(
        train=texts[dev_end:], dev=texts[recipe.held_out_stories : dev_end], held_out=texts[: recipe.held_out_stories]
    )


def rename_characters(story: str, chance: random.Random) -> str:
    """Give the girls and boys of a story other names, each the same one throughout.

    With so few stories a name soon stands for the one plot it occurred in; this breaks the tie.
    """
    for names in (GIRLS, BOYS):
        present = sorted(name for name in names if re.search(rf"\b{name}\b", story))
        free = [name for name in names if name not in present]
        renamed = dict(zip(present, chance.sample(free, min(len(present), len(free))), strict=False))
        if renamed:
            pieces = re.split(rf"\b({'|'.join(renamed)})\b", story)
            story = "".join(renamed.get(piece, piece) for piece in pieces)
    return story


# --- tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(stories: list[str], vocabulary: int) -> Tokenizer:
    """Train byte-level BPE on the stories alone: their words become single tokens, other text falls back to pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id of the token that stands before and after each story."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    if token is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT}")
    return token


def tokenizer_settings(positions: int) -> dict[str, Any]:
    """Return what transformers needs beside ``tokenizer.json`` to load the same tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
    }


# --- batches ----------------------------------------------------------------------------------------------------------


class Batches:
    """Rows of token ids, each a function of the seed and the step."""

    def __init__(self, stories: list[str], general: list[str], tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._recipe = recipe
        self._end = end_of_text(tokenizer)
        self._tokenizer = tokenizer
        self._texts = stories
        self._stories: list[list[int]] = [encoding.ids for encoding in tokenizer.encode_batch(stories)]
        joined = "\n\n".join(general)
        pieces = tokenizer.encode_batch([joined[at : at + 100_000] for at in range(0, len(joined), 100_000)])
        self._general: list[int] = [token for piece in pieces for token in piece.ids]

    @property
    def sizes(self) -> dict[str, int]:
        """Count the tokens of each kind of text."""
        return {"stories": sum(map(len, self._stories)), "general": len(self._general)}

    def at(self, step: int) -> Tensor:
        """Return the batch of a step: ``(rows, window)`` int64."""
        recipe = self._recipe
        chance = random.Random(f"{recipe.seed}/{step}")  # noqa: S311  (no secret)
        progress = step / recipe.steps
        story_share = recipe.first_story_share + progress * (recipe.last_story_share - recipe.first_story_share)
        window = recipe.long_window if chance.random() < recipe.long_share else recipe.window
        rows = [
            self._story_row(chance, window) if chance.random() < story_share else self._general_row(chance, window)
            for _ in range(recipe.tokens_per_step // window)
        ]
        return torch.tensor(rows)

    def _story_row(self, chance: random.Random, window: int) -> list[int]:
        """Return stories one after the other.

        Most rows open with a whole story, with or without the token before it, as prompts do. The others open inside
        one: a row is shorter than many stories, and their endings must be seen as well.
        """
        first = self._story(chance)
        row = first[chance.randrange(len(first)) :] if chance.random() < INSIDE_SHARE else list(first)
        if chance.random() < MARKED_SHARE:
            row = [self._end, *first]
        while len(row) < window:
            row += [self._end, *self._story(chance)]
        return row[:window]

    def _story(self, chance: random.Random) -> list[int]:
        index = chance.randrange(len(self._stories))
        if self._recipe.rename_share and chance.random() < self._recipe.rename_share:
            return self._tokenizer.encode(rename_characters(self._texts[index], chance)).ids
        return self._stories[index]

    def _general_row(self, chance: random.Random, window: int) -> list[int]:
        start = chance.randrange(len(self._general) - window)
        return self._general[start : start + window]


# --- model ------------------------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, end: int) -> LlamaForCausalLM:
    """Return a model with random weights."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden // recipe.heads,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Drop a share of the embeddings and of what each block adds, while the model is in training mode.

    By hooks, because Llama itself offers dropout for the attention weights only.
    """

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, share, training=module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def build_optimizers(model: nn.Module, recipe: Recipe) -> Optimizers:
    """Muon for the matrices of the blocks, AdamW for the embeddings and the norms.

    AdamW throughout took twice the steps to the same loss, and processor time is what limits this training. Norm
    weights do not decay, as that would pull them away from one.
    """
    blocks = [weight for name, weight in model.named_parameters() if weight.dim() > 1 and "embed" not in name]
    embeddings = [weight for name, weight in model.named_parameters() if weight.dim() > 1 and "embed" in name]
    norms = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": embeddings, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizers: Optimizers = [
        torch.optim.Muon(blocks, lr=recipe.block_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def pace_at(step: int, recipe: Recipe) -> float:
    """Return the share of the peak learning rate: linear warm-up over the first 3 %, then a cosine to zero."""
    warm_up = max(1, recipe.steps * 3 // 100)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))


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


def write_json(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


def weights_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Return the parameters by name; tied ones appear once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Checkpoints:
    """The folder of a run: the state to go on from, and the weights that were best on the development stories.

    A stop at any moment leaves the last complete state. Tensors and step are one file, so they never disagree.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state = folder / "state.safetensors"
        self._best = folder / "best.safetensors"

    def save_state(self, step: int, best_loss: float, model: LlamaForCausalLM, optimizers: Optimizers) -> None:
        """Write all that a run needs to go on after a step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"weight/{name}": tensor for name, tensor in weights_of(model).items()}
        for which, optimizer in enumerate(optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"moment/{which}/{index}/{name}": tensor for name, tensor in moments.items()}
        write_tensors(self._state, tensors, {"step": str(step), "best_loss": repr(best_loss)})

    def has_state(self) -> bool:
        """Tell whether there is a state to go on from."""
        return self._state.is_file()

    def load_state(self, model: LlamaForCausalLM, optimizers: Optimizers) -> tuple[int, float]:
        """Restore the state; returns the step it was saved after and the best loss so far."""
        with safe_open(self._state, framework="pt") as file:
            metadata: dict[str, str] = file.metadata()
        states = [optimizer.state_dict() | {"state": {}} for optimizer in optimizers]
        for key, tensor in load_file(self._state).items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                model.get_parameter(name).data.copy_(tensor)
            else:
                which, index, moment = name.split("/")
                states[int(which)]["state"].setdefault(int(index), {})[moment] = tensor
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        return int(metadata["step"]), float(metadata["best_loss"])

    def save_best(self, model: LlamaForCausalLM) -> None:
        """Keep these weights as the best so far."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._best, weights_of(model))

    def load_best(self, model: LlamaForCausalLM) -> None:
        """Put the best weights into the model."""
        for name, tensor in load_file(self._best).items():
            model.get_parameter(name).data.copy_(tensor)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, positions: int) -> None:
    """Write the Hugging Face folder; each file is renamed into place when all of them are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        partial = Path(name)
        model.save_pretrained(partial)
        ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
        cast(Any, GenerationConfig)(**ends).save_pretrained(partial)
        tokenizer.save(str(partial / "tokenizer.json"))
        write_json(partial / "tokenizer_config.json", tokenizer_settings(positions))
        for file in sorted(partial.iterdir()):
            file.chmod(0o644)  # safetensors makes it readable for its owner only
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
    """Take the steps of the recipe; leaves the weights in the model that were best on the development stories."""
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
    """Print at once, even into a file that is being followed."""
    print(line, flush=True)


def report_result(model: LlamaForCausalLM, tokenizer: Tokenizer, stories: Stories, run: Run) -> None:
    """Measure the rounded model once on the stories that nothing else has read, and show what it writes."""
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
    """Turn the command line into a run."""
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
