"""The layers of the package: who may import whom, and which third party belongs to which module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "byol_timm"
RECIPES = PACKAGE.parent / "recipes"

# Upwards: a package imports from those of the lines above its own, and only what their doors list.
ORDER = [
    ["errors"],
    ["files"],
    ["config"],
    ["views", "report"],
    ["encoders", "cli"],
    ["data"],
    ["byol"],
    ["training"],
    ["evaluation"],
    ["pretraining"],
    ["__init__", "__main__"],
]
OWNERS = {
    "accelerate": {"training/processes", "training/step", "training/graph"},
    "datasets": {"data/opening", "data/tables", "data/streams"},
    "fsspec": {"data/streams"},
    "pyarrow": {"data/tables", "data/streams"},
    "PIL": {"data/decoding"},
    "huggingface_hub": {"encoders/hub", "encoders/card", "encoders/fetch"},
    "joblib": {"training/processes"},
    "matplotlib": {"report"},
    "psutil": {"data/cache", "training/processes"},
    "sklearn": {"evaluation/classifier", "report", "data/opening"},
    "scipy": {"evaluation/metrics"},
    "tyro": {"cli"},
    "yaml": {"cli", "config", "encoders/card", "report"},
}  # fmt: skip
FILES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


def imports(path):
    """Yield (module, names, dots) for every import of a file; dots: 0 for other packages than ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names], node.level
        elif isinstance(node, ast.Import):
            yield from ((alias.name, [], 0) for alias in node.names)


def room(file):
    return file.partition("/")[0]


def test_every_room_has_its_place():
    assert sorted({room(file) for file in FILES}) == sorted(name for line in ORDER for name in line)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_and_through_doors(file):
    own = room(file)
    level = next(number for number, line in enumerate(ORDER) if own in line)
    below = {name for line in ORDER[:level] for name in line}
    for module, names, dots in imports(PACKAGE / f"{file}.py"):
        outside = dots == 2 or (dots == 1 and "/" not in file)
        if not outside or names == ["__version__"]:
            continue
        for target in [module] if module else names:
            assert target in below, f"{file} imports {target}"


@pytest.mark.parametrize("file", FILES)
def test_every_third_party_has_its_owner(file):
    used = {module.partition(".")[0] for module, _, dots in imports(PACKAGE / f"{file}.py") if not dots}
    assert {name for name in used & OWNERS.keys() if file not in OWNERS[name]} == set()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_recipes_import_through_doors(recipe):
    modules = [module for module, _, _ in imports(recipe)]
    assert {module for module in modules if module.startswith("byol_timm.") and module.count(".") > 1} == set()
    # The photographs of the benchmark come with scikit-learn.
    used = {module.partition(".")[0] for module in modules if module != "sklearn.datasets"}
    assert used & {"accelerate", "datasets", "huggingface_hub", "sklearn"} == set()


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, byol_timm, byol_timm.config; print(sorted({'torch', 'timm', 'tyro'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_every_public_name_is_there():
    import byol_timm

    assert {name for name in byol_timm.__all__ if getattr(byol_timm, name).__doc__ is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'teacher'"):
        getattr(byol_timm, "teacher")  # noqa: B009
