"""The reader of target profiles: TOML in, a frozen dataclass out, strictly. Standard library only.

Every key is required and unknown keys are errors, so a spelling mistake never becomes a default. Your own profile may
contain `extends = "x86-cpu"`: missing keys are then taken from that profile.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import platform
import re
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .abilities import ACTIVATIONS, COARSE_SCHEMES, SCHEMES, kv_types_with, lacks, schemes_with

EXTENDS = "extends"
# What torch's exporter writes: the key tells a reader of a manifest, and nobody can choose another.
_OPSET = 20
# Bits a weight of int4-rowwise with all matrices in 4 bits, and in 8.
_FOUR_BITS, _EIGHT_BITS = 4.25, 8.0
# A name is part of a bundle's folder name.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# Keys of the gate that are shares, and their maximum.
_SHARES = {"agreement_percent": 100.0, "answers_percent": 100.0, "decided_margin": 1.0}

T = TypeVar("T")


class TargetError(Exception):
    """A target is unknown, or its file is not a valid profile. The message says which and what to do."""


@dataclass(frozen=True)
class Limits:
    """How far the quantized graph may be from the fp32 graph.

    mean_kl, p99_kl: KL divergence of the next token's distribution in nats, mean and 99th percentile over the judging
    texts; perplexity_increase_percent: on the same texts; agreement_percent: positions where both choose the same
    token, among those where the fp32 graph's first choice leads by at least the gate's `decided_margin` in probability;
    answers_percent: the same along the fp32 graph's greedy answers.
    """

    mean_kl: float
    p99_kl: float
    perplexity_increase_percent: float
    agreement_percent: float
    answers_percent: float


@dataclass(frozen=True)
class Gate(Limits):
    """How far the exported model may be from the original before the export fails.

    logit_difference: largest absolute difference between the fp32 graph's logits and torch's, in units of the largest
    magnitude of torch's logits; decided_margin: see `Limits`; activations_kl: nats a token that activations of 8 bits
    may add to what those of 16 bits lose (row-wise schemes); cache_kl, cache_kl_limit: of an INT8 cache alone, with
    scales that the export fixes, in nats: where ranges are widened, and where the export fails; four_bits_kl: in place
    of mean_kl for weights of 4 bits in all matrices (int4-rowwise).
    """

    logit_difference: float
    decided_margin: float
    activations_kl: float
    cache_kl: float
    cache_kl_limit: float
    four_bits_kl: float

    def of_bits(self, bits: float) -> Gate:
        """The gate of int4-rowwise. bits: mean of all weights, with their scales. The limit of the mean falls from
        four_bits_kl to mean_kl as losses do, by the same factor for each bit."""
        share = min(max((bits - _FOUR_BITS) / (_EIGHT_BITS - _FOUR_BITS), 0.0), 1.0)
        return self.allowing(self.four_bits_kl ** (1 - share) * self.mean_kl**share)

    def allowing(self, mean_kl: float) -> Gate:
        """The gate with another limit of the mean, and wider other limits if needed: one token in 100 may be ten times
        as far, perplexity may rise accordingly, and as many choices may differ."""
        percent = 100 * math.expm1(min(mean_kl, 1))
        return dataclasses.replace(
            self,
            mean_kl=mean_kl,
            p99_kl=max(self.p99_kl, 10 * mean_kl),
            perplexity_increase_percent=max(self.perplexity_increase_percent, percent),
            agreement_percent=max(0.0, self.agreement_percent - percent),
            answers_percent=max(0.0, self.answers_percent - percent),
        )


@dataclass(frozen=True)
class Profile:
    """One target, with every setting resolved.

    provider: onnxruntime's execution provider; activations: their type, float32 or float16; scheme: the default of
    --scheme; weight_bits: 8, or 7 where integer products saturate; kv: {scheme: type of the KV cache}, the default of
    --kv, for each scheme that goes with these activations; opset: ONNX operator set of the graph; coarse_gate: the
    gate's limits for the schemes of `abilities.COARSE_SCHEMES`.
    """

    name: str
    description: str
    machines: tuple[str, ...]
    provider: str
    activations: str
    scheme: str
    weight_bits: int
    kv: dict[str, str]
    opset: int
    gate: Gate
    coarse_gate: Limits

    def gate_of(self, scheme: str) -> Gate:
        """The gate of a scheme; coarse schemes have the limits of `coarse_gate`."""
        if scheme not in COARSE_SCHEMES:
            return self.gate
        return dataclasses.replace(self.gate, **dataclasses.asdict(self.coarse_gate))

    def settings(self) -> dict[str, Any]:
        """All settings as plain data, for a manifest."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("name", "description")}


