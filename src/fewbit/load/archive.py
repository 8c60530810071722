"""Reading an exported program (.pt2): nothing that stands in the file is run.

`torch.export.load` unpickles what it finds, evaluates sizes as Python, calls what a node names and loads compiled libraries. So
each member of the archive is looked at first, through the reader that will load it, and what is not plainly data is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fewbit.errors import BadFile, reason
from fewbit.files import is_archive
from fewbit.load.contexts import quiet

MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/(version|serialization_id)|models/model\.json|extra/.*"
    r"|data/sample_inputs/model\.pt|data/(weights|constants)/(model\.pt|model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
)
NAMESPACES = ("aten", "prims", "quantized_decomposed", "torchvision")  # of operators that only compute
PLAIN = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift|getitem)|math\.\w+"
    r"|torch\.sym_\w+|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast)"
)
TREES = re.compile(r"builtins\.(tuple|list|dict)|collections\.(OrderedDict|namedtuple)|transformers\.[\w.]+")
FREE_TEXT = {  # never part of the code that torch generates from a graph
    "as_string", "as_strings", "stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom", "from_node",
    "guards_code",
}  # fmt: skip
SYMBOL = re.compile(r"[a-z]{1,4}\d+")
FUNCTIONS = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Eq", "Ne", "Lt", "Le", "Gt", "Ge",
    "Not", "And", "Or", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
    "FloorDiv", "ModularIndexing", "PythonMod", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "TruncToInt",
    "TruncToFloat", "RoundToInt", "ToFloat", "IntTrueDiv", "FloatTrueDiv", "Where", "Identity",
}  # fmt: skip
ARITHMETIC = (
    ast.Expression, ast.Load, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Call, ast.keyword, ast.Name, ast.Constant,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
LARGEST_POWER = 8


def read_program(path: Path) -> ExportedProgram:
    """The program of a file that `torch.export.save` wrote. Raises BadFile where it is broken or holds more than data."""
    if not is_archive(path):
        what = "no archive, or cut off" if path.stat().st_size else "empty, of 0 bytes"
        raise BadFile(
            f"{path} is not a readable exported program: it is {what}. Copy or download it again, or write it with "
            "torch.export.save."
        )
    try:
        inspect_archive(path)
        with quiet():
            return torch.export.load(path)
    except BadFile as error:
        raise BadFile(f"{path} is refused: {error} Write it again with torch.export.save.") from error
    except Exception as error:
        raise BadFile(f"{path} is not a readable exported program: {reason(error)} Write it with torch.export.save.") from error


def inspect_archive(path: Path) -> None:
    """Raise BadFile that names the member which is damaged or not plainly data."""
    reader = torch._C.PyTorchFileReader(str(path))
    with zipfile.ZipFile(path) as archive:
        stored = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(stored) != len(archive.infolist()) or sorted(stored) != sorted(reader.get_all_records()):
            raise BadFile("its table of contents is ambiguous.")
    for name in reader.get_all_records():
        if not MEMBERS.fullmatch(name):
            raise BadFile(f"it holds {name!r}, which is not a part of an exported program.")
        data = reader.get_record(name)
        if stored[name].compress_type != zipfile.ZIP_STORED or zlib.crc32(data) != stored[name].CRC:
            raise BadFile(f"{name} is damaged (its checksum is wrong).")
        if name.endswith(".pt"):
            _refuse_pickles(name, data)
        elif name.endswith(".json"):
            _inspect(json.loads(data), name)


def _refuse_pickles(name: str, data: bytes) -> None:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise BadFile(f"{name} holds more than tensors: loading it would run code.") from error


def _inspect(value: Any, key: str) -> None:
    """Look at every text of a JSON member, each by the key that it stands under."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _is_plain(name)
            _inspect(inner, name)
    elif isinstance(value, list) and key != "expr_str":
        for inner in value:
            _inspect(inner, key)
    elif key == "use_pickle" and value:
        raise BadFile("a weight is pickled (use_pickle): loading it would run code.")
    elif isinstance(value, str) or key == "expr_str":
        TEXTS.get(key, _is_plain)(value)


@cache
def _is_plain(text: str) -> None:
    """Names stand in generated code, inside quotation marks where they are no identifiers."""
    if re.search(r"""["'`\\\x00-\x1f\x7f]""", text):
        raise BadFile(f"{text[:80]!r} is not a name of a tensor or module.")


