"""
The structure of the package in numbers: `make architecture`.

Four storeys, each of which may import those below it: the flat modules of the package (all that the Hub's remote code
can be made of), `data`, `evaluation`, `training`; on top the command line.
"""

import ast
import dataclasses
import functools
import sys
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "src" / "transformers_dualtoken"
STOREYS = ("flat modules", "data", "evaluation", "training", "command line")
GOAL_LINES = 12_500
MAX_LINES = 14_810  # raised only by features that are asked for
# Of an image argument's name, but transformers' own: its pipelines call this method with it.
NOT_OURS = ("processing_dualtoken.post_process_multimodal_output",)


@dataclasses.dataclass(frozen=True)
class Import:
    """A relative import: of what module by what module, and in which function if it is not at the top of the file."""

    by: str
    of: str
    function: str | None

    def __str__(self) -> str:
        return f"{self.by} -> {self.of}" + (f" (in {self.function})" if self.function else "")


def modules() -> dict[str, Path]:
    """Name below the package, such as `data.images`, to file."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def storey(module: str) -> int:
    """Index in `STOREYS`; the package's own `__init__`, which registers classes, is of the flat modules."""
    first = module.partition(".")[0]
    if module == "cli":
        return len(STOREYS) - 1
    return STOREYS.index(first) if first in STOREYS else 0


def imports() -> list[Import]:
    """All relative imports, those within functions included."""
    files = modules()
    return [each for module, path in files.items() for each in _imports_below(_tree(path), module, None, files)]


def _imports_below(node: ast.AST, module: str, function: str | None, files: dict[str, Path]) -> list[Import]:
    package, found = module.split(".")[:-1], []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.level:
            base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [child.module])])
            names = [".".join(filter(None, (base, alias.name))) for alias in child.names]
            fallback = base if base in files else f"{base}.__init__".lstrip(".")
            targets = {name if name in files else fallback for name in names}
            found += [Import(module, target, function) for target in sorted(targets)]
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        found += _imports_below(child, module, child.name if is_function else function, files)
    return found


def imports_up(found: list[Import]) -> list[Import]:
    return [each for each in found if storey(each.of) > storey(each.by)]


def circles(found: list[Import]) -> list[list[str]]:
    """Modules that import each other, directly or by way of others: the strongly connected components of several."""
    graph = {}
    for each in found:
        graph.setdefault(each.by, set()).add(each.of)

    def reachable(start: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            for target in graph.get(stack.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    stack.append(target)
        return seen

    reach = {module: reachable(module) for module in graph}
    components = {
        frozenset({module, *(other for other in reach[module] if module in reach.get(other, ()))})
        for module in graph
        if module in reach[module]
    }
    return sorted(sorted(component) for component in components)


def num_lines() -> dict[str, int]:
    """Lines of each storey, blank ones, comments and docstrings included."""
    lines = dict.fromkeys(STOREYS, 0)
    for module, path in modules().items():
        lines[STOREYS[storey(module)]] += len(path.read_text(encoding="utf-8").splitlines())
    return lines


def declarations(name: str) -> list[str]:
    """Where an argument is declared: parameters of functions and annotated fields of classes of that name."""
    places = []
    for module, path in modules().items():
        for node in ast.walk(_tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                places += [f"{module}.{node.name}" for argument in arguments if argument.arg == name]
            elif isinstance(node, ast.ClassDef):
                fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                places += [f"{module}.{node.name}" for part in fields if getattr(part.target, "id", None) == name]
    return places


def image_arguments() -> list[str]:
    """The fields of `DualTokenImageGenerationConfig`, read from its file."""
    tree = _tree(PACKAGE / "generation_settings.py")
    (config,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == "DualTokenImageGenerationConfig"
    ]
    return [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]


def main() -> int:
    found, lines = imports(), num_lines()
    up, round_about = imports_up(found), circles(found)
    places = {name: [place for place in declarations(name) if place not in NOT_OURS] for name in image_arguments()}
    several = {name: where for name, where in places.items() if len(where) != 1}
    for name, number in lines.items():
        print(f"{number:6} lines: {name}")
    print(f"{sum(lines.values()):6} lines in src/ (at most {MAX_LINES}, the goal is {GOAL_LINES})")
    print(f"{len(modules()):6} modules, {len(found)} imports between them")
    print(f"{len(up):6} imports up" + "".join(f"\n         {each}" for each in up))
    print(
        f"{len(round_about):6} circles of imports"
        + "".join(f"\n         {' <-> '.join(each)}" for each in round_about)
    )
    print(
        f"{len(image_arguments()):6} image arguments of `generate`, {len(several)} declared in other than 1 place"
        + "".join(f"\n         {name}: {', '.join(places)}" for name, places in several.items())
    )
    return int(bool(up or round_about or several or sum(lines.values()) > MAX_LINES))


if __name__ == "__main__":
    sys.exit(main())
