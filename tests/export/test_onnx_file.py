"""bln-inspect of an ONNX file: what it shows, what it refuses, and that it neither hangs nor runs anything."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from bln_serve.cli.inspect import main
from bln_serve.errors import ModelLoadError
from bln_serve.export import onnx_file
from bln_serve.statistics import RowCoupling

COUPLED = """
<ir_version: 9, opset_import: ["" : 18]> g (float[n,3] x, int32[n,2] ids) => (float[n,3] y, float[2,3] c)
<float[5,3] table = {0,1,2,3,4,5,6,7,8,9,1,2,3,4,5}, int64[1] i0 = {0}, int64[1] i1 = {1},
 float[2,3] t = {1,2,3,4,5,6}> {
    [look] e = Gather(table, ids)
    [pool] p = ReduceSum<keepdims = 0>(e, i1)
    [join] s = Add(x, p)
    [mean] m = ReduceMean(s, i0)
    [out] y = Sub(s, m)
    [fixed] c = Tanh(t)
}"""


def written(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def coupled(tmp_path: Path) -> Path:
    """A file with two inputs, one of which indexes a table, and two outputs, one of which couples and one is fixed."""
    model = parser.parse_model(COUPLED)
    helper.set_model_props(model, {"bln.policy": "MPMM", "other.tool": "not ours"})
    return written(tmp_path / "coupled.onnx", model)


def test_a_file_is_shown_with_what_is_proved_of_it(coupled: Path, capsys) -> None:
    assert main([str(coupled)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines() == [
        "ONNX: IR version 9, operators ai.onnx 18",
        "runs anywhere: standard operators only",
        "input   x: float32 (n, 3)",
        "input   ids: int32 (n, 2), indices 0 to 4",
        "output  y: float32 (n, 3)",
        "output  c: float32 (2, 3), axis 0 is not proved to be the rows",
        "bln.policy = MPMM",
        "row coupling: mini-batch (ReduceMean 'mean' reduces the row axis)",
        "  by way of: x -> join -> mean",
    ]


def test_json_holds_the_same(coupled: Path, capsys) -> None:
    assert main([str(coupled), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["row_coupling"] == "mini-batch"
    assert document["row_coupling_path"] == ["x", "join", "mean"]
    assert document["inputs"][1] == {"name": "ids", "dtype": "int32", "shape": ["n", 2], "index_range": [0, 4]}
    assert document["outputs_without_rows"] == ["c"]
    assert document["opsets"] == {"ai.onnx": 18}
    assert document["metadata"] == {"bln.policy": "MPMM"}


def test_operators_that_are_not_standard_are_named(tmp_path: Path, capsys) -> None:
    model = parser.parse_model(COUPLED)
    model.graph.node[5].domain = "com.microsoft"
    model.graph.node[5].op_type = "Gelu"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert main([str(written(tmp_path / "m.onnx", model))]) == 0
    assert "runs only where these are known: com.microsoft::Gelu\n" in capsys.readouterr().out


def test_an_operator_set_from_the_future_is_not_trusted(tmp_path: Path, capsys) -> None:
    model = parser.parse_model(COUPLED)
    model.opset_import[0].version = 9999
    assert main([str(written(tmp_path / "m.onnx", model))]) == 0
    said = capsys.readouterr().out
    assert "runs only where so new an operator set is known\n" in said
    assert "row coupling: mini-batch (its operators are newer than opset " in said


def test_a_layer_with_time_folded_into_its_rows_is_named(tmp_path: Path, capsys) -> None:
    model = parser.parse_model("""
    <ir_version: 9, opset_import: ["" : 18, "com.bln" : 1]> g (float[n,3,4] x) => (float[n,3,4] y)
    <int64[2] fold = {-1, 4}, int64[3] back = {-1, 3, 4}> {
        f = Reshape(x, fold) [b] g = com.bln.BatchLayerNormalization<policy = "MMMM", m = 6, layer = "bln1">(f)
        y = Reshape(g, back) }""")
    assert main([str(written(tmp_path / "m.onnx", model))]) == 0
    said = capsys.readouterr().out
    assert "b: 3 rows of its own a row\n" in said
    assert "row coupling: mini-batch (bln1: batch mean and batch variance are live)" in said


def test_what_the_file_says_otherwise_is_shown(coupled: Path, capsys) -> None:
    model = onnx.load(coupled)
    helper.set_model_props(model, {"bln.row_coupling": "independent"})
    assert main([str(written(coupled, model))]) == 0
    assert "reduces the row axis)\n  but the file itself says: independent\n" in capsys.readouterr().out
    helper.set_model_props(model, {"bln.row_coupling": "mini-batch"})
    assert main([str(written(coupled, model))]) == 0
    assert "but the file itself" not in capsys.readouterr().out


def external(model: onnx.ModelProto, location: str, **more: str) -> None:
    table = model.graph.initializer[0]
    table.ClearField("float_data")
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        table.external_data.add(key=key, value=value)


def huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**40, 2**20]


def negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-5, -3]


def short_raw(model: onnx.ModelProto) -> None:
    table = model.graph.initializer[0]
    table.ClearField("float_data")
    table.raw_data = b"1234"


def unknown_dtype(model: onnx.ModelProto) -> None:
    short_raw(model)
    model.graph.initializer[0].data_type = 99


def huge_constant_node(model: onnx.ModelProto) -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[2**50], raw_data=b"")
    model.graph.node.append(helper.make_node("Constant", [], ["k"], value=tensor))


def no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def no_opset(model: onnx.ModelProto) -> None:
    del model.opset_import[:]


HOSTILE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "data above the folder": (lambda m: external(m, "../../etc/passwd"), "outside the model's folder"),
    "data anywhere": (lambda m: external(m, "/etc/passwd"), "outside the model's folder"),
    "data behind a link": (lambda m: external(m, "link"), "outside the model's folder"),
    "data in the folder itself": (lambda m: external(m, "."), "outside the model's folder"),
    "data missing": (lambda m: external(m, "weights.bin"), "'weights.bin', which is missing"),
    "data with a zero byte": (lambda m: external(m, "a\0b"), "keeps its entries in 'a\\\\x00b'"),
    "data cut short": (lambda m: external(m, "small.bin"), "behind the end of 'small.bin'"),
    "data at a place that is no number": (lambda m: external(m, "small.bin", offset="x"), "small.bin"),
    "data before the beginning": (lambda m: external(m, "small.bin", offset="-9", length="4"), "behind the end"),
    "a huge claim": (huge, r"of shape \[1099511627776, 1048576\] does not hold"),
    "a negative shape": (negative, r"has the shape \[-5, -3\]"),
    "too few bytes": (short_raw, "holds 4 bytes, not 60"),
    "a dtype that is none": (unknown_dtype, "holds 4 bytes, not None"),
    "a huge constant": (huge_constant_node, "holds 0 bytes"),
    "no outputs": (no_outputs, "no graph, no operator set or no outputs"),
    "no operator set": (no_opset, "no graph, no operator set or no outputs"),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_with_a_sentence(tmp_path: Path, capsys, change, said: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "small.bin").write_bytes(b"0123456789")
    (folder / "link").symlink_to("/etc/passwd")
    model = parser.parse_model(COUPLED)
    change(model)
    path = written(folder / "m.onnx", model)
    with pytest.raises(ModelLoadError, match=f"Expected an ONNX model .* Received: .*m.onnx, where .*{said}"):
        onnx_file.load(path)
    assert main([str(path)]) == 1
    assert capsys.readouterr().err.startswith("error: Expected an ONNX model that is whole")


def test_data_inside_the_folder_is_not_read(tmp_path: Path) -> None:
    model = parser.parse_model(COUPLED)
    external(model, "weights.bin")
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(60)
    os.chmod(tmp_path / "weights.bin", 0)
    found = onnx_file.inspect(written(tmp_path / "m.onnx", model))
    assert found.inputs[1].index_range == (0, 4)
    assert found.row_coupling is RowCoupling.MINI_BATCH


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no graph, no operator set or no outputs"),
        (b"PK\x03\x04 a zip file", "its bytes are no ONNX model"),
        (b"\x89PNG\r\n\x1a\n", "its bytes are no ONNX model"),
        (b"ir_version: 9", "its bytes are no ONNX model"),
        (b"\x0a" * 999, "its bytes are no ONNX model|no graph, no operator set"),
    ],
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=said):
        onnx_file.load(path)


def test_a_file_that_is_cut_anywhere_is_refused_or_still_whole(tmp_path: Path, golden_artifacts: Path, capsys) -> None:
    content = (golden_artifacts / "tiny_mpmm" / "1" / "model.onnx").read_bytes()
    path = tmp_path / "m.onnx"
    codes = set()
    for end in range(1, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:end])
        codes.add(main([str(path)]))
    assert codes <= {0, 1}
    assert 1 in codes
    assert "Traceback" not in capsys.readouterr().err


def test_every_byte_may_be_changed(tmp_path: Path, golden_artifacts: Path) -> None:
    """A changed file is described or refused; nothing else comes of it."""
    content = bytearray((golden_artifacts / "tiny_pppp" / "1" / "model.onnx").read_bytes())
    path = tmp_path / "m.onnx"
    for place in range(0, len(content), max(1, len(content) // 150)):
        kept, content[place] = content[place], content[place] ^ 0x5A
        path.write_bytes(content)
        assert main([str(path)]) in (0, 1)
        content[place] = kept


def test_bodies_too_deep_for_the_format_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y0"])], "g", [], [onnx.ValueInfoProto(name="y0")])
    content = graph.SerializeToString()
    for depth in range(60):  # put together as bytes: the library itself refuses to
        content = _nested(content, depth)
    model = onnx.ModelProto(ir_version=9, opset_import=[helper.make_opsetid("", 18)]).SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(model + b"\x3a" + _length(content) + content)
    with pytest.raises(ModelLoadError, match="its bytes are no ONNX model"):
        onnx_file.load(path)


def _length(content: bytes) -> bytes:
    size, written_ = len(content), b""
    while size > 127:
        written_ += bytes([size & 127 | 128])
        size >>= 7
    return written_ + bytes([size])


def _nested(graph: bytes, depth: int) -> bytes:
    """Return a graph with one If, whose branch is the graph given."""
    attribute = b"\x0a\x0bthen_branch\xa0\x01\x05\x32" + _length(graph) + graph
    node = b"\x22\x02If\x2a" + _length(attribute) + attribute
    output = onnx.ValueInfoProto(name=f"y{depth}").SerializeToString()
    return b"\x0a" + _length(node) + node + b"\x12\x01g\x62" + _length(output) + output


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["a pipe", "nothing"][::-1])
def test_what_is_no_file_is_refused(tmp_path: Path, make) -> None:
    make(tmp_path / "m.onnx")
    with pytest.raises(ModelLoadError, match="Expected an ONNX file. Received: .*m.onnx, which is no file."):
        onnx_file.load(tmp_path / "m.onnx")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("bln-inspect")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_command_runs_from_a_shell(coupled: Path, tmp_path: Path) -> None:
    done = command(str(coupled))
    assert (done.returncode, done.stderr) == (0, "")
    assert "row coupling: mini-batch (ReduceMean 'mean' reduces the row axis)" in done.stdout
    failed = command(str(tmp_path / "none.onnx"))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (f"error: Expected an ONNX file. Received: {tmp_path / 'none.onnx'}, which is no file.\n")


HEAVY = ("tensorflow", "keras", "tf2onnx", "onnxruntime")


def modules_after(program: str, *arguments: str) -> list[str]:
    ending = f"\nimport sys; print('imported', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program + ending, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1].split()[1:]


def test_inspecting_an_onnx_file_imports_neither_tensorflow_nor_onnx_runtime(coupled: Path) -> None:
    program = "import sys\nfrom bln_serve.cli.inspect import main\nassert main(sys.argv[1:]) == 0"
    assert modules_after(program, str(coupled)) == []


def test_the_export_is_imported_when_it_is_asked_for() -> None:
    assert modules_after("import bln_serve.export") == []
    assert {"tensorflow", "keras", "tf2onnx"} <= set(modules_after("from bln_serve.export import export"))


@pytest.mark.parametrize("missing", ["tensorflow", "keras", "tf2onnx"])
def test_a_missing_extra_is_named_when_the_export_is_asked_for(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    from bln_serve import export as package
    from bln_serve.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"bln-export needs packages .* pip install 'bln-serve\[export\]'"):
        package.__getattr__("export")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.__getattr__("nothing")


def test_a_missing_onnx_is_named(monkeypatch: pytest.MonkeyPatch, coupled: Path, capsys) -> None:
    monkeypatch.delitem(sys.modules, "bln_serve.export.onnx_file")
    monkeypatch.delattr("bln_serve.export.onnx_file", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([str(coupled)]) == 2
    assert "bln-inspect of an ONNX file needs packages that are not installed" in capsys.readouterr().err


MALFORMED = {
    "casts that feed each other": "a = Cast <to = 7> (b) b = Cast <to = 7> (a) c = Add (x, a) y = Gather (t, c)",
    "a look-up of one input": "y = Gather (t)",
    "a choice of two": "i = Where (x, x) y = Gather (t, i)",
    "a step of nothing": "i = Slice (x, zero, one, zero, zero) y = Gather (t, i)",
    "an axis that is a word": 'y = Gather <axis = "first"> (t, x)',
    "a sum of one": "i = Add (x) y = Gather (t, i)",
    "a part of no part": "i = Split (x) y = Gather (t, i)",
}


@pytest.mark.parametrize("nodes", MALFORMED.values(), ids=MALFORMED)
def test_a_graph_that_is_not_as_its_operators_want_it_is_described_all_the_same(nodes: str, tmp_path: Path) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 18]> g (int64[n] x) => (float[n, 2] y) '
        "<float[5, 2] t = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int64[1] zero = {0}, int64[1] one = {1}> { " + nodes + " }"
    )
    assert main([str(written(tmp_path / "m.onnx", parser.parse_model(text)))]) == 0


@pytest.mark.parametrize("part", ["values", "indices"])
def test_a_sparse_tensor_s_data_stays_in_the_folder_too(part: str, tmp_path: Path, capsys) -> None:
    model = parser.parse_model(COUPLED)
    sparse = model.graph.sparse_initializer.add()
    sparse.dims.append(3)
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "values"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.ones(1, np.int64), "indices"))
    tensor = getattr(sparse, part)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = "s", onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL
    tensor.dims.append(1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    assert main([str(written(tmp_path / "m.onnx", model))]) == 1
    assert "outside the model's folder" in capsys.readouterr().err
