"""Style of docstrings and lines: public docstrings open with a noun or a verb; lines have 110 characters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WIDTH = 110
QUESTION_WORDS = {"How", "Of", "That", "What", "Where", "Whether", "Who"}


def sources(folder: str) -> list[Path]:
    """Python files of a folder of the repository."""
    return sorted((ROOT / folder).rglob("*.py"))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, docstring) of a module, and of its public classes, fields, methods and functions."""
    scopes = [tree]
    while scopes:
        scope = scopes.pop()
        if (text := ast.get_docstring(scope)) is not None:
            yield scope.body[0].lineno, text
        if isinstance(scope, ast.FunctionDef):
            continue
        for node, following in zip(scope.body, [*scope.body[1:], None], strict=True):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                scopes += [] if node.name.startswith("_") else [node]
            elif isinstance(scope, ast.ClassDef) and isinstance(node, ast.AnnAssign) and _is_text(following):
                yield following.lineno, following.value.value


def _is_text(node: ast.stmt | None) -> bool:
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str))


def questions(source: str) -> list[str]:
    """Returns `line: opening` of each public docstring that opens with a word of `QUESTION_WORDS`."""
    return [f"{line}: {text.strip()[:40]}" for line, text in docstrings(ast.parse(source))
            if text.strip() and text.split()[0].strip("`,.:;") in QUESTION_WORDS]


@pytest.mark.parametrize("folder", ["engine", "kernels"])
def test_public_docstrings_open_with_noun_or_verb(folder):
    found = {path: questions(path.read_text(encoding="utf-8")) for path in sources(folder)}
    assert [f"{path.relative_to(ROOT)}:{text}" for path, texts in found.items() for text in texts] == []


@pytest.mark.parametrize("folder", ["engine", "kernels", "benchmarks", "tests"])
def test_lines_fit_the_width(folder):
    lines = [(path, number, line) for path in sources(folder)
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]
    assert [f"{path.relative_to(ROOT)}:{number}: {len(line)} characters" for path, number, line in lines
            if len(line) > WIDTH] == []


def test_question_words_are_found_in_public_docstrings_only():
    source = '''"""What a module holds."""
class Settings:
    """Settings of a run."""
    rate: float = 0.1
    """Whether it is high."""
    def read(self):
        """How to read."""
        def inner():
            """Where nobody looks."""
class _Hidden:
    """What nobody sees."""
def _hidden():
    """Who knows."""
def described():
    """Describes whatever is given."""
'''
    assert sorted(questions(source)) == ["1: What a module holds.", "5: Whether it is high.",
                                         "7: How to read."]
