"""The report of an export: its figures, its page, and `edgelm inspect --report`."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import webbrowser
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgelm.export.output.charts import Row, bars
from edgelm.export.output.report import part_bytes
from edgelm.export.output.report_html import page
from edgelm.export.passes.functions import EDGELM, NORMED_ROWWISE_MATMUL, define
from edgelm.export.passes.graph import MICROSOFT
from edgelm.runtime.bundle.figures import bytes_text, change_text, main_figures
from edgelm.runtime.bundle.side_by_side import cut, examples
from edgelm.runtime.cli import main

from .conftest import TEXT, WIDE_TARGET
from .test_passes import graph

Report = dict[str, Any]


@pytest.fixture
def report(tiny_bundle: Path) -> Report:
    return read_report(tiny_bundle)


@pytest.fixture(scope="module")
def fp32_bundle(export_tiny: Callable[..., Path]) -> Path:
    return export_tiny(scheme="fp32")


def read_report(bundle: Path) -> Report:
    data: Report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    return data


def words_of(html: str) -> str:
    """The text of a page as a reader sees it; fails if the page is not well-formed."""
    body = ET.fromstring(html).find("{*}body")  # noqa: S314, our own page
    assert body is not None
    return " ".join(" ".join(body.itertext()).split())


# ---- figures


def test_the_parts_are_all_weights_of_the_graph(tiny_bundle: Path, report: Report) -> None:
    parts = part_bytes(tiny_bundle / "model.onnx")
    assert parts == report["parts"]["after"]
    graph = sum((tiny_bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert 0.5 * graph < sum(parts.values()) < graph
    assert sum(parts.values()) == report["memory"]["after"]["weights_bytes"]


def test_each_weight_is_counted_with_its_part(report: Report) -> None:
    """Two layers, hidden size 64, MLP 96, 4 heads and 2 KV heads of 16, a tied vocabulary of 257, in fp32."""
    before, after = report["parts"]["before"], report["parts"]["after"]
    assert before["embedding and head"] == 4 * 257 * 64
    assert before["attention"] == 4 * 2 * 64 * (64 + 2 * 32 + 64)
    assert before["MLP"] == 4 * 2 * 3 * 64 * 96
    assert before["norms"] == after["norms"] == 4 * 64  # a fresh model's norms are equal and stored once
    assert after["embedding and head"] == 257 * (64 + 4)
    assert after["MLP"] == 2 * (3 * 64 * 96 + 4 * (2 * 96 + 64))


def test_a_norm_inside_a_product_is_a_norm(tmp_path: Path) -> None:
    """Classified by position, not by name; the matrix and its scales are no norms."""
    weights = {"mlp_w": np.ones((8, 4), np.int8), "mlp_s": np.ones(4, np.float32), "mlp_g": np.ones(8, np.float32)}
    text = "float[b,n,8] x -> float[b,n,4] y"
    body = f"y, total = {EDGELM}.{NORMED_ROWWISE_MATMUL} <epsilon = 0.1> (x, x, mlp_g, mlp_w, mlp_s)"
    model = graph(text, body, weights, (EDGELM, MICROSOFT))
    define(model, NORMED_ROWWISE_MATMUL)
    ir.save(model, tmp_path / "model.onnx")
    parts = part_bytes(tmp_path / "model.onnx")
    assert (parts["norms"], parts["MLP"]) == (4 * 8, 8 * 4 + 4 * 4)


def test_the_cache_is_counted_as_the_runtime_allocates_it(report: Report) -> None:
    values = 2 * 2 * (16 + 16)  # layers, KV heads, key and value
    scales = 2 * 2 * 2 * 4  # with kernels: one per key and value, float32
    assert report["memory"]["after"]["kv_bytes_per_token"] == values + scales
    assert report["memory"]["before"]["kv_bytes_per_token"] == 4 * values
    assert report["memory"]["before"]["kv_bytes_full_context"] == 4 * values * 512


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (100, 101, "the same"),
        (100, 88, "12 % smaller"),
        (100, 112, "12 % larger"),
        (100, 25, "4.0 times smaller"),
        (25, 100, "4.0 times larger"),
        (0, 0, "the same"),
        (0, 5, ""),
    ],
)
def test_changes_are_written_in_words(before: float, after: float, words: str) -> None:
    assert change_text(before, after, "larger", "smaller") == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (3.14e6, "3.1 MB"), (2e9, "2.00 GB")]
)
def test_bytes_are_written_with_a_unit(count: float, words: str) -> None:
    assert bytes_text(count) == words


def test_a_slower_bundle_is_called_worse_and_a_faster_one_better(report: Report) -> None:
    report["speed"]["before"].update(decode_tokens_per_s=100.0, prefill_tokens_per_s=300.0)
    report["speed"]["after"].update(decode_tokens_per_s=200.0, prefill_tokens_per_s=100.0)
    found = {figure.title: figure for figure in main_figures(report)}
    assert (found["Writing an answer"].verdict, found["Writing an answer"].better) == ("2.0 times faster", True)
    assert (found["Reading a prompt"].verdict, found["Reading a prompt"].better) == ("3.0 times slower", False)
    assert found["Weights"].better is True


# ---- the page


def test_the_page_is_a_listed_file_and_holds_the_figures(tiny_bundle: Path, report: Report) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text(encoding="utf-8"))
    html = (tiny_bundle / "report.html").read_text(encoding="utf-8")
    assert manifest["files"]["report.html"]["bytes"] == len(html.encode())
    words = words_of(html)
    for figure in main_figures(report):
        assert figure.title in words and figure.after in words and figure.verdict in words
    for stage in report["stages"]:
        assert stage["name"] in words
    for section in ("Size", "Speed", "Quality", "Memory while it runs", "The export"):
        assert section in words
    assert "Distance by layer" in words


def test_the_page_loads_nothing_and_runs_nothing(tiny_bundle: Path) -> None:
    html = (tiny_bundle / "report.html").read_text(encoding="utf-8")
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    for forbidden in ("http://", "https://", "<script", "@import", "@font-face", "<link", "<img", "src="):
        assert forbidden not in without_namespaces
    for target in re.findall(r'href="([^"]*)"|url\(([^)]*)\)', html):
        assert "".join(target).startswith("#")


def test_the_ids_of_the_page_are_unique(report: Report) -> None:
    ids = re.findall(r'\sid="([^"]*)"', page(report))
    assert len(ids) == len(set(ids)) > 5


def test_the_same_report_gives_the_same_page(report: Report) -> None:
    assert page(copy.deepcopy(report)) == page(report)


def test_a_matplotlibrc_of_the_user_changes_nothing(report: Report) -> None:
    import matplotlib

    expected = page(report)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert page(report) == expected


def test_an_fp32_bundle_has_a_page_without_a_comparison(fp32_bundle: Path) -> None:
    report = read_report(fp32_bundle)
    assert report["against_fp32"] is None
    words = words_of((fp32_bundle / "report.html").read_text(encoding="utf-8"))
    assert "nothing was rounded" in words and bytes_text(report["memory"]["after"]["weights_bytes"]) in words
    for absent in ("Perplexity", "faster", "slower", "smaller", "instead of"):
        assert absent not in words


def test_names_are_escaped(report: Report) -> None:
    report.update(model="<b>x</b>", license='"><script>', sensitivity=[{"name": "<i>&$x$</i>", "kl": 0.5}])
    html = page(report)
    assert "<b>x</b>" not in html and "<script" not in html and "<i>" not in html
    words = words_of(html)
    assert "<b>x</b>" in words and "<i>&$x$</i>" in words


def test_a_model_folder_with_an_odd_name_is_exported(tiny_model: Path, tmp_path: Path) -> None:
    from edgelm.export import ExportConfig, export_model

    text = tmp_path / "text.txt"
    text.write_text(TEXT[:1100], encoding="utf-8")
    model = Path(shutil.copytree(tiny_model, tmp_path / "<b>x & y"))
    done = export_model(ExportConfig(str(model), target=WIDE_TARGET, text=text, out=tmp_path / "out"))
    assert "<b>x & y" in words_of((done.path / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", ["perplexity_increase_percent", "kl"])
def test_sensitive_layers_come_first(report: Report, key: str) -> None:
    report["sensitivity"] = [{"name": f"layer {index}", key: value} for index, value in enumerate((0.1, 0.7, -0.2))]
    words = words_of(page(report))
    assert words.index("layer 1") < words.index("layer 0") < words.index("layer 2")


def test_without_layers_there_is_no_sensitivity_section(report: Report) -> None:
    report["sensitivity"] = []
    assert "Sensitivity" not in words_of(page(report))


# ---- answers, positions, arithmetic


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("Paris.", "Paris.", (("Paris.", "", ""), ("Paris.", "", ""))),
        ("It is here now.", "It is hers now.", (("It is ", "here", " now."), ("It is ", "hers", " now."))),
        ("It ends.", "It ends. No", (("It ends.", "", ""), ("It ends.", " No", ""))),
        ("It ends", "It endsNot", (("It ", "ends", ""), ("It ", "endsNot", ""))),
        ("", "a b", (("", "", ""), ("", "a", " b"))),
    ],
)
def test_answers_are_cut_at_the_first_other_word(before: str, after: str, parts: Any) -> None:
    found = cut(before, after)
    assert tuple((part.same, part.word, part.rest) for part in found) == parts
    assert ["".join(part) for part in parts] == [before, after]


def with_examples(report: Report) -> Report:
    """A report with two prompts; one has answers that differ and contain markup and control characters."""
    report["examples"] = [
        {"prompt": "Capital?", "fp32": "Paris.", "quantized": "Paris."},
        {"prompt": "<i>Why?</i>", "fp32": "Because \x1b[31m of\nred", "quantized": "Because </p><script>x</script>"},
    ]
    return report


def test_answers_stand_side_by_side_and_the_first_difference_is_marked(report: Report) -> None:
    html = page(with_examples(report))
    assert re.findall("<mark>(.*?)</mark>", html) == ["\\x1b[31m", "&lt;/p&gt;&lt;script&gt;x&lt;/script&gt;"]
    assert "<script" not in html and "<i>" not in html and "\x1b" not in html
    words = words_of(html)
    assert "<i>Why?</i>" in words and "both" in words and "Paris." in words


def test_inspect_shows_the_answers(
    tiny_bundle: Path, tmp_path: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = with_report(tiny_bundle, tmp_path, json.dumps(with_examples(report)))
    assert main(["inspect", str(bundle), "--report"]) == 0
    out = capsys.readouterr().out
    for line in (
        "  > Capital?\n      both  Paris.\n",
        "      fp32  Because [\\x1b[31m] of\\nred\n",
        "    bundle  Because [</p><script>x</script>]\n",
    ):
        assert line in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    "examples_found", [None, 3, [1], [{"prompt": "x"}], [{"prompt": 1, "fp32": "", "quantized": ""}]]
)
def test_examples_of_another_version_are_left_out(examples_found: Any) -> None:
    assert examples({"examples": examples_found}) == []


def test_distance_is_shown_by_kind_of_text_and_by_position(report: Report) -> None:
    words = words_of(page(report))
    for kind in report["against_fp32"]["kinds"]:
        assert f"{kind['kind']} {kind['mean_kl']:.2g} {kind['p99_kl']:.2g}" in words
    assert "token 1" in words and "tokens 2 to 16" in words


def test_the_arithmetic_that_was_chosen_is_shown(report: Report) -> None:
    matrices = [("a.weight", 16, 0.5), ("b.weight", 8, 0.25), ("c.weight", 8, 0.125)]
    report["arithmetic"] = {
        "matrices": [
            {"name": name, "activations": bits, "kl_if_8": kl, "multiply_adds": 4} for name, bits, kl in matrices
        ],
        "kl_all_16": 0.001,
        "kl_chosen": 0.002,
        "multiply_adds_saved_percent": 33.3,
    }
    words = words_of(page(report))
    assert words.index("a.weight") < words.index("b.weight") < words.index("c.weight")
    assert "5.0e-01, 16 bits" in words and "2.5e-01, 8 bits" in words
    assert "1 of 3 groups have activations of 16 bits" in words and "save 33 % of a prompt's multiply-adds" in words
    figure = next(figure for figure in main_figures(report) if figure.title == "Activations of 16 bits")
    assert (figure.after, figure.verdict) == ("1 of 3 matrices", "33 % of the multiply-adds saved")


def test_arithmetic_that_was_not_measured_has_no_chart(report: Report, recwarn: pytest.WarningsRecorder) -> None:
    report["arithmetic"] = {"matrices": [], "kl_chosen": 0.0, "multiply_adds_saved_percent": 0.0}
    assert "What activations of 8 bits would cost" not in page(report)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def texts_of(svg: str) -> list[tuple[float, float, str]]:
    """Left edge, height and words of each text in a drawing, in the drawing's units."""
    found = []
    for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):  # noqa: S314, our own drawing
        style = dict(part.strip().split(": ", 1) for part in element.attrib["style"].split(";") if ":" in part)
        size = float(style["font-size"].removesuffix("px"))
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        words = element.text or ""
        left = x - 0.6 * size * len(words) if style.get("text-anchor") == "end" else x
        found.append((left, y, words))
    return found


