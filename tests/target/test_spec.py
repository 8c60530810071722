"""Oracle: the line number of what was planted in a target file, found by counting."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

from fewbit.errors import BadFile, UnknownName
from fewbit.target import detect, load_target, target_names
from fewbit.target.allowed import allowed
from fewbit.target.lines import line_of
from fewbit.target.load import HERE
from fewbit.target.spec import Accumulator, Limit, OpRule, Shape, Target, Type

WHOLE = Path(__file__).with_name("whole.toml")  # ort-x86-avx2 written out, as it was before a file could extend another
SHIPPED = WHOLE.read_text(encoding="utf-8")


def planted(tmp_path, old: str, new: str, nth: int = 1) -> tuple[str, int]:
    """A copy of a whole target file with the nth `old` replaced, and the line of `new`."""
    parts = SHIPPED.split(old)
    assert len(parts) > nth
    before = old.join(parts[:nth])
    path = tmp_path / "mine.toml"
    path.write_text(before + new + old.join(parts[nth:]), encoding="utf-8")
    return str(path), before.count("\n") + 1


@pytest.mark.parametrize("name", target_names())
def test_a_shipped_target_loads_under_its_own_name(name):
    target = load_target(name)
    assert target.name == name
    weights_alone = all(rule.weight_only for rule in target.op)  # those of linear layers; "float" has none
    assert {"linear", "conv", "depthwise"} <= {rule.kind for rule in target.op} or weights_alone


def test_the_shipped_targets_are_the_files():
    x86 = [f"ort-x86-{name}" for name in ("avx2", "block", "channel", "vnni", "w4", "wide")]
    assert target_names() == [
        "arm-int7", "float", "npu-int16", "openvino-x86", "openvino-x86-avx2", "openvino-x86-w4", "ort-arm64", *x86, "tensorrt"
    ]  # fmt: skip


def test_a_file_of_ones_own_loads_by_its_path(tmp_path):
    path, _ = planted(tmp_path, '"ort-x86-avx2"', '"mine"')
    assert load_target(path).name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "nth", "says"),
    [
        ("opset = 20", "opset = 20\ncolour = 3", 1, "colour: Extra inputs"),
        ("opset = 20", "opset = 7", 1, "greater than or equal to 13"),
        ("schema = 1", "schema = 2", 1, "Input should be 1"),
        ('runtime = "onnxruntime"', 'runtime = "tvm"', 1, "'onnxruntime', 'openvino', 'tensorrt' or 'other'"),
        ("bits = 7", "bits = 33", 1, "types.w7.bits: .* less than or equal to 32"),
        ("fixed_scale = 0.00390625", "fixed_scale = 0", 1, "types.p8.fixed_scale: .* greater than or equal to 0.000000000001"),
        ("signed = true", "signed = 5", 2, "types.w7.signed: Input should be a valid boolean"),
        ('granularity = "channel"', 'granularity = "row"', 1, "types.w8.granularity"),
        ("narrow = true", "narrwo = true", 2, "types.w7.narrwo: Extra inputs"),
        ('kind = "depthwise"', 'kind = "lstm"', 1, "op.2.kind"),
        ('runs = "follow"', 'runs = "sometimes"', 2, "op.5.runs"),
        ('readers = "all"', 'reader = "all"', 2, "op.2.reader: Extra inputs"),
        ('output = "integer"', 'output = "int"', 3, "op.4.output"),
        ("pair_bits = 16", 'pair_bits = "x"', 2, "op.1.accumulator.pair_bits"),
        ("pair_bits = 16", "chain = 8", 1, "op.0.accumulator: chain and chain_bits belong together"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path, old, new, nth, says):
    path, line = planted(tmp_path, old, new, nth)
    line += new.count("\n")  # where a line was added, the added one is at fault
    with pytest.raises(BadFile, match=rf"mine\.toml, line {line}: .*{says}"):
        load_target(path)


@pytest.mark.parametrize(
    ("old", "new", "nth", "says"),
    [
        ('"w7"', '"w9"', 1, "op linear: operand weight names type 'w9'"),
        ('"w7"', '"w9"', 2, "op conv: operand weight names type 'w9'"),
        ('output = ["a8"]', 'output = ["a9"]', 3, "op add: operand output names type 'a9'"),  # before a key of that name
    ],
)
def test_a_type_that_does_not_exist_is_named_with_those_that_do(tmp_path, old, new, nth, says):
    path, line = planted(tmp_path, old, new, nth)
    with pytest.raises(BadFile, match=rf"line {line}: {says}; there are a8, b32, p8, w7, w8"):
        load_target(path)


BASE = """\
schema = 1
name = "base"
about = "a target to extend"
runtime = "other"
[types.a8]
bits = 8
signed = true
[types.w8]
bits = 8
signed = true
granularity = "channel"
[[op]]
kind = ["linear", "conv"]
operands = { input = ["a8"], weight = ["w8"] }
[[op]]
kind = "matmul"
operands = { query = ["a8"], key = ["a8"] }
"""
OWN = """\
schema = 1
extends = "base.toml"
name = "mine"
about = "changed"
"""


def written(tmp_path, own: str, base: str = BASE) -> str:
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "mine.toml").write_text(own)
    return str(tmp_path / "mine.toml")


def test_a_shipped_target_that_extends_another_is_the_one_written_out():
    assert load_target("ort-x86-avx2").model_dump() == load_target(str(WHOLE)).model_dump()
    assert load_target("ort-x86-avx2").fingerprint() == load_target(str(WHOLE)).fingerprint()


def test_a_file_replaces_fields_types_and_kinds_of_the_one_that_it_extends(tmp_path):
    own = (
        OWN
        + """\
