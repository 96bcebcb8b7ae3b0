"""Apply a recipe to a model and write the compressed folder. Measure the model before the first step and after each.

Errors that can be detected early are raised before the first step. A dry run (`rehearse`) writes nothing, and its
training steps only estimate their time.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.bundle.folder import REPORT_PAGE_NAME
from ...targets import Profile
from ..config import ExportConfig
from ..errors import RecipeError
from ..output import place
from ..output.report_html import compressed_page
from ..source.compressed import RECORD_NAME, Record, read_record, settings_of
from ..source.finding import find_source
from ..source.loading import SourceModel, describe_source, load_module
from ..stages import Progress, Stages
from ..texts import Texts
from .folder import write_compressed
from .last_words import load_passages, read_texts
from .measure import EVERYTHING, MOST_TOKENS, Measuring, Meter
from .outlook import look_ahead, step_benches
from .processes import is_first, wait_for_all
from .progress import telling
from .recipe import Recipe, load_recipe, step_settings
from .step import Retokenizing, Step, Workbench, step_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Task:
    """A compression. model: as the user named it; folder: the model's; profile: of the target that sizes are computed
    for; texts: calibration texts and texts to measure on."""

    model: str
    folder: Path
    recipe: Recipe
    profile: Profile
    texts: Texts
    measuring: Measuring = EVERYTHING


@dataclass
class _Context:
    """State shared by the stages. Comments name the stage that sets a field."""

    task: Task
    checkpoints: Path
    say: Callable[[str], None]
    rehearsal: bool
    module: PreTrainedModel = field(init=False)  # load
    source: SourceModel = field(init=False)  # load
    bench: Workbench = field(init=False)  # load: the source's
    benches: list[Workbench] = field(init=False)  # load: one per step
    meter: Meter = field(init=False)  # load
    figures: dict[str, Any] = field(init=False)  # load, then each step
    done: list[dict[str, Any]] = field(default_factory=list)  # each step


def compress_folder(
    task: Task,
    out: Path,
    checkpoints: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Apply a recipe and write the result to `out`, an empty folder, in the form that `folder.py` describes.

    checkpoints: folder for the checkpoints of training steps, kept after an interruption; say: receives progress lines.
    Of several processes, only the first one measures and writes; the records of the others have no figures. Raises:
    SourceError, RecipeError, OSError, StageError.
    """
    context = _Context(task, checkpoints, say, rehearsal=False)
    stages = _apply_all(context, progress)
    with stages.stage("write"):
        if is_first():
            record = _record(context)
            write_compressed(context.module, context.benches[-1].tokenizer, record, out)
            page = compressed_page(record.name, record.recipe, record.steps)
            (out / REPORT_PAGE_NAME).write_text(page, encoding="utf-8")
    return _record(context)


def _apply_all(context: _Context, progress: Progress | None) -> Stages:
    task = context.task
    stages = Stages(f"{task.model} with recipe {task.recipe.name}", progress)
    with telling(context.say):
        with stages.stage("load"):
            _load(context)
        with stages.stage("measure the source"):
            context.figures = _measure(context, context.bench)
        for index, step in enumerate(task.recipe.steps):
            with stages.stage(f"{index + 1}: {step_name(step)}"):
                _apply(context, index, step)
    return stages


