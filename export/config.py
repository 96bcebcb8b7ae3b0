"""The configuration of an export: a frozen dataclass that takes its defaults from the target."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from ..runtime.host.files import NoTextError, read_text
from ..targets import Profile, TargetError, load_target, native_target
from ..targets.abilities import KV_TYPES, MIXED_SCHEME, SCHEMES, kv_types_with, schemes_with
from .errors import RecipeError
from .texts import Texts, built_in_texts, calibrating_texts, cut_text


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    model: a folder, a hub id (the one case that uses the network), or "builtin:tales"; target: name of a profile or
    path of a TOML file (None: this machine's); scheme, kv: None for the target's defaults; revision: commit, tag or
    branch of a hub id; text: UTF-8 file, one half calibrates and the other judges (None: edgelm's own texts); out:
    folder to write (None: NAME-TARGET in the current folder); force: replace an existing bundle; compress: name of a
    recipe or path of a TOML file (None: no compression); size: largest size of the bundle in bytes; bits: the same as
    bits for each parameter of the model (with either, int4-rowwise chooses 4 to 8 bits for each matrix); max_kl:
    largest mean KL divergence from fp32, in nats a token (None: the target's limit).
    """

    model: str
    target: str | None = None
    scheme: str | None = None
    kv: str | None = None
    revision: str | None = None
    text: Path | None = None
    out: Path | None = None
    force: bool = False
    compress: str | None = None
    size: int | None = None
    bits: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        """Raises: RecipeError, for an unknown scheme or KV type, and for an impossible size."""
        _check("scheme", self.scheme, SCHEMES)
        _check("kv", self.kv, KV_TYPES)
        if self.size is not None and self.bits is not None:
            raise RecipeError("a size and bits say the same in two ways: give one of them")
        for name, value in (("a size", self.size), ("bits", self.bits), ("a limit of the loss", self.max_kl)):
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"{name} must be more than 0, found {value:g}")
        if self.has_budget and self.scheme not in (None, MIXED_SCHEME):
            raise RecipeError(
                f"a size or bits choose between 4 and 8 bits in {MIXED_SCHEME}, which {self.scheme} cannot: leave the "
                "scheme out, or the budget"
            )

    @property
    def has_budget(self) -> bool:
        """Whether the bits of each matrix are chosen to fit a given size."""
        return self.size is not None or self.bits is not None

    def profile(self) -> Profile:
        """The target's profile. Raises: RecipeError."""
        name = self.target or native_target()
        if name is None:
            raise RecipeError("no target fits this machine: name the machine that the bundle is for with --target")
        try:
            return load_target(name)
        except TargetError as error:
            raise RecipeError(str(error)) from error

    def quantization(self, profile: Profile) -> str:
        """The scheme: the given one, or the target's. Raises: RecipeError, for a scheme or a type of cache that the
        target does not support."""
        scheme = self.scheme or (MIXED_SCHEME if self.has_budget else profile.scheme)
        which = f"{profile.name} computes in {profile.activations}"
        if scheme not in schemes_with(profile.activations):
            known = ", ".join(schemes_with(profile.activations))
            raise RecipeError(f"{which}, which has no scheme {scheme!r}: there is {known}")
        if self.kv is not None and self.kv not in kv_types_with(profile.activations):
            known = " or ".join(kv_types_with(profile.activations))
            raise RecipeError(f"{which}, where a KV cache cannot be {self.kv}: it can be {known}")
        return scheme

    def read_texts(self) -> Texts:
        """The texts that calibrate and those that judge: edgelm's own, or the two halves of the user's. Raises:
        RecipeError."""
        return built_in_texts() if self.text is None else cut_text(self.read_text(), str(self.text))

    def compression_texts(self) -> Texts:
        """As `read_texts`, but of those that come with edgelm all that calibrate. Raises: RecipeError."""
        texts = self.read_texts()
        if self.text is not None:
            return texts
        return dataclasses.replace(texts, calibrating="\n\n".join([*calibrating_texts(), texts.calibrating]))

    def read_text(self) -> str:
        """The user's whole text, or edgelm's own calibrating text. Raises: RecipeError."""
        if self.text is None:
            return built_in_texts().calibrating
        try:
            return read_text(self.text)
        except NoTextError as error:
            raise RecipeError(f"{self.text}: {error.strerror}: convert it, or give another file") from error
        except OSError as error:
            raise RecipeError(f"{self.text} cannot be read ({error.strerror}): give a text file") from error


def _check(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise RecipeError(f"unknown {name} {value!r}: there is {', '.join(known)}")