opset = 21
remove = ["matmul"]
[types.w4]
bits = 4
signed = true
granularity = "channel"
[[op]]
kind = "linear"
operands = { weight = ["w4"] }
[[op]]
kind = "linear"
operands = { input = ["a8"], weight = ["w8"] }
[[op]]
kind = "add"
operands = { left = ["a8"] }
"""
    )
    target = load_target(written(tmp_path, own))
    assert (target.name, target.about, target.runtime, target.opset) == ("mine", "changed", "other", 21)
    assert [(rule.kind, dict(rule.operands)) for rule in target.op] == [
        ("linear", {"weight": ("w4",)}),
        ("linear", {"input": ("a8",), "weight": ("w8",)}),
        ("conv", {"input": ("a8",), "weight": ("w8",)}),
        ("add", {"left": ("a8",)}),
    ]
    assert set(target.types) == {"a8", "w8", "w4"}
    lone = OWN + 'remove = ["linear", "conv"]\n'
    assert set(load_target(written(tmp_path, lone)).types) == {"a8"}  # w8 has no reader left


@pytest.mark.parametrize(
    ("own", "base", "file", "at", "says"),
    [
        (OWN.replace("base.toml", "ort-x86-vni"), BASE, "mine", "extends", "'ort-x86-vni'; did you mean ort-x86-vnni"),
        (OWN.replace("base.toml", "gone.toml"), BASE, "mine", "extends", "no target 'gone.toml'; there are arm-int7"),
        (OWN.replace("base.toml", "mine.toml"), BASE, "mine", "extends", "'mine.toml' extends this file"),
        (OWN, BASE.replace("name", 'extends = "mine.toml"\nname', 1), "base", "extends", "'mine.toml' extends this file"),
        (OWN + 'remove = ["pool"]', BASE, "mine", "remove", "base has no op 'pool'; it has linear, conv, matmul"),
        (OWN.replace("extends", "remove"), BASE, "mine", "remove", "remove lists kinds of op"),
        (OWN + "extend = 3", BASE, "mine", "extend =", "extend: Extra inputs .*did you mean extends"),
        (OWN.replace("about", "abuot"), BASE, "mine", "schema", "about: Field required"),
        (OWN, BASE.replace('key = ["a8"]', 'key = ["a9"]'), "base", "key", "op matmul: operand key names type 'a9'"),
        (OWN, BASE.replace("bits = 8", "bits = 40", 1), "base", "bits = 40", "types.a8.bits: .*less than or equal to 32"),
        (OWN + '[[op]]\nkind = "conv"\noperands = {}\nruns = 3', BASE, "mine", "runs = 3", "op.1.runs"),
        (OWN + 'fuse = ["qattention"]', BASE, "mine", "fuse", "other has no fused operator 'qattention'"),
        (OWN + "[[op]]\nkind = []", BASE, "mine", "kind = ", "kind is a name, or a list of names"),
        (OWN + "op = 3", BASE, "mine", "op = 3", "op: each has a table of its own"),
        (OWN + "types = 3", BASE, "mine", "types = 3", "types: each has a table of its own"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_extended_file_is_named_with_the_file_and_line_that_say_it(tmp_path, own, base, file, at, says):
    path = written(tmp_path, own, base)
    lines = (tmp_path / f"{file}.toml").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if at in text)
    with pytest.raises(BadFile, match=rf"{file}\.toml, line {line}: .*{says}"):
        load_target(path)


def test_a_missing_field_is_named(tmp_path):
    path, _ = planted(tmp_path, 'about = "', 'abuot = "')
    with pytest.raises(BadFile, match="about: Field required"):
        load_target(path)


BROKEN = {
    "a key has no value": ["a", "a b = 1", "a = {b}"],
    "a value is missing": [
        "a =", "a = = 7", "a = tru", "a = .5", "a = +", "a = [1,", "a = [[", "a = nul", "a = \x00", "a = [1,,2]", "a = @",
    ],
    "a list is not closed": ["a = [1", "a = [1 2]", "a = [\n1\n2", "a = [true", "a = [{b = 1}"],
    "a table is not closed": ["a = {b = 1", "a = {b = 1 c = 2}", "a = {b = 1\n}"],
    'a text is not closed by "': ['a = """x', '"a = 1', 'a = """x""'],
    "a text is not closed by '": ["a = '''x", "a = '''x''"],
    "a name in brackets is not closed": ["[a", "[[a", "[[a]"],
    "a name is missing": ["a.", "[]", "[a.]", "a = {b = 1,}", "[[]]", "[$]", "a.. = 1", "a = {,}"],
    "this is not a key": ["= 1", "?", "}", "]", "\u00e4 = 1", ","],
    "more follows behind a value": [
        "[zz] x", "a = 1 b = 2", "a = 01", "a = 0x", "a = 1.", "a = 1979-13-01", "a = 12:00:61", "a = [1]]", "[a]]", "a = 1_",
    ],
    "a key is given twice": ["a = 1\na = 2", "[zz]\na = {b = 1, b = 2}"],
    "a table is given twice": ["[a]\n[a]", "[types]\n[types]"],
    "a text has a single": ['a = "\\q"'],
}  # fmt: skip