def available_targets() -> list[str]:
    """Names of the profiles that come with edgelm, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def native_target() -> str | None:
    """The name of the target for this machine, or None."""
    machine = platform.machine().lower()
    return next((name for name in available_targets() if machine in load_target(name).machines), None)


def load_target(name: str) -> Profile:
    """Read a profile by name, or from a path that ends in .toml. Raises: TargetError."""
    path = profile_path(name)
    profile = _build(Profile, _extended(_read(path), path), path, "")
    _check(profile, path)
    return profile


def profile_path(name: str) -> Path:
    """The file of a profile by name, or the path itself if it ends in .toml. Raises: TargetError."""
    path = Path(name) if name.endswith(".toml") else _folder() / f"{name}.toml"
    if not path.is_file() or (not name.endswith(".toml") and name not in available_targets()):
        near = difflib.get_close_matches(name, available_targets(), 1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"there is {', '.join(available_targets())}, or a path of a .toml file"
        )
        missing = f"{path} is not a file; " if name.endswith(".toml") else ""
        raise TargetError(f"unknown target {name!r}: {missing}{hint}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TargetError(f"{path} cannot be read as TOML ({error})") from error


def _extended(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """A profile merged over the one that it extends, table by table."""
    if EXTENDS not in data:
        return data
    own = {key: value for key, value in data.items() if key != EXTENDS}
    base = data[EXTENDS]
    if base not in available_targets():
        raise TargetError(f"{path}: {EXTENDS} must be one of {', '.join(available_targets())}, found {base!r}")
    if "name" not in own:
        raise TargetError(f"{path}: key name is missing: a profile that extends {base} has a name of its own")
    whole = _read(profile_path(base))
    for key, value in own.items():
        tables = isinstance(value, dict) and isinstance(whole.get(key), dict)
        whole[key] = {**whole[key], **value} if tables else value
    return whole


def _folder() -> Path:
    return Path(__file__).parent


def _build(cls: type[T], data: dict[str, Any], path: Path, where: str) -> T:
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            raise TargetError(f"{path}: unknown key {where}{key}" + (f", did you mean {near[0]}?" if near else ""))
    missing = sorted(set(hints) - set(data))
    if missing:
        raise TargetError(f"{path}: key {where}{missing[0]} is missing")
    return cls(**{key: _value(hint, data[key], path, f"{where}{key}") for key, hint in hints.items()})


def _value(hint: Any, value: Any, path: Path, where: str) -> Any:
    # A NaN limit would refuse everything, an infinite one nothing: both are mistakes.
    if isinstance(value, float) and not math.isfinite(value):
        raise TargetError(f"{path}: {where} must be a finite number, found {value}")
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(typing.cast("type[Any]", hint), value, path, f"{where}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return value
    if isinstance(hint, type) and isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise TargetError(f"{path}: {where} has the wrong type: found {value!r}")


def _check(profile: Profile, path: Path) -> None:
    _check_gate("gate", profile.gate, path)
    _check_gate("coarse_gate", profile.coarse_gate, path)
    if not _NAME.fullmatch(profile.name):
        raise TargetError(
            f"{path}: name must be of a to z, 0 to 9, '.', '_' and '-', and begin with a letter or a digit, "
            f"found {profile.name!r}"
        )
    if profile.activations not in ACTIVATIONS:
        raise TargetError(f"{path}: activations must be {' or '.join(ACTIVATIONS)}, found {profile.activations!r}")
    missing = lacks(profile.provider, profile.activations)
    if missing is not None:
        raise TargetError(f"{path}: {missing}")
    schemes, kinds = schemes_with(profile.activations), kv_types_with(profile.activations)
    if profile.scheme not in schemes:
        what = "is unknown" if profile.scheme not in SCHEMES else f"goes not with {profile.activations} activations"
        raise TargetError(f"{path}: scheme {profile.scheme!r} {what}: there is {', '.join(schemes)}")
    if profile.weight_bits not in (7, 8):
        raise TargetError(f"{path}: weight_bits must be 7 or 8, found {profile.weight_bits}")
    if profile.opset != _OPSET:
        raise TargetError(f"{path}: opset must be {_OPSET}, which all graphs have, found {profile.opset}")
    for scheme in schemes:
        if profile.kv.get(scheme) not in kinds:
            raise TargetError(
                f"{path}: kv.{scheme} must be one of {', '.join(kinds)}, found {profile.kv.get(scheme)!r}"
            )
    unknown = sorted(set(profile.kv) - set(schemes))
    if unknown:
        raise TargetError(f"{path}: unknown key kv.{unknown[0]}")


def _check_gate(table: str, limits: Limits, path: Path) -> None:
    """Refuse impossible limits: rounding always costs something, and no share exceeds its maximum."""
    for key, value in dataclasses.asdict(limits).items():
        where = f"{path}: {table}.{key}"
        if key in _SHARES:
            if not 0 <= value <= _SHARES[key]:
                raise TargetError(f"{where} must be 0 to {_SHARES[key]:g}, found {value:g}")
        elif value <= 0:
            raise TargetError(f"{where} must be more than 0, which nothing but the original itself meets: {value:g}")