@cache
def _is_identifier(text: str) -> None:
    if not re.fullmatch(r"\w*", text):
        raise BadFile(f"{text[:80]!r} is not a name of a node.")


@cache
def _is_operator(target: str) -> None:
    found = re.fullmatch(r"torch\.ops\.(\w+)\.(\w+)\.([A-Za-z]\w*)", target)
    if PLAIN.fullmatch(target):
        return
    if found and found[1] in NAMESPACES:
        if found[1] == "torchvision":
            import torchvision  # noqa: F401  registers its operators
        overload = getattr(getattr(getattr(torch.ops, found[1]), found[2], None), found[3], None)
        if isinstance(overload, torch._ops.OpOverload) and not any(a.name == "filename" for a in overload._schema.arguments):
            return
    raise BadFile(f"a node calls {target[:80]!r}; allowed are the operators of {', '.join(NAMESPACES)}.")


@cache
def _is_path(text: str) -> None:
    if not re.fullmatch(r"(weight|tensor)_\d+", text):
        raise BadFile(f"a weight lies in {text[:80]!r}, where no tensor is.")


@cache
def _is_size(text: str) -> None:
    """A size is symbols and arithmetic, in small powers; torch evaluates it as Python."""
    refused = BadFile(f"the size {text!r:.80} is not arithmetic of symbols.")
    if not isinstance(text, str) or not re.fullmatch(r"[ -~]*", text) or "#" in text:
        raise refused
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError) as error:
        raise refused from error
    names = {id(call.func) for call in ast.walk(tree) if isinstance(call, ast.Call)}
    symbols = {id(argument) for call in ast.walk(tree) if _calls(call, "Symbol") for argument in ast.iter_child_nodes(call)}
    for node in ast.walk(tree):
        if not isinstance(node, ARITHMETIC) or not _is_term(
            node, node_is_called=id(node) in names, in_symbol=id(node) in symbols
        ):
            raise refused


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _is_term(node: ast.AST, *, node_is_called: bool, in_symbol: bool) -> bool:
    """Whether one part of a size is harmless by itself."""
    if isinstance(node, ast.Name):
        return node.id in FUNCTIONS if node_is_called else SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        named = isinstance(node.value, str) and in_symbol and SYMBOL.fullmatch(node.value) is not None
        return named or isinstance(node.value, bool) or (isinstance(node.value, int | float) and abs(node.value) < 2**63)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and (node.func.id != "Pow" or (len(node.args) == 2 and _is_small(node.args[1])))
    return not (
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift | ast.MatMult) and not _is_small(node.right)
    )


def _is_small(node: ast.AST) -> bool:
    inner = node.operand if isinstance(node, ast.UnaryOp) else node
    if _calls(inner, "Integer") and isinstance(inner, ast.Call) and len(inner.args) == 1:
        return _is_small(inner.args[0])
    return isinstance(inner, ast.Constant) and isinstance(inner.value, int) and abs(inner.value) <= LARGEST_POWER


def _is_output_tree(text: str) -> None:
    """How what comes out is nested; its types are found, and an enumeration is imported, by name."""
    _inspect_tree(json.loads(text)[1], arguments=False)


def _is_input_tree(text: str) -> None:
    """The same of what goes in, whose keys are names of arguments."""
    _inspect_tree(json.loads(text)[1], arguments=True)


def _inspect_tree(tree: Mapping[str, Any], *, arguments: bool) -> None:
    kind, context = tree["type"], tree["context"]
    if kind is not None and not TREES.fullmatch(kind):
        raise BadFile(f"what goes in or comes out is a {kind[:80]!r}; allowed are tuples, lists and dicts.")
    keys = [] if context is None or kind == "collections.namedtuple" else _texts(json.loads(context))
    for key in keys:
        if key == "__enum__" or (arguments and not key.isidentifier()):
            raise BadFile(f"what goes in or comes out is called {key[:80]!r}.")
    for child in tree["children_spec"]:
        _inspect_tree(child, arguments=arguments)


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else [value] * isinstance(value, str)


TEXTS: Mapping[str, Callable[[Any], None]] = {
    **dict.fromkeys(FREE_TEXT, lambda text: None),
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _is_identifier),
    **dict.fromkeys(("target", "as_operator"), _is_operator),
    "expr_str": _is_size,
    "path_name": _is_path,
    "in_spec": _is_input_tree,
    "out_spec": _is_output_tree,
}
