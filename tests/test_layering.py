"""The layers of the package: who may import whom, and which third party belongs to which module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "byol_timm"
RECIPES = PACKAGE.parent / "recipes"

# A module may import those of the lines above its own, and nothing beside it.
LAYERS = [
    ["errors"],
    ["decoding", "network"],
    ["sources"],
    ["config", "augment", "data", "shards", "optim", "checkpoint", "metrics", "interruption", "card", "encoder",
     "launch", "peers"],
    ["byol", "hub", "defaults", "report", "streaming", "cache"],
    ["evaluation", "convert", "fidelity"],
    ["summary", "monitor", "extraction"],
    ["pretraining"],
    ["benchmark"],
    ["comparison"],
    ["__init__", "__main__"],
]  # fmt: skip
OWNERS = {
    "accelerate": {"launch", "pretraining", "summary"},
    "datasets": {"sources", "shards"},
    "fsspec": {"shards"},
    "pyarrow": {"sources", "shards", "extraction"},
    "PIL": {"decoding"},
    "huggingface_hub": {"hub", "card", "network"},
    "joblib": {"launch"},
    "matplotlib": {"report"},
    "psutil": {"launch"},
    "sklearn": {"benchmark", "evaluation", "report"},
    "scipy": {"comparison"},
    "tyro": {"config"},
    "yaml": {"config", "card", "report"},
}


def imports(path):
    """(module of the package or third party, whether it is the package's) for every import of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield from ([(node.module, True)] if node.module else [(alias.name, True) for alias in node.names])
            else:
                yield node.module.partition(".")[0], False
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], False


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_every_module_has_its_layer():
    assert MODULES == sorted(name for layer in LAYERS for name in layer)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_to_lower_layers_only(module):
    level = next(number for number, layer in enumerate(LAYERS) if module in layer)
    below = {name for layer in LAYERS[:level] for name in layer}
    used = {name for name, ours in imports(PACKAGE / f"{module}.py") if ours}
    assert used <= below | {"__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_every_third_party_has_its_owner(module):
    used = {name for name, ours in imports(PACKAGE / f"{module}.py") if not ours}
    assert {name for name in used & OWNERS.keys() if module not in OWNERS[name]} == set()


def test_recipes_import_the_package_and_nothing_below_it():
    for recipe in RECIPES.glob("*.py"):
        used = {name for name, _ in imports(recipe)}
        assert used & {"accelerate", "datasets", "huggingface_hub", "sklearn"} == set(), recipe.name


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, byol_timm, byol_timm.config; print(sorted({'torch', 'timm', 'tyro'} & sys.modules.keys()))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_every_public_name_is_there():
    import byol_timm

    assert {name for name in byol_timm.__all__ if getattr(byol_timm, name).__doc__ is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'teacher'"):
        getattr(byol_timm, "teacher")  # noqa: B009
