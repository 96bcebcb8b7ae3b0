"""Which execution provider of onnxruntime a bundle runs on, and what to do where it is not there.

A bundle names the provider that it was made for. A bundle for a GPU also runs on the CPU, slowly, when it is told to:
nobody should wait for an answer without knowing why. A bundle for a CPU runs on any CPU.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from ..bundle.manifest import Manifest
from ..errors import MemoryShortageError, SessionError, SettingsError, shown

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# Names that a user gives.
PROVIDERS = {"cpu": CPU, "cuda": CUDA}
_DEVICES = {CUDA: "cuda"}
_INSTALL = "pip uninstall onnxruntime  and then  pip install onnxruntime-gpu"
_GPUS = Path("/proc/driver/nvidia/gpus")
# What CUDA, onnxruntime's allocators and C++ say when memory is full.
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

    Raises: SettingsError for another name, SessionError for a provider that is not there, or that cannot run this
    bundle.
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
    """onnxruntime falls back to the CPU without an error where CUDA's libraries or the GPU are missing.

    used: the providers of the session that was made. Raises: SessionError.
    """
    if provider not in used:
        raise SessionError(
            f"onnxruntime has a {provider} and could not start it: see that  nvidia-smi  shows a GPU, and that CUDA "
            "and cuDNN are those that onnxruntime-gpu was built with (pip install onnxruntime-gpu[cuda,cudnn]), or "
            "run on the CPU, slowly, with provider cpu"
        )


def foreign_machine(manifest: Manifest) -> str | None:
    """In words, that a bundle for CPUs was made for another kind of CPU than this one; None where it was not.

    It runs all the same: the operators are the same ones, and the settings were chosen for another machine.
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
    """onnxruntime's name of the device whose memory a provider computes in, None for the CPU's own."""
    return _DEVICES.get(provider)


def mapped_step_error(reason: str, doing: str, remedy: str) -> SessionError | MemoryShortageError:
    """What onnxruntime said in a step, as one of ours. doing: "a step of 3 tokens at position 7"."""
    reason = " ".join(reason.split())
    if any(words in reason.lower() for words in _SHORTAGE):
        return MemoryShortageError(
            f"{doing} takes more memory than there is: {reason}; start a new conversation, shorten the prompt, close "
            "other programs that use the memory or the GPU, or export a smaller model"
        )
    return SessionError(f"{doing} failed: {reason}; {remedy}")


def gpu_names() -> tuple[str, ...]:
    """The GPUs as NVIDIA's driver for Linux names them; none where it tells nothing."""
    found = []
    for file in sorted(_GPUS.glob("*/information")):
        lines = file.read_text(errors="replace").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return tuple(found)
