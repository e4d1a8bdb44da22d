"""The folders of lora/ depend on each other in one direction: data flows from left to right through
ORDER.
"""

import ast
from pathlib import Path

import pytest

from lora.common.paths import ROOT

ORDER = [
    "common",
    "config",
    "lora",  # the files that lie in lora/ itself
    "distributed",
    "data",
    "model",
    "evaluation",
    "training",
    "export",
    "preflight",
    "tools",
    "scripts",
]
# The package's two entrances name modules of every folder, and import them when they are asked for.
EXEMPT = {"lora", "lora.__main__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] != "lora":
        return "scripts"
    return parts[1] if len(parts) > 2 else "lora"


def imported_names(path: Path) -> set[str]:
    """Return what a file imports, as dotted names; imports inside functions count."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            # `from lora.data import files` imports a module, `from lora.data.files import rows` a
            # name of one.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    return names


def import_graph() -> dict[str, set[str]]:
    """Return {module: the modules of this project that it imports}."""
    graph = {}
    for name, path in PATHS.items():
        imported = imported_names(path) & PATHS.keys()
        # Importing a module of a package imports the package as well, but that is no use of what
        # stands in it.
        used = {other for other in imported if not is_only_the_package_of(other, imported)}
        graph[name] = used - {name}
    return graph


def is_only_the_package_of(name: str, imported: set[str]) -> bool:
    is_package = PATHS[name].name == "__init__.py"
    return is_package and any(other.startswith(f"{name}.") for other in imported)


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a cycle in their order, or [] where there is none."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for other in sorted(graph[node]):
            found = visit(other, [*path, node])
            if found:
                return found
        finished.add(node)
        return []

    for start in sorted(graph):
        found = visit(start, [])
        if found:
            return found
    return []


FILES = [*ROOT.glob("*.py"), *(ROOT / "lora").rglob("*.py")]
PATHS = {module_name(path): path for path in FILES}
GRAPH = import_graph()
for _name in EXEMPT:
    del GRAPH[_name]
for _others in GRAPH.values():
    _others -= EXEMPT


def test_no_file_imports_itself_through_others():
    assert cycle_in(GRAPH) == []


def test_no_folder_imports_itself_through_others():
    folders: dict[str, set[str]] = {folder: set() for folder in ORDER}
    for name, others in GRAPH.items():
        folders[folder_of(PATHS[name])].update(folder_of(PATHS[other]) for other in others)
    for folder, others in folders.items():
        others.discard(folder)
    assert cycle_in(folders) == []


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_a_file_imports_from_its_own_folder_and_those_before_it(name):
    position = ORDER.index(folder_of(PATHS[name]))
    for other in GRAPH[name]:
        assert ORDER.index(folder_of(PATHS[other])) <= position, f"{name} imports {other}"


def test_the_test_finds_a_cycle():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
