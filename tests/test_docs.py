"""README.md and docs/: every path and name of the code that they mention exists."""

import ast
import re

import pytest
from conftest import ROOT

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
FOLDERS = "nested|input_pipeline|configs|tests|benchmarks|docs"


def definitions(path):
    """Names that a module defines or imports at its top, and 'Class.member' for what its classes hold."""
    names = set()
    body = ast.parse(path.read_text()).body
    guarded = [node for block in body if isinstance(block, ast.If) for node in block.body]  # if TYPE_CHECKING
    for node in body + guarded:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = [node.name for node in node.body if isinstance(node, ast.FunctionDef)]
            members += [node.target.id for node in node.body if isinstance(node, ast.AnnAssign)]
            names |= {f"{node.name}.{member}" for member in members}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def exists(dotted):
    """Whether 'nested.spaces.svd.Basis' names a module, or what one defines."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module.exists():
            return length == len(parts) or ".".join(parts[length:]) in definitions(module)
    return False


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_names_of_the_code_exist(page):
    text = (ROOT / page).read_text()
    paths = re.findall(rf"(?<![\w./])(?:{FOLDERS})/[\w./]*\w", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = re.findall(r"`((?:nested|input_pipeline|configs|benchmarks)(?:\.\w+)+)(?:\(.*?\))?`", text)
    names += re.findall(r"python -m ((?:input_pipeline|benchmarks)\.\w+)", text)
    assert [name for name in names if not exists(name)] == []


def test_the_reference_of_options_is_current():
    from nested.build.reference import option_reference

    command = "from nested.build.reference import option_reference; print(option_reference(), end='')"
    current = (ROOT / "docs" / "options.md").read_text() == option_reference()
    assert current, f'python -c "{command}" > docs/options.md'


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []
