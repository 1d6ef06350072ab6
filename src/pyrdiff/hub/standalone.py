"""Joins a module and those of its own package that it imports into one file that needs neither package."""

import ast
import builtins
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pyrdiff.parts.sources import RELATIVE_IMPORT, STANDS_ALONE, Source, SourceFile

LICENCE = "# SPDX-License-Identifier: Apache-2.0"
WIDTH = 120  # characters of a line


class Module:
    """A module of an own package: what it imports of own packages and of others, what it defines, and the rest."""

    def __init__(self, name: str, file: SourceFile, own_packages: set[str]):
        self.name, self.path, self.own_packages = name, file.path, own_packages
        self.tree = ast.parse(file.text, file.path)
        self.own_imports: list[ast.ImportFrom] = []
        self.imports: list[ast.Import | ast.ImportFrom] = []
        self.docstring = ast.get_docstring(self.tree, clean=False)
        relative = RELATIVE_IMPORT.search(file.text)
        if relative:
            line = file.text.count("\n", 0, relative.end()) + 1
            raise ValueError(f"{self.path}:{line}: expected no line that looks like a relative import")
        at_top = [node for node in self.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._sort(node, node in at_top)
        self.bound = self._bound_names()
        self.body = self._without(file.text, at_top)

    def _sort(self, node: ast.Import | ast.ImportFrom, at_top: bool) -> None:
        """Tells imports of own packages from others, and refuses those that cannot be joined."""
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        if getattr(node, "level", 0):
            raise self.error(node, "expected the full name of the module, not a relative import")
        if names == ["__future__"]:
            raise self.error(node, "expected no `from __future__`, which would hold for all that is joined")
        if not any(name.split(".")[0] in self.own_packages for name in names):
            if at_top:
                self.imports.append(node)
        elif not at_top:
            raise self.error(node, f"expected the import of {names[0]} at the top level")
        elif isinstance(node, ast.Import) or any(alias.asname or alias.name == "*" for alias in node.names):
            raise self.error(node, f"expected `from {names[0]} import name, ...`, without `as` and `*`")
        else:
            self.own_imports.append(node)

    def _bound_names(self) -> dict[str, tuple[str, int]]:
        """{name: (what it means, the first line that says so)} of the names of the module itself."""
        bound: dict[str, tuple[str, int]] = {}
        for statement in self.tree.body:
            for name, node in _bindings(statement):
                meaning, line = bound.get(name, ("", node.lineno))
                bound[name] = (meaning + _meaning(name, node), line)
        return bound

    def _without(self, text: str, at_top: list[ast.stmt]) -> str:
        """The text without its docstring and its imports; comments stay."""
        dropped = at_top + self.tree.body[:1] if self.docstring is not None else at_top
        numbers = {number for node in dropped for number in range(node.lineno, node.end_lineno + 1)}
        for node in self.tree.body:
            if node not in dropped and node.lineno in numbers:
                raise self.error(node, "expected it on a line of its own, apart from the import")
        lines = text.splitlines()
        return "\n".join(line for number, line in enumerate(lines, 1) if number not in numbers).strip("\n")

    def error(self, node: ast.stmt, message: str) -> ValueError:
        return ValueError(f"{self.path}:{node.lineno}: {message}")


def join(source: Source) -> str:
    """
    The text of one file that has the module `source.module` and, before it, the own modules that it imports, each
    before those that need it. Comments stay; imports of other packages are merged at the top.

    Raises:
        ValueError: with file and line, if a module imports one of them in another form than
            `from module import name, ...` at the top level, or if a name would have two meanings in the file.
    """
    return _joined(source.module, tuple(source.files.items()))


@cache
def _joined(name: str, files: tuple[tuple[str, SourceFile], ...]) -> str:
    """The text of `join`; kept, since a training or a test saves the same classes again and again."""
    own_packages = {name.split(".")[0], "pyrdiff"}
    read = {module: Module(module, file, own_packages) for module, file in files}
    modules = _in_order_of_need(name, read)
    _check_names(modules)
    main = modules[-1]
    head = f"{LICENCE}\n{STANDS_ALONE}\n"
    if main.docstring is not None:
        head += f'"""{main.docstring}"""\n'
    bodies = [f"# {module.name}: {_first_line(module)}\n\n{module.body}" for module in modules[:-1]]
    text = "\n\n\n".join([f"{head}\n{_merged_imports(modules)}", *bodies, f"# {main.name}\n\n{main.body}"]) + "\n"
    compile(text, Path(main.path).name, "exec")
    return text


def _in_order_of_need(name: str, read: dict[str, Module]) -> list[Module]:
    """The module and those that it imports, each after what it needs."""
    ordered: list[Module] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        module = read[name]
        for node in module.own_imports:
            if node.module in (*above, name):
                circle = " -> ".join((*above, name, node.module))
                raise module.error(node, f"expected no circle of imports: {circle}")
            for alias in node.names:
                if node.module not in read or alias.name not in read[node.module].bound:
                    raise module.error(node, f"{alias.name}: expected a name that {node.module} defines")
            if read[node.module] not in ordered:
                visit(node.module, (*above, name))
        ordered.append(module)

    visit(name, ())
    return ordered


def _check_names(modules: list[Module]) -> None:
    """Refuses names that would have another meaning in the joined file than in their module."""
    seen: dict[str, tuple[str, Module]] = {}
    for module in modules:
        shared = {alias.name for node in module.own_imports for alias in node.names}
        for name, (meaning, line) in module.bound.items():
            if name in shared:
                continue  # compared where it is defined
            known, other = seen.setdefault(name, (meaning, module))
            if known != meaning:
                raise ValueError(f"{module.path}:{line}: {name}: expected one meaning, {other.path} has another")
            if hasattr(builtins, name) and not name.startswith("__"):
                raise ValueError(f"{module.path}:{line}: {name}: expected another name than that of a built-in")


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a statement of a module binds in the module, each with the statement."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name, node
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name.split(".")[0], node) for alias in node.names)
    elif isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return  # what they bind is theirs
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node
    else:
        for child in ast.iter_child_nodes(node):
            statement = node if isinstance(node, ast.stmt) else child
            for name, inner in _bindings(child):
                yield name, statement if isinstance(inner, ast.Name) else inner


def _meaning(name: str, node: ast.stmt) -> str:
    """What a statement says of a name, without places and comments."""
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return ast.dump(node)
    alias = next(alias for alias in node.names if name in (alias.asname, alias.name.split(".")[0]))
    origin = getattr(node, "module", None)
    return f"{origin}.{alias.name}" if origin else alias.name if alias.asname else name


def _merged_imports(modules: list[Module]) -> str:
    """The imports of other packages than the own ones, each once."""
    plain, names = set(), {}
    for node in (node for module in modules for node in module.imports):
        for alias in node.names:
            written = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            if isinstance(node, ast.Import):
                plain.add(f"import {written}")
            else:
                names.setdefault(node.module, set()).add(written)
    lines = sorted(plain)
    for module, wanted in sorted(names.items()):
        line = f"from {module} import {', '.join(sorted(wanted))}"
        if len(line) > WIDTH:
            line = f"from {module} import (\n    " + ",\n    ".join(sorted(wanted)) + ",\n)"
        lines.append(line)
    return "\n".join(lines)


def _first_line(module: Module) -> str:
    return (module.docstring or "").strip().split("\n")[0]
