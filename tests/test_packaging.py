"""pyproject.toml and the requirements files: one list of packages, by whatever command they are installed."""

import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirements(name):
    """The lines of a requirements file without its comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def test_an_installed_copy_depends_on_what_requirements_txt_lists():
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert "dependencies" in PROJECT["project"]["dynamic"]
    # setuptools reads no options such as -r or -c from that file
    assert not [line for line in requirements("requirements.txt") if line.startswith("-")]


def test_the_extra_test_is_requirements_test_txt():
    assert requirements("requirements-test.txt") == ["-r requirements.txt", *EXTRAS["test"]]


@pytest.mark.parametrize("extra, base", [("gpu", "jax"), ("tpu", "jax"), ("text", "")])
def test_extras_repeat_the_ranges_of_the_requirements(extra, base):
    listed = requirements("requirements.txt") + EXTRAS["test"]
    for line in EXTRAS[extra]:
        name, bracket, rest = line.partition("[")
        plain = name + rest.partition("]")[2] if bracket else line
        assert plain in listed and name.startswith(base)


def test_every_folder_of_code_is_a_package_that_pyproject_finds():
    found = [pattern.removesuffix("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    for package in found:
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert folders and [folder for folder in folders if not (folder / "__init__.py").exists()] == []
    for package in PROJECT["tool"]["setuptools"]["package-data"]:
        assert (ROOT / package / "py.typed").exists()


def test_importing_nested_costs_nothing(tmp_path):
    """`import nested` brings no jax, from any directory."""
    code = "import sys, nested; assert nested.__version__ and 'jax' not in sys.modules, sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
