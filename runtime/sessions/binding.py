"""onnxruntime's I/O binding, with references to what is bound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kv_cache import DeviceCache


class Binding:
    """Inputs and outputs of one graph. Binds only what changed, and keeps references: onnxruntime itself keeps only
    addresses."""

    def __init__(self, inference: Any, device: str = "cpu") -> None:
        """device: the device of onnxruntime's values; arrays are in the host's memory."""
        self._inference = inference
        self._device = device
        self._binding = inference.io_binding()
        self._held: dict[str, Any] = {}
        self._cache: object = None

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Bind an input to an array for all steps. Later changes of its contents are seen."""
        if self._held.get(name) is not array:
            self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._held[name] = array

    def put_once(self, name: str, array: NDArray[Any]) -> None:
        """As `put`, for an array that is new in each step: 20 microseconds instead of 55."""
        self._binding.bind_cpu_input(name, array)
        self._held[name] = array

    def take(self, name: str, array: NDArray[Any]) -> None:
        """Bind an output to an array."""
        if self._held.get(name) is not array:
            self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._held[name] = array

    def put_value(self, name: str, value: Any, shape: tuple[int, ...]) -> None:
        """Bind an int64 input to the beginning of an onnxruntime value on the device."""
        self._binding.bind_input(name, self._device, 0, np.int64, shape, value.data_ptr())
        self._held[name] = value

    def cache(self, version: object, buffers: Iterable[tuple[str, NDArray[Any]]]) -> None:
        """Bind the KV cache as past and present, in place. version: nothing is done if it is the last call's."""
        if version == self._cache:
            return
        for name, buffer in buffers:
            self.put(f"past_key_values.{name}", buffer)
            self.take(f"present.{name}", buffer)
        self._cache = version

    def device_cache(self, cache: DeviceCache) -> None:
        """As `cache`, in the device's memory."""
        if cache.mask is not self._cache:
            cache.bind(self._binding)
            self._held["cache"] = cache.values
            self._cache = cache.mask

    def run(self, options: Any = None) -> None:
        """Compute a step. Raises: what onnxruntime raises."""
        self._inference.run_with_iobinding(self._binding, options)

    def close(self) -> None:
        """Drop the graph and everything that is bound. Calling it again does nothing."""
        self._inference = self._binding = None
        self._held = {}