def test_long_names_do_not_overlap_their_figures() -> None:
    """The label ends before the value begins, with 0.6 of the font size a character, and is not truncated."""
    names = [
        "short",
        "model.layers.10.self_attn.q_proj.weight+k_proj+v_proj",
        "model.layers.10.mlp.gate_proj.weight+up_proj",
        "x" * 300,
    ]
    svg = bars("b", "d", [Row(name, "1.23e-04, 16 bits", [(0.5, "after")]) for name in names])
    found = texts_of(svg)
    values = [item for item in found if item[2].endswith("bits")]
    labels = [item for item in found if not item[2].endswith("bits")]
    assert len(values) == 4
    for left, height, _ in values:
        beside = [words for _, y, words in labels if abs(y - height) < 1]
        assert all(0.6 * 10.5 * len(words) <= left for words in beside)
    assert len({round(height) for _, height, _ in labels}) == len(labels), "no two lines at the same height"
    shown = "".join(words for _, _, words in labels)
    assert all(name in shown for name in names[:3])


# ---- edgelm inspect --report


def test_inspect_prints_the_main_figures(tiny_bundle: Path, report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle), "--report"]) == 0
    out = capsys.readouterr().out
    for figure in main_figures(report):
        assert figure.title in out and figure.after in out and figure.verdict in out
    assert "int8-rowwise" in out