@pytest.mark.parametrize(("says", "statement"), [(says, text) for says, texts in BROKEN.items() for text in texts])
@pytest.mark.parametrize("behind", ["\n# a comment\n\n", "\nb = 2\n", "", "\n[later]\nx = [\n1,\n]\n"])
def test_broken_toml_is_named_by_the_line_where_it_begins_and_in_words(tmp_path, says, statement, behind):
    """The fault is in the last line of what was planted, or in the first where the statement goes on."""
    path = tmp_path / "mine.toml"
    before = SHIPPED + "\n# what follows is broken\n\n"
    path.write_text(before + statement + behind, encoding="utf-8")
    with pytest.raises(BadFile, match=r"mine\.toml, line \d+: ") as refused:
        load_target(str(path))
    line = int(re.search(r"line (\d+)", str(refused.value))[1])
    first = before.count("\n") + 1
    goes_on = statement.startswith(("a = [\n", "a = {b = 1\n"))
    assert line == first + (0 if goes_on else statement.count("\n"))
    if not behind or says not in ("a list is not closed", "a value is missing", "a text is not closed by '"):
        assert says in str(refused.value)


def test_broken_toml_within_a_file_is_named_with_its_line(tmp_path):
    path, line = planted(tmp_path, "bits = 7", "bits = = 7")
    with pytest.raises(BadFile, match=rf"mine\.toml, line {line}: a value is missing or no value; .*: 'bits = = 7'"):
        load_target(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'schema = 1\nname = "caf\xe9"', "line 2: byte 0xe9 is not UTF-8"),
        ("schema = 1".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b"x = " + b"[" * 100_000, "nested too deeply"),
        (b"schema = 1\nx = " + b"[" * 90 + b"]" * 90, "line 2: x is nested too deeply"),
        (b".".join([b"a"] * 2_000) + b" = 1", "line 1: a is nested too deeply"),
        (b"bits = " + b"9" * 5_000, "line 1: .*4300 digits"),
        (b"#" * 300_000, "300,000 bytes"),
        (b"\xef\xbb\xbfschema = 2", "line 1: schema: Input should be 1"),
        (b"\r\n\r\nschema = 2\r\n", "line 3: schema: Input should be 1"),
        (b"", "Field required"),
    ],
)
def test_a_file_that_is_no_target_at_all_is_a_bad_file(tmp_path, content, says):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=rf"target file .*mine\.toml.*{says}"):
        load_target(str(path))


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        *[("bits = 8", f"bits = {value}", r"types\.\w+\.bits") for value in ("true", "8.0", '"8"', "10" * 20, "nan", "[8]")],
        *[("signed = true", f"signed = {value}", r"types\.\w+\.signed") for value in ("1", '"yes"', "1.0")],
        *[("schema = 1", f"schema = {value}", "schema") for value in ("true", "1.0", "2024-01-01", "[1]")],
        *[("opset = 20", f"opset = {value}", "opset") for value in ("true", "20.0", "10" * 20, "inf")],
        *[("fixed_scale = 0.00390625", f"fixed_scale = {v}", r"types\.p8") for v in ("true", '"1"', "nan", "inf", "1e-320")],
        ("pair_bits = 16", "operand_bits = 8.0", r"op\.0\.accumulator\.operand_bits"),
    ],
)  # fmt: skip
def test_a_number_of_a_target_is_of_its_own_kind(tmp_path, old, new, where):
    path, _ = planted(tmp_path, old, new)
    with pytest.raises(BadFile, match=rf"line \d+: {where}"):
        load_target(path)


