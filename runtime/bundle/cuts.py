"""Whether a bundle may use what cuts a text into other steps: batches, the prefix cache, draft tokens.

They are used where they change no bit of an answer (`Manifest.exact_under_cuts`). With `load(..., exact=False)` the
caller also accepts equal arithmetic: the same formulas, whose sums round in another order.
"""

from __future__ import annotations

from .folder import Bundle
from .manifest import Manifest

# Its activations are quantized by one scale for a whole step, so what else is in the step changes an answer.
_SCALED_BY_STEP = "int8-tensor"


def equal_arithmetic(manifest: Manifest) -> bool:
    """Whether a token is computed by the same formulas wherever the text is cut and whatever else is computed."""
    model = manifest.model
    known = manifest.quantization.scheme not in (_SCALED_BY_STEP, "unknown")
    return known and model.cache_layout == "in_place" and not model.states


def may_cut(bundle: Bundle) -> bool:
    """Whether the prefix cache and draft tokens may be used."""
    return bundle.manifest.exact_under_cuts or accepts_roundings(bundle)


def accepts_roundings(bundle: Bundle) -> bool:
    """Whether the caller accepts other roundings, and other roundings are all that would change."""
    return not bundle.exact and equal_arithmetic(bundle.manifest)


def what_is_off(manifest: Manifest) -> str | None:
    """One sentence that says what is off for a bundle and how to switch it on; None if nothing is off."""
    if manifest.exact_under_cuts:
        return None
    lost = "batches, kept prefixes and draft tokens are off, since they would change"
    if not equal_arithmetic(manifest):
        return f"{lost} answers"
    return (
        f"{lost} roundings: load(..., exact=False) and --inexact have them, and where two tokens are almost equally "
        "likely, an answer may be another one then"
    )
