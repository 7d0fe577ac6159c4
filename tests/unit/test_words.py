"""`docs/words.md` lists the public classes of the code, one meaning each."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "words.md"
_GENERATED = ("_pb2.py", "_pb2_grpc.py")


def _public_classes(root: Path) -> dict[str, list[str]]:
    """Return the names of the public top-level classes of each package, such as ``rollmesh.replay``."""
    found: dict[str, list[str]] = defaultdict(list)
    for top in ("rollmesh", "services"):
        for path in sorted((root / top).rglob("*.py")):
            if path.name.endswith(_GENERATED):
                continue
            package = ".".join(path.relative_to(root).with_suffix("").parts[:2])
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[package].append(node.name)
    return found


def _listed_classes(page: str) -> dict[str, list[str]]:
    """Return the names in the tables of the page, by the heading above each table."""
    listed: dict[str, list[str]] = {}
    package = ""
    for line in page.splitlines():
        if line.startswith("## "):
            package = line.removeprefix("## ")
        elif match := re.match(r"\| `(\w+)` \| \S", line):
            listed.setdefault(package, []).append(match[1])
    return listed


def _differences(code: dict[str, list[str]], page: dict[str, list[str]]) -> list[str]:
    """Return a sentence for each class that is missing from the page, unknown to the code, or named twice."""
    in_code = Counter((package, name) for package, names in code.items() for name in names)
    on_page = Counter((package, name) for package, names in page.items() for name in names)
    names = Counter(name for names in code.values() for name in names)
    return [
        *(f"the page lacks {name} of {package}" for package, name in in_code - on_page),
        *(f"the page names {name} of {package}, which does not exist" for package, name in on_page - in_code),
        *(f"{count} public classes are called {name}" for name, count in names.items() if count > 1),
    ]


def test_the_page_lists_every_public_class_once_and_no_two_classes_share_a_name() -> None:
    code = _public_classes(ROOT)
    assert sum(len(names) for names in code.values()) > 200
    assert _differences(code, _listed_classes(PAGE.read_text(encoding="utf-8"))) == []


def test_a_missing_class_an_unknown_class_and_a_twin_are_found() -> None:
    code = {"rollmesh.rpc": ["Server", "Backoff"], "services.reward": ["Server"]}
    page = _listed_classes("## rollmesh.rpc\n| `Server` | A server. |\n| `Gone` | Gone. |\n")
    assert _differences(code, page) == [
        "the page lacks Backoff of rollmesh.rpc",
        "the page lacks Server of services.reward",
        "the page names Gone of rollmesh.rpc, which does not exist",
        "2 public classes are called Server",
    ]