def test_files_that_extend_one_another_end(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.toml").write_text(f'extends = "{i + 1}.toml"\n')
    with pytest.raises(BadFile, match=r"8\.toml, line 1: extends: '9\.toml' is the 9th file in a row; 8 are allowed"):
        load_target(str(tmp_path / "0.toml"))
    (tmp_path / "link.toml").symlink_to(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('extends = "link.toml"')
    with pytest.raises(BadFile, match=r"'link\.toml' extends this file"):
        load_target(str(tmp_path / "a.toml"))
    with pytest.raises(BadFile, match="does not exist"):
        load_target("a" * 300 + ".toml")


def test_a_file_that_does_not_exist_is_a_bad_file(tmp_path):
    with pytest.raises(BadFile, match=r"gone\.toml does not exist"):
        load_target(str(tmp_path / "gone.toml"))


def test_an_unknown_target_offers_near_names():
    with pytest.raises(UnknownName, match=r"unknown target 'ort-x86-vni'\. Did you mean ort-x86-vnni"):
        load_target("ort-x86-vni")


@pytest.mark.parametrize(
    ("runtime", "machine", "flags", "name"),
    [
        ("onnxruntime", "x86_64", {"avx2", "avx512f", "avx512_vnni"}, "ort-x86-vnni"),
        ("onnxruntime", "x86_64", {"avx2", "avx_vnni"}, "ort-x86-vnni"),
        ("onnxruntime", "AMD64", {"avx2"}, "ort-x86-avx2"),
        ("openvino", "x86_64", {"avx2", "avx512_vnni"}, "openvino-x86"),
        ("openvino", "x86_64", {"avx2", "avx_vnni"}, "openvino-x86"),
        ("openvino", "x86_64", {"avx2"}, "openvino-x86-avx2"),
        ("onnxruntime", "aarch64", {"asimddp", "i8mm"}, "ort-arm64"),
        ("onnxruntime", "arm64", set(), "ort-arm64"),
    ],
)
def test_the_target_of_a_machine_follows_from_its_flags(runtime, machine, flags, name):
    assert detect(runtime, machine, frozenset(flags)) == name


@pytest.mark.parametrize(
    ("runtime", "machine", "flags"),
    [
        ("onnxruntime", "riscv64", {"avx2"}),
        ("onnxruntime", "x86_64", {"sse2"}),
        ("openvino", "x86_64", {"sse2"}),
    ],
)
def test_a_machine_that_no_target_fits_is_told_to_name_one(runtime, machine, flags):
    with pytest.raises(UnknownName, match=f"unknown target for this machine '{runtime}, {machine}'.*--target"):
        detect(runtime, machine, frozenset(flags))


def test_fewer_bits_live_in_the_type_and_more_do_not():
    types = load_target("ort-x86-avx2").types
    assert types["w8"].grid(0, 4).high == 7
    assert types["w7"].grid(0, 8).high == 63
    assert (types["w8"].grid(0).axis, types["a8"].grid(0).axis) == (0, None)


@pytest.mark.parametrize(("name", "most"), [("ort-x86-wide", "p16"), ("ort-x86-vnni", "p8")])
def test_a_softmax_of_unsigned_codes_has_all_of_its_range_at_any_width(name, most):
    p = load_target(name).types[most]
    for bits in range(2, p.bits + 1):
        assert p.step(p.grid(None, bits)) == 2.0**-bits


def test_a_softmax_of_arm_int7_has_a_code_for_one():
    p = load_target("arm-int7").types["p7"]
    assert p.step(p.grid(None)) == pytest.approx(1 / 63, rel=1e-15)


def test_a_target_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_target("openvino-x86").name = "other"
    assert isinstance(load_target("openvino-x86"), Target)


DOCS = HERE.parents[2] / "docs" / "targets.md"


def documented() -> str:
    """The worked example of docs/targets.md."""
    return DOCS.read_text(encoding="utf-8").split("```toml\n")[1].split("```")[0]


def test_the_example_of_the_documentation_loads_and_is_obeyed(tmp_path, mixed_net):
    path = tmp_path / "my-chip.toml"
    path.write_text(documented(), encoding="utf-8")
    target = load_target(str(path))
    answer = allowed(mixed_net.graph, target)
    assert set(answer.integer_ops) == {"stem", "side", "maxpool", "concat", "widen", "narrow", "add"}
    assert {r.site: r.why for r in answer.fallbacks} == {
        "depth": "my-chip has no integer depthwise",
        "head": "linear on my-chip: outputs is 4, the kernel needs a multiple of 8",
    }
    assert sorted(answer.shared[0]) == sorted(f"{name}:output" for name in ("stem", "maxpool", "side", "concat", "narrow"))


def test_the_extended_example_of_the_documentation_is_its_base_but_for_one_kind(tmp_path):
    path = tmp_path / "vnni-attention.toml"
    path.write_text(DOCS.read_text(encoding="utf-8").split("```toml\n")[2].split("```")[0], encoding="utf-8")
    target, base = load_target(str(path)), load_target("ort-x86-vnni")
    assert [rule for rule in target.op if rule.kind != "matmul"] == [rule for rule in base.op if rule.kind != "matmul"]
    assert [rule.runs for rule in target.rules("matmul")] == ["integer"]
    assert (target.types, target.requires, target.fuse) == (base.types, base.requires, base.fuse)


def test_the_message_of_the_documentation_is_the_one_that_is_given(tmp_path):
    path = tmp_path / "my-chip.toml"
    path.write_text(documented().replace("narrow = true ", "narow = true ", 1), encoding="utf-8")
    with pytest.raises(BadFile) as caught:
        load_target(str(path))
    assert str(caught.value).replace(str(path), "my-chip.toml") in DOCS.read_text(encoding="utf-8")


def test_every_field_is_in_the_documentation():
    text = DOCS.read_text(encoding="utf-8")
    for model in (Target, Type, OpRule, Accumulator, Shape, Limit):
        for name, field in model.model_fields.items():
            assert f"`{field.alias or name}`" in text or f"[{field.alias or name}." in text or f"[[{name}]]" in text, name


@pytest.mark.parametrize(
    ("old", "new", "at", "says"),
    [
        (
            'shared = ["left", "right"]',
            'shared = ["left", "rigth"]',
            "rigth",
            "op add: shared names 'rigth'; it can name left, right",
        ),
        ("query", "queery", "queery", "op matmul: operand queery does not exist; allowed are query, key"),
        ("fixed_scale = 0.007874015748031496", "fixed_zero = 3", "[types.p8]", "fixed_zero belongs to a fixed_scale"),
        ("{ multiple = 8 }", "{ multipel = 8 }", "multipel", "op.0.shape.inputs.multipel: .*did you mean multiple"),
        ("chain = 32", "chain = 0", "chain = 0", "op.0.accumulator.chain: .*greater than or equal to 1"),
        (
            "[types.b32]                          # a bias",
            "[types.b32]\nbits = 32\nsigned = true\n[types.c32] # a bias",
            '{ input = ["a8"], weight = ["w8"], bias = ["b32"], output = ["a8"] }',
            'op conv: type .b32. has one step for all channels; a bias has one for each: "channel"',
        ),
        ("narrows_to = 4", "narrows_to = 9", "[types.a8]", "narrows_to is at most the type's 8 bits, not 9"),
    ],
)
def test_what_does_not_go_together_is_named_with_its_line(tmp_path, old, new, at, says):
    path = tmp_path / "mine.toml"
    path.write_text(documented().replace(old, new, 1), encoding="utf-8")
    text = path.read_text().splitlines()
    expected = next(i for i, found in enumerate(text, 1) if at in found)
    with pytest.raises(BadFile, match=rf"mine\.toml, line {expected}: .*{says}"):
        load_target(str(path))


@pytest.mark.parametrize(
    ("old", "new", "at", "says"),
    [
        ("group_size = 32\n", "group_size = 33\n", "group_size = 33", "types.w4.group_size: Input should be 0, 16, 32"),
        ("group_size = 32\n", "multiples = 16\n", "[types.w4]", "multiples belongs to a group_size"),
        ("group_size = 32\n", "group_size = 32\nsymmetric = false\n", "[types.w4]", "group_size belongs to a symmetric type"),
        ("narrow = true", "multiples = 16", "[types.w4]", "16 times 8 is none"),
        ("bits = 4", "bits = 5", "[types.w4]", "a container of 4 bits holds codes of a weight with at most 4"),
        ("[[op]]", "[[op]]\naccumulator = { bits = 16 }", "operands = {", "'w4' has blocks, which are for linear"),
        (
            "opset = 21",
            "opset = 20",
            "opset = 20",
            "type 'w4': int4 codes are in files of opset 21 and later, not 20",
        ),
        ("opset = 21", 'opset = 21\nweights = "float"', 'weights = "float"', "codes of 4 bits and blocks are kept as codes"),
    ],
)
def test_what_a_block_does_not_go_with_is_named_with_its_line(tmp_path, old, new, at, says):
    text = (HERE / "ort-x86-w4.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    line = next(i for i, found in enumerate(path.read_text().splitlines(), 1) if at in found)
    with pytest.raises(BadFile, match=rf"mine\.toml, line {line}: .*{says}"):
        load_target(str(path))


def signed_in(opset: int, dtype: str, block: bool) -> bool:
    """Whether onnx's own schemas have codes of a type in QuantizeLinear or DequantizeLinear."""
    schema = onnx.defs.get_schema("DequantizeLinear", opset, "")
    types = {one for constraint in schema.type_constraints for one in constraint.allowed_type_strs}
    return f"tensor({dtype})" in types and (not block or "block_size" in schema.attributes)


@pytest.mark.parametrize(
    ("what", "dtype", "block"),
    [
        ("bits = 8", "int8", False),
        ("bits = 9", "int16", False),
        ("bits = 16", "int16", False),
        ("bits = 8\ncontainer = 16", "int16", False),
        ("bits = 4", "int8", False),
        ("bits = 4\ncontainer = 4", "int4", False),
        ("bits = 4\ngroup_size = 32", "int8", True),
        ("bits = 4\ngroup_size = 32\nmultiples = 16", "int8", False),
    ],
)
@pytest.mark.parametrize("opset", range(13, 24))
def test_an_opset_whose_nodes_lack_a_type_is_refused_with_its_line_and_the_smallest(tmp_path, what, dtype, block, opset):
    path = tmp_path / "mine.toml"
    path.write_text(
        f'schema = 1\nname = "mine"\nabout = ""\nruntime = "other"\nopset = {opset}\n[types.w]\n{what}\nsigned = true\n'
        'narrow = true\ngranularity = "channel"\n[[op]]\nkind = "linear"\noperands = {weight = ["w"]}\n'
    )
    if signed_in(opset, dtype, block):
        assert load_target(str(path)).opset == opset
        return
    least = next(newer for newer in range(opset, 24) if signed_in(newer, dtype, block))
    with pytest.raises(BadFile, match=rf"mine\.toml, line 5: type 'w': .* {least} and later, not {opset}"):
        load_target(str(path))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('extends = "ort-x86-vnni"\n[types.a8]\nbits = 16\nsigned = false', 5),  # the opset is the base's
        ('extends = "ort-x86-w4"\nopset = 19', 5),  # the type is
        ('extends = "ort-x86-vnni"\n[types.a8]\nbits = 8\nsigned = false\ncontainer = 32', 5),  # the operand is
    ],
)
def test_of_two_fields_at_odds_the_one_that_the_file_itself_says_is_named(tmp_path, text, line):
    path = tmp_path / "mine.toml"
    path.write_text(f'schema = 1\nname = "mine"\nabout = ""\n\n{text}\n'.replace("\n\n", "\n", 1))
    with pytest.raises(BadFile, match=rf"mine\.toml, line {line}: "):
        load_target(str(path))


@pytest.mark.parametrize("old", ["bits = 8", "bits = 8\ncontainer = 32", "bits = 32"])
@pytest.mark.parametrize("operand", ["input", "weight", "bias"])
def test_what_no_quantizelinear_makes_is_refused(tmp_path, old, operand):
    """QuantizeLinear has no codes of 32 bits in any opset; the DequantizeLinear of a bias or weight does."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'schema = 1\nname = "mine"\nabout = ""\nruntime = "other"\n'
        f'[types.x]\n{old}\nsigned = true\ngranularity = "channel"\n'
        f'[[op]]\nkind = "conv"\noperands = {{{operand} = ["x"]}}\n'
    )
    if old == "bits = 8" or operand == "bias" or (operand == "weight" and "container" in old):
        load_target(str(path))
        return
    line = path.read_text().splitlines().index(f'operands = {{{operand} = ["x"]}}') + 1
    with pytest.raises(BadFile, match=rf"line {line}: .* operand {operand}: type 'x' has codes of 32 bits; .*16 or fewer"):
        load_target(str(path))


@pytest.mark.parametrize("machine", ["([", "a{99999999999999999999}", "*"])
def test_a_machine_that_is_no_regular_expression_is_named_with_its_line(tmp_path, machine):
    path, line = planted(tmp_path, 'machine = "x86_64|AMD64"', f'machine = "{machine}"')
    with pytest.raises(BadFile, match=rf"mine\.toml, line {line}: machine: it is a regular expression"):
        load_target(path)


NESTED = """\
a = 1 # a = 2
b.c = { d = 1, "e" = [1, 2], f = { g = "h = 3" } }
[t."x.y"]
k = [
  { m = 1 },
]
[[p]]
q = 1
[[p]]
"r" = 'q = 2'
[p.s]
z = 1
[[p.u]]
v = 1
[[p.u]]
v = 2
"""


@pytest.mark.parametrize(
    ("location", "line"),
    [
        (("a",), 1),
        (("b", "c", "d"), 2),
        (("b", "c", "nothing"), 2),
        (("t", "x.y"), 3),
        (("p", 0, "q"), 8),
        (("p", 1), 9),
        (("p", 1, "r"), 10),
        (("p", 1, "q"), 9),
        (("p", 1, "s", "z"), 12),
        (("p", 1, "u", 0, "v"), 14),
        (("p", 1, "u", 1, "v"), 16),
        (("gone",), 1),
    ],
)
def test_the_line_of_a_path_is_found(location, line):
    assert line_of(NESTED, location) == line
