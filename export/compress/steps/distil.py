"""`distil`: train a smaller model on the predictions of a larger one (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ....runtime.bundle.folder import file_digest
from ...errors import RecipeError
from ..step import Applied, Outlook, Workbench
from ..training.checkpoint import weight_files
from ..training.schedule import Keep, Schedule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OWN_TEXT = "own_text.json"


@dataclass(frozen=True)
class Distil(Schedule):
    """See `Schedule`. teacher: folder, hub id or `builtin:` name (None: the uncompressed source); student: the same, of
    a model that replaces the current one (None: train the current one); temperature: T, which divides both models'
    logits; alpha: weight of the teacher in the loss, alpha * T^2 * KL + (1 - alpha) * cross-entropy; own_text: number
    of tokens that the teacher generates as additional training text."""

    KEEPS: ClassVar[Keep] = "kl"

    teacher: str | None = None
    student: str | None = None
    temperature: float = 2.0
    alpha: float = 0.9
    own_text: int = 0

    def __post_init__(self) -> None:
        """Raises: RecipeError."""
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise RecipeError(f"temperature must be above 0, found {self.temperature}")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha must be 0 to 1, found {self.alpha}")
        if self.own_text < 0:
            raise RecipeError(f"own_text must be 0 or more, found {self.own_text}")

    def check(self, outlook: Outlook) -> None:
        """See `Checked`. Also checks that teacher and student exist and have the model's tokenizer."""
        super().check(outlook)
        self._folders(outlook.bench)

    def _folders(self, bench: Workbench) -> dict[str, Path]:
        named = (("teacher", self.teacher), ("student", self.student))
        return {what: _find(what, name, bench) for what, name in named if name is not None}

    def apply(self, module: PreTrainedModel, bench: Workbench) -> Applied:
        """See `Step`."""
        import copy

        from ...source.loading import load_module
        from ..training.train import distillation, next_token, train

        folders = self._folders(bench)
        student = load_module(folders["student"]) if "student" in folders else copy.deepcopy(module)
        _check_fit(student, module, "student", bench)
        if self.alpha == 0:
            return Applied(student, train(self, student, student, next_token, bench, *folders.values()))
        if "teacher" in folders:
            named = load_module(folders["teacher"])
            _check_fit(named, module, "teacher", bench)
        teacher: torch.nn.Module = named if "teacher" in folders else bench.reference()
        teacher.requires_grad_(False)
        loss = distillation(teacher, self.temperature, self.alpha)
        own = self._own_text(teacher, folders.get("teacher", bench.source), bench)
        return Applied(student, train(self, student, student, loss, bench, *folders.values(), more=own))

    def _own_text(self, teacher: torch.nn.Module, folder: Path, bench: Workbench) -> list[int]:
        """Token ids that the teacher generates. An interrupted run's text is reused. folder: the teacher's."""
        from ..training.own_text import keep_own_text

        if not self.own_text or bench.rehearsal:
            return []
        length = self.row_length(bench.context_length) + 1
        return keep_own_text(
            bench.checkpoints / _OWN_TEXT,
            [self.own_text, length, list(bench.token_ids), [file_digest(path) for path in weight_files(folder)]],
            lambda: self._write(teacher, bench, length),
        )

    def _write(self, teacher: Any, bench: Workbench, length: int) -> list[int]:
        """New own text. A source whose vocabulary was trimmed writes with all its tokens."""
        from ...source.tokenizer import load_tokenizer
        from ..training.own_text import write_own_text
        from ..vocabulary.trimmed import InRemaining

        if not isinstance(teacher, InRemaining):
            return write_own_text(teacher, bench.tokenizer, bench.token_ids, self.own_text, length)
        trimmed, tokenizer = teacher.trimmed, load_tokenizer(bench.source)
        starts = [trimmed.kept[token] for token in bench.token_ids]
        return trimmed.split(write_own_text(teacher.source, tokenizer, starts, self.own_text, length))


def _find(what: str, name: str, bench: Workbench) -> Path:
    """The folder of a model. Raises: SourceError; RecipeError if its tokenizer differs from the model's."""
    import transformers

    from ...source.finding import find_source

    folder = find_source(name, None)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a missing file surfaces as OSError, ValueError, TypeError or KeyError
        raise RecipeError(f"the tokenizer of {what} = {name!r} cannot be loaded ({error})") from error
    if _written(tokenizer) != _written(bench.tokenizer):
        raise RecipeError(f"{what} = {name!r} has another tokenizer than the model: they must be the same")
    return folder


def _written(tokenizer: PreTrainedTokenizerBase) -> object:
    """Everything that determines a fast tokenizer's token ids; the vocabulary of a tokenizer in Python."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer.get_vocab() if fast is None else fast.to_str()


def _check_fit(model: PreTrainedModel, module: PreTrainedModel, what: str, bench: Workbench) -> None:
    sizes = [int(item.config.get_text_config().vocab_size) for item in (model, module)]
    if sizes[0] != sizes[1]:
        raise RecipeError(f"the {what} has a vocabulary of {sizes[0]}, the model of {sizes[1]}: they must be the same")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < bench.context_length:
        raise RecipeError(
            f"the {what}'s context has {context} tokens, the model's {bench.context_length}: it must not be shorter"
        )
