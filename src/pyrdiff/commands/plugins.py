"""
List the installed methods, which package each is from, and what failed to load and why.

Example: pyrdiff plugins

Methods are found through the entry-point group pyrdiff.methods. One that fails harms no other.
"""

from dataclasses import dataclass

from pyrdiff.cli import announce, parse
from pyrdiff.plugins import GROUP, classes, plugins


@dataclass(kw_only=True)
class PluginsSettings:
    """Flags of `pyrdiff plugins`."""


def main(args: list[str]) -> dict:
    parse(PluginsSettings, __doc__, args, prog="pyrdiff plugins")
    announce("loading the installed methods")
    rows = []
    for plugin in plugins():
        names, error = [], plugin.error
        if plugin.method is not None:
            try:
                own = plugin.method.classes()
                names = [kind.__name__ for kind in own]
                taken = [name for name, kind in zip(names, own, strict=True) if classes()[name] is not kind]
                error = f"another method has classes of these names: {taken}" if taken else None
            except Exception as failed:  # code of others
                error = f"its classes: {type(failed).__name__}: {' '.join(str(failed).split())}"
        summary = plugin.method.summary if plugin.method else None
        row = {"name": plugin.name, "package": plugin.package, "version": plugin.version, "module": plugin.module}
        rows.append({**row, "summary": summary, "classes": names, "error": error})
        print(f"{plugin.name:<13} {plugin.package} {plugin.version} ({plugin.module})")
        print(f"{'':<14}{summary}" if summary else f"{'':<14}failed to load: {error}")
        if summary:
            print(f"{'':<14}" + (f"failed: {error}" if error else ", ".join(names)))
    failed = sum(row["error"] is not None for row in rows)
    print(f"{len(rows) - failed} methods in the entry-point group {GROUP}, {failed} failed")
    return {"plugins": rows, "exit_code": 1 if failed else 0}
