"""The shape of the code, checked: imports point one way, stages never meet, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ullme_ray

PACKAGE = Path(ullme_ray.__file__).parent
STAGES = {"train", "mine", "embed", "serve", "evaluate"}
# Who may import whom, bottom first: a module imports only from its own layer or those before it (DESIGN: layout).
LAYERS = [
    {"errors"},
    {"reach"},
    {"spec", "storage", "store_probes"},
    {"logs", "telemetry"},
    {"losses", "pairs", "model", "retrieval", "report", "sample_data", "progress", "table", "row_files", "vectors", "ray_data"},
    STAGES | {"vector_stores"},
    {"runtime", "plan", "parity", "ledger", "run"},
    {"deploy"},
    {"cli"},
    {"__main__"},
]


def modules() -> dict[str, set[str]]:
    """Every module of the package (`train.loop`) with all that it imports, also inside functions."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        imports: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imports |= {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = imports
    assert len(found) > 30
    return found


def part_of(module: str) -> str:
    """`ullme_ray.train.loop.x` -> train."""
    return module.removeprefix("ullme_ray.").split(".")[0]


def layer_of(part: str) -> int:
    (layer,) = [number for number, parts in enumerate(LAYERS) if part in parts]
    return layer


def own_imports(imports: set[str]) -> set[str]:
    return {part_of(name) for name in imports if name.startswith("ullme_ray.") and part_of(name) != "__version__"}


def test_imports_point_one_way() -> None:
    wrong = []
    seen = 0
    for module, imports in modules().items():
        if module == "__init__":
            continue
        for target in own_imports(imports) - {part_of(module)}:
            seen += 1
            if layer_of(target) > layer_of(part_of(module)):
                wrong.append(f"{module} imports {target}")
    assert seen > 50
    assert wrong == []


def test_stages_never_import_one_another() -> None:
    seen = set()
    for module, imports in modules().items():
        if part_of(module) in STAGES:
            seen.add(part_of(module))
            assert not own_imports(imports) & STAGES - {part_of(module)}, module
    assert seen == STAGES


@pytest.mark.parametrize(
    "part", ["errors", "spec", "storage", "losses", "pairs", "model", "retrieval", "table", "row_files", "vectors"]
)
def test_ray_is_not_imported_below_the_stages(part: str) -> None:
    found = {module: imports for module, imports in modules().items() if part_of(module) == part}
    assert found
    for module, imports in found.items():
        assert not {name for name in imports if name.split(".")[0] == "ray"}, module


def test_deepspeed_is_imported_in_one_file() -> None:
    users = {module for module, imports in modules().items() if any(name.split(".")[0] == "deepspeed" for name in imports)}
    assert users == {"train.deepspeed"}


def test_the_check_would_see_a_wrong_import() -> None:
    """The control: the same functions find a stage that imports another."""
    assert own_imports({"ullme_ray.serve.launch.start_server", "numpy"}) == {"serve"}
    assert layer_of("serve") > layer_of("model")


def test_public_surface() -> None:
    assert ullme_ray.__all__ == ["JobSpec", "UllmeError", "__version__", "load_job"]
    for name in ullme_ray.__all__:
        assert getattr(ullme_ray, name) is not None


@pytest.mark.parametrize(
    "code",
    [
        "import ullme_ray",
        "import ullme_ray.cli",
        "from typer.testing import CliRunner; from ullme_ray.cli import app;"
        " assert CliRunner().invoke(app, ['check', 'jobs/quickstart.yaml']).exit_code == 0",
    ],
    ids=["package", "command line", "check"],
)
def test_check_loads_neither_torch_nor_ray(code: str) -> None:
    heavy = "{'torch', 'ray', 'transformers', 'deepspeed', 'numpy', 'pyarrow', 's3fs', 'fastapi'}"
    report = f"{code}\nimport sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_is_for() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    without = [str(path) for path in files if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert without == []


def test_no_print_outside_the_command_line() -> None:
    """Library code logs or reports progress; only the commands talk to stdout."""
    talkers = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if any(isinstance(call, ast.Name) and call.id == "print" for call in calls):
            talkers.add(str(path.relative_to(PACKAGE)))
    commands = {f"cli/{name}.py" for name in ("cluster", "files", "results", "shared")}
    assert talkers == commands | {"run.py", "progress.py", "deploy/starter.py"}


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by name: it would refuse the whole run, though each folder passes by itself."""
    names = [path.name for path in Path(__file__).parents[1].rglob("test_*.py")]
    assert len(names) > 30
    assert sorted(names) == sorted(set(names))
