"""A model and a recipe to a compressed folder: the steps one after another, each measured before and after."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...targets import Profile
from ..config import ExportConfig
from ..errors import RecipeError
from ..output import place
from ..source.finding import find_source
from ..source.loading import SourceModel, describe_source, load_module
from ..stages import Progress, Stages
from .folder import RECORD_NAME, Record, read_record, write_compressed
from .measure import Meter
from .processes import is_first, wait_for_all
from .recipe import Recipe, load_recipe, step_settings
from .steps import Step, Workbench, step_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Task:
    """What is compressed. model: as the user named it; folder: where it is; profile: of the target that the figures are
    measured for; text: to measure on, and to decide what matters."""

    model: str
    folder: Path
    recipe: Recipe
    profile: Profile
    text: str


@dataclass
class _Context:
    """What the stages hand on."""

    task: Task
    out: Path
    checkpoints: Path
    say: Callable[[str], None]
    module: PreTrainedModel = field(init=False)  # load
    source: SourceModel = field(init=False)  # load
    bench: Workbench = field(init=False)  # load
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
    """Apply a recipe and fill `out`, an empty folder, as `folder.py` describes it.

    checkpoints: folder for what long steps keep, which may outlive the run; say: takes lines about how far a long step
    is. Of several processes the first one alone measures and writes; the others' records have no figures. Raises:
    SourceError, RecipeError, TraceError, OSError, StageError.
    """
    context = _Context(task, out, checkpoints, say)
    stages = Stages(f"{task.model} with recipe {task.recipe.name}", progress)
    with stages.stage("load"):
        _load(context)
    for index, step in enumerate(task.recipe.steps):
        with stages.stage(f"{index + 1}: {step_name(step)}"):
            _apply(context, index, step)
    with stages.stage("write"):
        _write(context)
    return _record(context)


def _load(context: _Context) -> None:
    task = context.task
    context.module = load_module(task.folder)
    context.source = source = describe_source(task.model, task.folder, context.module)
    # Without special tokens, as the runtime's tokenizer gives them to the gate of an export.
    ids = source.tokenizer(task.text, add_special_tokens=False)["input_ids"]
    if len(ids) < 2:
        raise RecipeError(f"the text has {len(ids)} tokens, too few to compress by: give a longer one with --text")
    context.bench = Workbench(
        ids, source.tokenizer, task.folder, context.checkpoints, source.context_length, context.say
    )
    context.meter = Meter(task.profile, ids, source.context_length, context.out / "measured")
    context.figures = _measure(context)


def _apply(context: _Context, index: int, step: Step) -> None:
    bench = dataclasses.replace(
        context.bench,
        checkpoints=context.checkpoints / f"{index + 1}-{step_name(step)}",
        before=tuple(step_settings(earlier) for earlier in context.task.recipe.steps[:index]),
    )
    applied = step.apply(context.module, bench)
    context.module = applied.module
    before, context.figures = context.figures, _measure(context)
    context.done.append(
        {
            **step_settings(step),
            "details": applied.details,
            "before": before,
            "after": context.figures,
        }
    )


def _measure(context: _Context) -> dict[str, Any]:
    """Figures of the module as it is; none in a process that another one measures for."""
    return dataclasses.asdict(context.meter.measure(context.module)) if is_first() else {}


def _write(context: _Context) -> None:
    if is_first():
        write_compressed(context.module, context.source.tokenizer, _record(context), context.out)


def _record(context: _Context) -> Record:
    """A model that was compressed before keeps its first source, and the steps that led here."""
    earlier = read_record(context.task.folder)
    steps = (*(earlier.steps if earlier else ()), *context.done)
    recipe = f"{earlier.recipe}, {context.task.recipe.name}" if earlier else context.task.recipe.name
    return Record(context.source.source, context.source.name, recipe, steps)


def compress_model(
    config: ExportConfig, progress: Progress | None = None, say: Callable[[str], None] = lambda _: None
) -> Record:
    """Compress a model to a folder. Either the whole folder is in place afterwards, or nothing is.

    config: with `compress` and `out`; its target's scheme is what the figures are measured with. What long steps keep,
    to go on after an interruption, is beside the folder, in OUT.checkpoints, until the folder is done. Of several
    processes the first one writes. Raises: as `compress_folder`; OutputError.
    """
    if config.compress is None or config.out is None:
        raise RecipeError("a compression needs a recipe and a place: ExportConfig(model, compress=RECIPE, out=FOLDER)")
    recipe, profile, out = load_recipe(config.compress), config.profile(), config.out
    folder = find_source(config.model, config.revision)
    place.check_output(out, config.force, RECORD_NAME)
    task = Task(config.model, folder, recipe, profile, config.read_text())
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


def checkpoint_folder(out: Path) -> Path:
    """Where a compression, or an export with a recipe, to `out` keeps what it can go on from."""
    return out.with_name(f"{out.name}.checkpoints")