def test_inspect_prints_the_report_as_json(
    tiny_bundle: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_bundle), "--report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report


def with_report(bundle: Path, folder: Path, text: str) -> Path:
    """A copy of a bundle with another report.json and a matching manifest."""
    copied = Path(shutil.copytree(bundle, folder / "bundle"))
    put_file(copied, "report.json", text)
    return copied


def put_file(bundle: Path, name: str, text: str) -> None:
    """Write a file of a bundle and update its manifest."""
    (bundle / name).write_text(text, encoding="utf-8")
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    manifest["files"][name] = {"bytes": len(text.encode()), "sha256": digest}
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def opened_pages(monkeypatch: pytest.MonkeyPatch, found: bool = True) -> list[str]:
    """The text of each page that the browser is asked to show from now on."""
    pages: list[str] = []

    def browser(address: str) -> bool:
        pages.append(Path(address.removeprefix("file://")).read_text(encoding="utf-8"))
        return found

    monkeypatch.setattr(webbrowser, "open", browser)
    return pages


@pytest.mark.parametrize("found", [True, False])
def test_inspect_opens_a_page_that_it_makes_itself(
    tiny_bundle: Path, tmp_path: Path, found: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = opened_pages(monkeypatch, found)
    bundle = with_report(tiny_bundle, tmp_path, (tiny_bundle / "report.json").read_text(encoding="utf-8"))
    put_file(bundle, "report.html", "<script>alert(1)</script>")
    assert main(["inspect", str(bundle), "--report", "--open"]) == (0 if found else 1)
    (shown,) = pages
    assert "script" not in shown and "Weights" in shown
    assert ("open it yourself" in capsys.readouterr().err) is not found


class Announced:
    """An entry point, as the installed exporter's."""

    def __init__(self, page: Any) -> None:
        self.load = lambda: page


@pytest.mark.parametrize("with_exporter", [True, False])
def test_a_page_shows_no_markup_of_a_report(
    with_exporter: bool, tiny_bundle: Path, tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = opened_pages(monkeypatch)
    entries = [Announced(page)] if with_exporter else []
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: entries)
    report = with_examples(report)
    report["not_run"] = ["<script>alert(1)</script>"]
    report["examples"][0]["prompt"] = "<script>alert(1)</script>"
    assert main(["inspect", str(with_report(tiny_bundle, tmp_path, json.dumps(report))), "--open"]) == 0
    (shown,) = pages
    assert "<script" not in shown and "&lt;script" in shown
    assert ("<svg" in shown) is with_exporter


ODD = [None, 7, -1e999, 10**400, "x\x1b[2J", [], [7], {}, {"kinds": 7}, True, [[]], [None, {"use": [], "after": 3}]]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_values_of_wrong_types_in_a_report_are_left_out(
    odd: Any, tiny_bundle: Path, tmp_path: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = with_report(tiny_bundle, tmp_path, "{}")
    for key in report:
        inner = report[key] if isinstance(report[key], dict) else {}
        for changed in ({**report, key: odd}, *({**report, key: {**inner, name: odd}} for name in inner)):
            put_file(bundle, "report.json", json.dumps(changed))
            assert main(["inspect", str(bundle), "--report"]) == 0, changed
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out and not shown.err


def _without(bundle: Path, folder: Path, name: str) -> Path:
    copied = Path(shutil.copytree(bundle, folder / "bundle"))
    manifest = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"][name]
    (copied / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (copied / name).unlink()
    return copied


@pytest.mark.parametrize("name", ["report.json"])
def test_a_bundle_without_a_report_says_so(
    tiny_bundle: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = _without(tiny_bundle, tmp_path, name)
    assert main(["inspect", str(bundle), "--report", "--open"]) == 1
    assert f"has no {name}" in capsys.readouterr().err


def test_a_changed_report_is_refused(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    path = bundle / "report.json"
    path.write_text(path.read_text(encoding="utf-8").replace("x86", "x68"), encoding="utf-8")
    assert main(["inspect", str(bundle), "--report"]) == 1
    assert "changed after the export" in capsys.readouterr().err


@pytest.mark.parametrize("report", [{}, {"speed": 3}, {"against_fp32": {"perplexity_before": "x"}}, {"memory": None}])
def test_figures_of_another_version_are_left_out(report: Report) -> None:
    assert main_figures(report) == []
