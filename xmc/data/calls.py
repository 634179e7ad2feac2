"""Docstrings of functions and the qualified names that the functions call, from source alone.

Nothing is imported or run: names are resolved through the imports that the file itself contains.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Scope = dict[str, str | None]
"""Names bound in a scope: the qualified name they stand for, None where it is not known."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Scoped = _Function | ast.ClassDef | ast.Lambda

_NOTEWORTHY = {
    *(ast.Name, ast.Import, ast.ImportFrom, ast.Call, ast.Global),
    *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
    *(ast.ExceptHandler, ast.MatchAs, ast.MatchStar, ast.MatchMapping),
}
_FIELDS = {
    kind: tuple(field for field in kind._fields if field not in {"ctx", "op", "ops", "attr"})
    for kind in vars(ast).values()
    if isinstance(kind, type) and issubclass(kind, ast.AST)
}


class Function(NamedTuple):
    """A function or method with a docstring."""

    name: str  # qualified: module.Class.method
    doc: str  # the docstring, its indentation removed
    calls: list[str]  # qualified, sorted, distinct


def functions_of(
    source: bytes,
    module: str,  # qualified name of the module
    *,
    is_package: bool = False,  # whether the source is an __init__.py, for relative imports
) -> list[Function]:
    """Every function of the source that has a docstring, in the order of the source.

    A call counts where its name leads to an import or to a function or class of the module's own
    top level: `np.asarray(x)`, `partial(f)`, `helper()`. Builtins, methods of objects
    (`x.append`), parameters and local variables say nothing and are left out, and so is a
    function's call of itself. Calls inside nested functions count for the outer one too.

    Raises SyntaxError, ValueError (null bytes) or RecursionError where the source is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    reader = _Reader(module, module if is_package else module.rpartition(".")[0])
    top, _, nested = reader.scan(tree.body)
    for node in nested:
        if isinstance(node, _Function | ast.ClassDef) and top.get(node.name) is None:
            top[node.name] = f"{module}.{node.name}"
    reader.read(tree.body, module, (top,))
    return reader.found


class _Reader:
    def __init__(self, module: str, package: str) -> None:
        self.module = module
        self.package = package  # what a relative import of level 1 starts from
        self.found: list[Function] = []

    def read(self, body: Sequence[ast.stmt], prefix: str, scopes: tuple[Scope, ...]) -> None:
        """Record the documented functions among the statements, classes and branches entered."""
        for node in body:
            if isinstance(node, _Function):
                self.function(node, prefix, scopes)
            elif isinstance(node, ast.ClassDef):
                self.read(node.body, f"{prefix}.{node.name}", scopes)
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
                for block in _blocks(node):
                    self.read(block, prefix, scopes)

    def function(self, node: _Function, prefix: str, scopes: tuple[Scope, ...]) -> set[str]:
        """Record the function, if documented, and those inside it; returns all their calls."""
        name = f"{prefix}.{node.name}"
        doc = _docstring(node)
        place = len(self.found)
        calls = self.scope(node.body, node.args, name, scopes)
        if doc is not None:
            self.found.insert(place, Function(name, doc, sorted(calls - {name})))
        return calls

    def scope(
        self,
        body: Sequence[ast.AST],
        args: ast.arguments | None,
        prefix: str,
        scopes: tuple[Scope, ...],
    ) -> set[str]:
        """The calls of a function's body, nested functions included."""
        bound, callees, nested = self.scan(body)
        if args is not None:
            for arg in _parameters(args):
                bound.setdefault(arg.arg, None)
        scopes = (bound, *scopes)
        calls = {name for callee in callees if (name := _resolve(callee, scopes)) is not None}
        for inner in nested:
            if isinstance(inner, _Function):
                calls |= self.function(inner, prefix, scopes)
            elif isinstance(inner, ast.Lambda):
                calls |= self.scope([inner.body], inner.args, prefix, scopes)
            else:
                calls |= self.scope(inner.body, None, f"{prefix}.{inner.name}", scopes)
        return calls

    def scan(self, body: Sequence[ast.AST]) -> tuple[Scope, list[ast.expr], list[_Scoped]]:
        """Names bound, functions called and scopes opened by the nodes, in source order."""
        bound: Scope = {}
        callees: list[ast.expr] = []
        nested: list[_Scoped] = []
        outer: set[str] = set()
        stack: list[ast.AST] = list(reversed(body))
        while stack:
            node = stack.pop()
            if type(node) not in _NOTEWORTHY:  # most nodes; this function takes most of the time
                stack.extend(_children(node))
                continue
            if isinstance(node, ast.Name):
                if not isinstance(node.ctx, ast.Load):
                    bound.setdefault(node.id, None)
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, target in self.imported(node):
                    if bound.get(name) is None:
                        bound[name] = target
                continue
            if isinstance(node, _Function | ast.ClassDef | ast.Lambda):
                nested.append(node)
                if not isinstance(node, ast.Lambda):
                    bound.setdefault(node.name, None)
                stack.extend(_outside(node))
                continue
            if isinstance(node, ast.Call):
                callees.append(node.func)
            elif isinstance(node, ast.Global):
                outer.update(node.names)
            elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
                bound.setdefault(node.name, None)
            elif isinstance(node, ast.MatchMapping) and node.rest:
                bound.setdefault(node.rest, None)
            stack.extend(_children(node))
        for name in outer:
            bound.pop(name, None)
        return bound, callees, nested

    def imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str | None]]:
        """The names that an import binds, with what they stand for."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
            return
        source = node.module
        if node.level:
            base = self.package.split(".") if self.package else []
            if node.level - 1 >= len(base):
                source = None  # leads out of the package
            else:
                parts = base[: len(base) - node.level + 1]
                source = ".".join([*parts, node.module] if node.module else parts)
        for alias in node.names:
            if alias.name != "*":
                name = alias.asname or alias.name
                yield name, f"{source}.{alias.name}" if source else None


def _resolve(callee: ast.expr, scopes: tuple[Scope, ...]) -> str | None:
    attributes: list[str] = []
    while isinstance(callee, ast.Attribute):
        attributes.append(callee.attr)
        callee = callee.value
    if not isinstance(callee, ast.Name):
        return None
    for scope in scopes:
        if callee.id in scope:
            target = scope[callee.id]
            return None if target is None else ".".join([target, *reversed(attributes)])
    return None  # a builtin, or from a star import


def _docstring(node: _Function) -> str | None:
    first = node.body[0]
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return None
    value = first.value.value
    if not isinstance(value, str) or not value.strip():
        return None
    # Docstrings about Unicode may hold half of a pair, which no file can.
    return inspect.cleandoc(value).encode("utf-8", "replace").decode()


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        yield getattr(node, field, [])
    for handler in getattr(node, "handlers", []):
        yield handler.body


def _parameters(args: ast.arguments) -> Iterator[ast.arg]:
    yield from args.posonlyargs
    yield from args.args
    yield from args.kwonlyargs
    if args.vararg:
        yield args.vararg
    if args.kwarg:
        yield args.kwarg


def _outside(node: _Scoped) -> list[ast.AST]:
    """The parts of a definition that belong to the scope around it, last first."""
    if isinstance(node, ast.ClassDef):
        parts: list[ast.AST] = [*node.decorator_list, *node.bases, *node.keywords]
    else:
        keyword_defaults = [default for default in node.args.kw_defaults if default is not None]
        parts = [*node.args.defaults, *keyword_defaults]
        if not isinstance(node, ast.Lambda):
            parts = [*node.decorator_list, *parts]
    return parts[::-1]


def _children(node: ast.AST) -> list[ast.AST]:
    """The child nodes, last first; without contexts and operators, which hold nothing."""
    children: list[ast.AST] = []
    for field in _FIELDS[type(node)]:
        value = getattr(node, field, None)
        if type(value) is list:
            children.extend(item for item in value if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST):
            children.append(value)
    children.reverse()
    return children
