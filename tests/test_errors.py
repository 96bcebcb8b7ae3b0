"""The exception tree; every exception of onnxruntime becomes one of edgelm."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from edgelm.runtime import EdgelmError, errors
from edgelm.runtime.bundle.manifest import CacheType, LayerCache, Model
from edgelm.runtime.errors import MissingExtraError, SessionError
from edgelm.runtime.host.ort import load_onnxruntime, mapped_errors, onnxruntime_errors
from edgelm.runtime.sessions.in_place import OrtSession

TREE = {
    "EdgelmError": "Exception",
    "BundleError": "EdgelmError",
    "BundleMissingError": "BundleError",
    "BundleCorruptError": "BundleError",
    "BundleVersionError": "BundleError",
    "BundleUnsupportedError": "BundleError",
    "InputError": "EdgelmError",
    "PromptError": "InputError",
    "ContextLengthError": "InputError",
    "SettingsError": "InputError",
    "TemplateError": "EdgelmError",
    "EngineError": "EdgelmError",
    "EngineBusyError": "EngineError",
    "EngineClosedError": "EngineError",
    "SessionError": "EdgelmError",
    "MemoryShortageError": "EdgelmError",
    "CacheError": "EdgelmError",
    "CacheCorruptError": "CacheError",
    "CacheVersionError": "CacheError",
    "VerificationError": "EdgelmError",
    "MissingExtraError": "EdgelmError",
}


def public_classes(module: Any) -> dict[str, type[BaseException]]:
    return {
        name: item
        for name, item in vars(module).items()
        if inspect.isclass(item) and issubclass(item, BaseException) and item.__module__ == module.__name__
    }


def pybind_errors() -> list[type[Exception]]:
    load_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return [item for item in vars(state).values() if inspect.isclass(item) and issubclass(item, Exception)]


def test_the_tree_matches_its_drawing() -> None:
    assert {name: item.__bases__[0].__name__ for name, item in public_classes(errors).items()} == TREE
    assert all(name in str(errors.__doc__) for name in TREE)
    assert all(issubclass(item, EdgelmError) for item in public_classes(errors).values())


def test_every_exception_of_the_exporter_joins_the_tree() -> None:
    from edgelm.export import errors as export_errors

    own = public_classes(export_errors)
    assert own
    assert all(issubclass(item, EdgelmError) for item in own.values())


def test_every_exception_says_in_a_docstring_when_it_is_raised() -> None:
    assert [name for name, item in public_classes(errors).items() if not item.__dict__.get("__doc__")] == []


def test_a_missing_extra_names_the_pip_command() -> None:
    assert 'pip install "edgelm[export]"' in str(MissingExtraError("exporting", "export"))


def test_no_exception_class_of_onnxruntime_is_missed() -> None:
    own = pybind_errors()
    assert len(own) >= 10
    assert set(own) <= set(onnxruntime_errors())
    assert {RuntimeError, ValueError} <= set(onnxruntime_errors())


def test_each_exception_of_onnxruntime_is_mapped() -> None:
    for kind in onnxruntime_errors():
        original = kind("first line\n  second line")
        with pytest.raises(SessionError) as caught, mapped_errors("could not do it", "try again"):
            raise original
        assert str(caught.value) == "could not do it: first line second line; try again"
        assert caught.value.__cause__ is original


@pytest.mark.parametrize("error", [SessionError("ours"), KeyError("k"), KeyboardInterrupt(), AssertionError("bug")])
def test_other_exceptions_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, mapped_errors("doing", "remedy"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "content", [b"", b"garbage", bytes(range(256)), b"\x08\x07\x12\x04fake"], ids=["empty", "text", "bytes", "protobuf"]
)
def test_an_invalid_graph_gives_a_session_error(tmp_path: Path, content: bytes, without_kernels: None) -> None:
    """Without kernels: with them, edgelm reads the graph first and reports that it is damaged."""
    graph = tmp_path / "model.onnx"
    graph.write_bytes(content)
    with pytest.raises(SessionError) as caught:
        OrtSession(graph, Model(10, 16, 0, (LayerCache(1, 4, 4, None),), CacheType("int8", None)), 1)
    assert str(graph) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_provider_that_is_not_here_gives_a_session_error(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="NoSuchExecutionProvider"):
        OrtSession(
            tmp_path / "model.onnx", Model(10, 16, 0, (), CacheType("int8", None)), 1, ["NoSuchExecutionProvider"]
        )


def test_onnxruntime_is_loaded_with_its_usage_reports_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    load_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
