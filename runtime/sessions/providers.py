"""Choose onnxruntime's execution provider for a bundle, and say what to do if it is missing.

A bundle names the provider that it was made for. A bundle for a GPU runs on the CPU only if asked to, since it is slow
there and the user should know why. A bundle for a CPU runs on any CPU.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from ..bundle.manifest import Manifest
from ..errors import MemoryShortageError, SessionError, SettingsError, shown

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# The names for users.
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
_DEVICES = {CUDA: "cuda"}
_INSTALL = "pip uninstall onnxruntime  and then  pip install onnxruntime-gpu"
_GPUS = Path("/proc/driver/nvidia/gpus")
# Words of CUDA, onnxruntime's allocators and C++ for lack of memory.
_SHORTAGE = (
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "failed to allocate memory",
    "cudaerrormemoryallocation",
    "bfcarena",
)


def made_for(manifest: Manifest) -> str:
    """The provider that a bundle was made for."""
    return str(manifest.target.settings.get("provider", CPU))


def choose_provider(manifest: Manifest, asked: str | None, available: Sequence[str]) -> str:
    """The provider to run a bundle on. asked: "cpu", "cuda" or None for the bundle's own; available: onnxruntime's.

    Raises: SettingsError for an unknown name, SessionError for a provider that is missing or cannot run this bundle.
    """
    if asked is not None and asked not in tuple(PROVIDERS):
        raise SettingsError(f"provider must be {' or '.join(PROVIDERS)}, found {shown(asked)}")
    own = made_for(manifest)
    wanted = PROVIDERS[asked] if asked is not None else own
    target = manifest.target.name
    if wanted == CUDA != own:
        raise SessionError(
            f"this bundle was made for {target}, and its operators have no kernels on a GPU: export the model with  "
            "--target cuda"
        )
    if wanted in available:
        return wanted
    if wanted == CUDA:
        raise SessionError(
            f"this bundle was made for {target}, an NVIDIA GPU, and the onnxruntime here has no {CUDA}: run  "
            f"{_INSTALL},  or run it on the CPU, slowly, with provider cpu"
        )
    raise SessionError(
        f"this bundle was made for {target}, and the onnxruntime here has no {wanted}: install the onnxruntime package "
        f"that has it, or run it with provider cpu (here are {', '.join(available)})"
    )


def require_used(provider: str, used: Sequence[str]) -> None:
    """Check that a session uses a provider: without CUDA's libraries or a GPU, onnxruntime silently falls back to the
    CPU.

    used: the providers of the session that was made. Raises: SessionError.
    """
    if provider not in used:
        raise SessionError(
            f"onnxruntime has a {provider} and could not start it: see that  nvidia-smi  shows a GPU, and that CUDA "
            "and cuDNN are those that onnxruntime-gpu was built with (pip install onnxruntime-gpu[cuda,cudnn]), or "
            "run on the CPU, slowly, with provider cpu"
        )


def foreign_machine(manifest: Manifest) -> str | None:
    """A warning if a bundle for CPUs was made for another kind of CPU than this one; else None.

    It still runs: the operators are the same, only the settings were chosen for another machine.
    """
    machines = manifest.target.settings.get("machines") or ()
    here = platform.machine().lower()
    if made_for(manifest) != CPU or not machines or here in machines:
        return None
    return (
        f"this bundle was made for {manifest.target.name}, and this is {here}: it runs, perhaps not as fast as one for "
        "this machine would"
    )


def device_of(provider: str) -> str | None:
    """onnxruntime's name of a provider's device, None for the CPU."""
    return _DEVICES.get(provider)


def mapped_step_error(reason: str, doing: str, remedy: str) -> SessionError | MemoryShortageError:
    """Map onnxruntime's error message of a step to our error. doing: such as "a step of 3 tokens at position 7"."""
    reason = " ".join(reason.split())
    if any(words in reason.lower() for words in _SHORTAGE):
        return MemoryShortageError(
            f"{doing} takes more memory than there is: {reason}; start a new conversation, shorten the prompt, close "
            "other programs that use the memory or the GPU, or export a smaller model"
        )
    return SessionError(f"{doing} failed: {reason}; {remedy}")


def gpu_names() -> tuple[str, ...]:
    """The GPUs' names as NVIDIA's driver for Linux reports them; empty without it."""
    found = []
    for file in sorted(_GPUS.glob("*/information")):
        lines = file.read_text(errors="replace").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return tuple(found)