def _load(context: _Context) -> None:
    task = context.task
    context.module = load_module(task.folder)
    context.source = source = describe_source(task.model, task.folder, context.module)
    # No special tokens: the export's gate uses the runtime's tokenizer, which adds none.
    ids, *judging = (
        list(source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in (task.texts.calibrating, *(text for _, text in task.texts.judging))
    )
    judged = [token for part in judging for token in part[: MOST_TOKENS // len(judging)]]
    for what, found in (("calibrate", ids), ("measure", judged)):
        if len(found) < 2:
            raise RecipeError(
                f"the part of {task.texts.origin} to {what} on has {len(found)} tokens, too few: give a longer text "
                "with --text"
            )
    measuring, passages = task.measuring, None
    if measuring.passages is not None:
        passages = load_passages(
            measuring.passages, measuring.count, source.tokenizer, context.module, source.context_length
        )
    context.bench = bench = Workbench(
        ids,
        source.tokenizer,
        task.folder,
        context.checkpoints,
        source.context_length,
        context.say,
        before=tuple(settings_of(step) for step in source.compression),
        passages=passages,
        rehearsal=context.rehearsal,
    )
    first = task.recipe.steps[0]
    if isinstance(first, Retokenizing):
        bench = first.retokenized(context.module, bench)
    context.benches = step_benches(task.recipe.steps, bench)
    look_ahead(task.recipe.steps, context.module, context.benches)
    reads = measuring.reads and not context.rehearsal
    context.meter = Meter(task.profile, judged, source.context_length, bench.trimmed, reads=reads)


def _apply(context: _Context, index: int, step: Step) -> None:
    started = time.monotonic()
    applied = step.apply(context.module, context.benches[index])
    seconds = time.monotonic() - started
    context.module = applied.module
    details = dict(applied.details)
    training = details.pop("training", None)
    if training is not None:
        seconds = training.pop("seconds", seconds)
    before, context.figures = context.figures, _measure(context, context.benches[index])
    done = {**step_settings(step), "details": details, "before": before, "after": context.figures}
    if training is not None:
        done["training"] = training
    if context.rehearsal:
        done["seconds"] = seconds
    recipe = context.task.recipe
    if recipe.max_kl is not None and step is recipe.steps[-1]:
        done["promise"] = {"recipe": recipe.name, "max_kl": recipe.max_kl}
    context.done.append(done)


def _measure(context: _Context, bench: Workbench) -> dict[str, Any]:
    """Figures of the current module; empty in all processes but the first."""
    return dataclasses.asdict(context.meter.measure(context.module, bench)) if is_first() else {}


def _record(context: _Context) -> Record:
    """The record of this compression. A model that was compressed before keeps its first source and earlier steps."""
    earlier = read_record(context.task.folder)
    steps = (*(earlier.steps if earlier else ()), *context.done)
    recipe = f"{earlier.recipe}, {context.task.recipe.name}" if earlier else context.task.recipe.name
    return Record(context.source.source, context.source.name, recipe, steps)


def compress_model(
    config: ExportConfig,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
    measuring: Measuring = EVERYTHING,
) -> Record:
    """Compress a model to a folder. Atomic: the folder appears complete, or not at all.

    config: needs `compress` and `out`; sizes are computed for its target's scheme. Checkpoints of training steps stay
    in OUT.checkpoints until the folder is complete. Of several processes, the first one writes. Raises: as
    `compress_folder`; OutputError.
    """
    task, out = _task(config, measuring)
    checkpoints = checkpoint_folder(out)
    if not is_first():
        record = compress_folder(task, out, checkpoints, progress, say)
        wait_for_all()
        return record
    with place.partial_folder(out) as work:
        result = work / "model"
        result.mkdir()
        record = compress_folder(task, result, checkpoints, progress, say)
        place.put_in_place(result, out)
    wait_for_all()
    shutil.rmtree(checkpoints, ignore_errors=True)
    return record


def rehearse(
    config: ExportConfig,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
    measuring: Measuring = EVERYTHING,
) -> Record:
    """Record of what `compress_model` would do, without writing anything: for each step the parameters and bytes after
    it, and its `seconds` without measuring and writing.

    Steps that cut do so in memory. Training steps compute one row to estimate their time and leave the weights as they
    are, so a step after a training may choose differently than in the real run. Raises: as `compress_model`.
    """
    task, out = _task(config, measuring)
    context = _Context(task, checkpoint_folder(out), say, rehearsal=True)
    _apply_all(context, progress)
    return _record(context)


def _task(config: ExportConfig, measuring: Measuring) -> tuple[Task, Path]:
    """The task and output folder of a configuration. Checks recipe, paths and passages before the model is loaded."""
    if config.compress is None or config.out is None:
        raise RecipeError(
            "a compression needs a recipe and an output folder: ExportConfig(model, compress=RECIPE, out=FOLDER)"
        )
    recipe, profile, out = load_recipe(config.compress), config.profile(), config.out
    folder = find_source(config.model, config.revision)
    place.check_output(out, config.force, RECORD_NAME)
    if measuring.passages is not None:
        read_texts(measuring.passages, measuring.count)
    return Task(config.model, folder, recipe, profile, config.compression_texts(), measuring), out


def checkpoint_folder(out: Path) -> Path:
    """Folder for the checkpoints of a compression, or of an export with a recipe, that writes to `out`."""
    return out.with_name(f"{out.name}.checkpoints")
