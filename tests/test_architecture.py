"""The shape of the code (design.md §2): small rooms, honest names, no hidden state, two worlds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/simpletuner"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "migrations" not in path.parts)
TREES = {path: ast.parse(path.read_text()) for path in MODULES}

DATA_TABLES: dict[str, str] = {}
"""Module → why it may be longer than a room: it is a table of data without logic."""

EDGES = {
    "train/__main__.py": "the trainer process: a bug becomes an event with its traceback",
    "train/tracker.py": "trackers: foreign code behind a network, which must never end a run",
    "jobs/runner.py": "the runner: whatever happens, exit.json is written",
    "jobs/supervisor.py": "the supervisor's tick: one broken job does not stop the others",
    "server/boundary.py": "the HTTP boundary: a bug becomes a 500 in the one error shape",
}
BANNED_NAMES = {
    "util", "utils", "helper", "helpers", "common", "misc", "manager", "service", "handler", "factory", "wrapper",
}  # fmt: skip
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                yield f"{name_of(path)}:{node.lineno} {node.name}", node


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if ast.get_docstring(node) else 0


def depth_of(node: ast.AST, depth: int = 0) -> int:
    """Deepest block below `node`; an `elif` is not a level of its own, nor is a function inside a function."""
    deepest = depth
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        is_elif = isinstance(node, ast.If) and field == "orelse" and len(children) == 1
        for child in children:
            if not isinstance(child, ast.AST) or isinstance(child, FUNCTIONS):
                continue
            step = isinstance(child, BLOCKS) and not (is_elif and isinstance(child, ast.If))
            deepest = max(deepest, depth_of(child, depth + step))
    return deepest


def test_modules_are_found() -> None:
    assert len(MODULES) > 40


def test_a_module_has_at_most_400_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: n for name, n in lengths.items() if n > 400 and name not in DATA_TABLES} == {}
    assert set(DATA_TABLES) <= set(lengths)


def test_a_function_has_at_most_60_lines() -> None:
    """Its docstring not counted: a command's is its help text."""
    lengths = {where: (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node) for where, node in functions()}
    assert {where: n for where, n in lengths.items() if n > 60} == {}


def test_blocks_nest_at_most_four_deep() -> None:
    depths = {where: depth_of(node) for where, node in functions()}
    assert {where: n for where, n in depths.items() if n > 4} == {}


def test_depth_is_measured() -> None:
    tree = ast.parse("def f():\n if a:\n  for b in c:\n   pass\n elif d:\n  pass\n elif e:\n  with g:\n   pass\n")
    assert depth_of(tree.body[0]) == 2


def test_modules_are_named_by_their_concept() -> None:
    parts = {part for path in MODULES for part in re.split(r"[/_.]", name_of(path))}
    assert parts & BANNED_NAMES == set()


def test_no_attribute_is_asked_for_by_a_literal_name() -> None:
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    ]
    assert found == []


def test_no_module_keeps_state() -> None:
    """Lists, dictionaries and sets of a module are constants, and no function rebinds a module's name."""
    displays = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict", "Lock", "RLock", "Queue"}
    found: list[str] = []
    for path, tree in TREES.items():
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _is_bound(node) else []
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
            called = value.func if isinstance(value, ast.Call) else None
            is_mutable = isinstance(value, displays) or (isinstance(called, ast.Name) and called.id in makers)
            found += [f"{name_of(path)}:{node.lineno} {n}" for n in names if is_mutable and not n.isupper()]
        found += [f"{name_of(path)}:{n.lineno} global" for n in ast.walk(tree) if isinstance(n, ast.Global)]
    assert [row for row in found if not row.endswith(" __all__")] == []


def _is_bound(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign)


def test_no_constant_is_changed() -> None:
    """An UPPERCASE list, dictionary or set is never written to in its module."""
    writers = {"append", "add", "update", "pop", "clear", "extend", "insert", "remove", "setdefault", "discard"}
    found: list[str] = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
                base: ast.expr = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                base = node.value
            else:
                continue
            if isinstance(base, ast.Name) and base.id.isupper() and len(base.id) > 1:
                found.append(f"{name_of(path)}:{node.lineno} {base.id}")
    assert found == []


def test_every_exception_is_caught_at_the_edges_only() -> None:
    found = {
        name_of(path)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and _catches_all(node.type) and not _ends_by_raising(node)
    }
    assert found - EDGES.keys() == set()


def _catches_all(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException")) for name in names
    )


def _ends_by_raising(handler: ast.ExceptHandler) -> bool:
    """It only cleans up: the same exception goes on."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_nothing_is_left_for_later() -> None:
    banned = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"]) + r")\b")
    found = [f"{path}:{number}" for path, number, line in tracked_lines() if banned.search(line)]
    assert found == []


def test_no_file_names_a_registry_or_a_place_on_one_machine() -> None:
    hosts = ["pypi" + r"\.org", "pythonhosted" + r"\.org", "registry" + r"\.npmjs", "npmjs" + r"\.com", "yarn" + "pkg"]
    places = ["/" + "work/", "/" + "root/", "/" + r"home/\w", "/" + "Users/", "/" + r"tmp/\w"]
    banned = re.compile("|".join(hosts + places))
    found = [f"{path}:{number} {line.strip()[:90]}" for path, number, line in tracked_lines() if banned.search(line)]
    assert found == []


def tracked_lines() -> Iterator[tuple[str, int, str]]:
    """Lines of every text file that git keeps. Licence texts and the packaged API viewers are others' words."""
    listed = subprocess.run(["git", "ls-files", "-z"], check=False, cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.name in ("LICENSE", "NOTICE") or "server/static/" in name or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" in content[:4096]:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            yield name, number, line


@pytest.mark.parametrize(
    "module",
    [
        "simpletuner.config.resolve",
        "simpletuner.config.environments",
        "simpletuner.checkpoints",
        "simpletuner.families.registry",
        "simpletuner.data.manifest",
        "simpletuner.job",
        "simpletuner.cli.verify_resume",
        "simpletuner.cli.replay",
    ],
)
def test_torch_stays_out(module: str) -> None:
    code = (
        f"import {module}, sys; from simpletuner.families.registry import family_names, load_spec\n"
        "[load_spec(name) for name in family_names()]\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    assert (ran.stdout.strip(), ran.returncode) == ("[]", 0), ran.stderr


def test_every_built_option_is_read() -> None:
    """An option that nothing outside the declarations reads would be ignored in silence."""
    from simpletuner.config.dataset_options import INHERITED
    from simpletuner.config.train_config import option_fields

    declaring = {name for name in (name_of(path) for path in MODULES) if name.endswith("_options.py")}
    declaring.add("config/reserved.py")
    words: set[str] = set()
    for path, tree in TREES.items():
        if name_of(path) not in declaring:
            words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            words |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    unread = {option.name for option in option_fields().values() if not option.ui.later} - words - set(INHERITED)
    assert unread == set()


def test_every_dataset_key_is_read() -> None:
    from simpletuner.config.dataset_options import MODELS, ParquetColumns

    words = {
        node.attr
        for path, tree in TREES.items()
        if not name_of(path).startswith("config/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    keys = {key for model in [*MODELS.values(), ParquetColumns] for key in model.model_fields}
    # Read by the configuration itself: the union's tag, the kind of backend, whether it is used, which cache is meant.
    assert keys - words - {"type", "dataset_type", "disabled", "default"} == set()
