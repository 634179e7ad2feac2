"""Calls are resolved through imports and scopes, from source alone."""

from __future__ import annotations

import pytest

from xmc.data.calls import functions_of


def calls(
    body: str, *, head: str = "", module: str = "pkg.sub.mod", package: bool = False
) -> list[str]:
    """The calls of `f(x)` with this body, after this module code."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    source = f'{head}\ndef f(x, *args, y=None, **kw):\n    """Doc."""\n{lines}\n'
    found = functions_of(source.encode(), module, is_package=package)
    return next(function.calls for function in found if function.name == f"{module}.f")


@pytest.mark.parametrize(
    ("head", "call", "name"),
    [
        ("import re", "re.compile('x')", "re.compile"),
        ("import os.path", "os.path.join('x')", "os.path.join"),
        ("import os.path", "os.getcwd()", "os.getcwd"),
        ("import numpy as np", "np.linalg.norm(x)", "numpy.linalg.norm"),
        ("import torch.nn.functional as F", "F.relu(x)", "torch.nn.functional.relu"),
        ("from re import compile", "compile('x')", "re.compile"),
        ("from re import compile as c", "c('x')", "re.compile"),
        ("from os import path", "path.join(x)", "os.path.join"),
        ("from . import other", "other.g()", "pkg.sub.other.g"),
        ("from .other import g", "g()", "pkg.sub.other.g"),
        ("from .. import top", "top.g()", "pkg.top.g"),
        ("from ..top.low import g as h", "h()", "pkg.top.low.g"),
        ("from ... import beyond", "beyond.g()", None),
        ("from ....beyond import g", "g()", None),
        ("from re import *", "compile('x')", None),
        ("try:\n  import a as j\nexcept ImportError:\n  import j", "j.loads(x)", "a.loads"),
        ("try:\n    import re\nexcept ImportError:\n    re = None", "re.compile(x)", "re.compile"),
        ("if True:\n    import re", "re.compile(x)", "re.compile"),
        ("def helper(): pass", "helper()", "pkg.sub.mod.helper"),
        ("class Thing: pass", "Thing(x)", "pkg.sub.mod.Thing"),
        ("class Thing: pass", "Thing.make(x)", "pkg.sub.mod.Thing.make"),
        ("if True:\n    def helper(): pass", "helper()", "pkg.sub.mod.helper"),
        ("pattern = object()", "pattern.match(x)", None),
        ("", "len(x)", None),
        ("", "x.append(1)", None),
        ("", "args.count(kw)", None),
        ("", "unknown(x)", None),
        ("import re", "re.compile('x').match(x)", "re.compile"),
        ("import re", "(lambda: re.compile('x'))()", "re.compile"),
        ("import re", "[re.compile(z) for z in x if z]", "re.compile"),
        ("import re", "await_me = {re.compile(x): 1}", "re.compile"),
        ("import re", "f(re.sub)", None),
    ],
)  # fmt: skip
def test_every_form_of_import_and_scope(head: str, call: str, name: str | None) -> None:
    assert calls(call, head=head) == ([] if name is None else [name])


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("import re\nre.compile(x)", ["re.compile"]),
        ("from re import compile as c\nc(x)", ["re.compile"]),
        ("re = x\nre.compile(x)", []),
        ("for re in x:\n    re.compile(x)", []),
        ("with x as re:\n    re.compile(x)", []),
        ("try:\n    pass\nexcept OSError as re:\n    re.compile(x)", []),
        ("match x:\n    case [re]:\n        re.compile(x)", []),
        ("match x:\n    case {**re}:\n        re.compile(x)", []),
        ("if (re := x):\n    re.compile(x)", []),
        ("global re\nre = x\nre.compile(x)", ["re.compile"]),
        ("lambda re: re.compile(x)", []),
        ("def inner(re):\n    re.compile(x)", []),
        ("def inner():\n    re.compile(x)\ninner()", ["re.compile"]),
        ("def inner(a=re.compile(x)):\n    pass", ["re.compile"]),
        ("@re.template\ndef inner(): pass", []),
        ("@re.template(1)\ndef inner(): pass", ["re.template"]),
        ("class Inner(re.base(x)):\n    y = re.compile(x)", ["re.base", "re.compile"]),
        ("re.compile(x)\nre.compile(y)\nre.sub(x)", ["re.compile", "re.sub"]),
        ("f(x)", []),
    ],
)
def test_local_names_hide_imports(body: str, names: list[str]) -> None:
    assert calls(body, head="import re") == names


def test_packages_resolve_relative_imports_from_themselves() -> None:
    assert calls("g()", head="from .low import g", module="pkg.sub", package=True) == [
        "pkg.sub.low.g"
    ]
    assert calls("g()", head="from ..low import g", module="pkg.sub", package=True) == ["pkg.low.g"]
    assert calls("g()", head="from .low import g", module="single") == []


def test_documented_functions_are_found_wherever_they_are() -> None:
    source = '''
import re
class A:
    """A class is no function."""
    def method(self):
        """  First line.

            indented
        not
        """
        self.other(); re.sub("a")
    class B:
        async def deep(self):
            """Deep."""
    def bare(self):
        return re.compile("x")
if True:
    def branch():
        "Single quotes."
        def nested():
            """Nested."""
            re.match("x")
        re.split("x")
    def half(): "\\ud800 x"
def number(): 5
def blank(): "  "
'''
    found = functions_of(source.encode(), "m")
    assert [tuple(function) for function in found] == [
        ("m.A.method", "First line.\n\n    indented\nnot", ["re.sub"]),
        ("m.A.B.deep", "Deep.", []),
        ("m.branch", "Single quotes.", ["re.match", "re.split"]),
        ("m.branch.nested", "Nested.", ["re.match"]),
        ("m.half", "? x", []),
    ]


def test_source_that_is_no_python_is_an_error_and_odd_strings_are_silent() -> None:
    with pytest.raises(SyntaxError):
        functions_of(b"def (:", "m")
    with pytest.raises((SyntaxError, ValueError), match="null"):
        functions_of(b"x = 1\0", "m")
    latin = "# -*- coding: latin-1 -*-\ndef f():\n    'caf\xe9 \\d'\n".encode("latin-1")
    assert functions_of(latin, "m")[0].doc == "café \\d"
