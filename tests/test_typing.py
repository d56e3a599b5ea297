"""The installed package is typed: a user's program is checked against it, as strictly as pyright can, and runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = Path(__file__).parent / "typed_program.py"
SOURCES = ["slimfit_fx", "passes", "pyproject.toml", "README.md", "LICENSE"]

pytest.importorskip("pyright", reason="the extra dev has pyright, which checks types here")


class Installed(NamedTuple):
    """A folder outside of the repository, and the Python of an environment that has the package installed."""

    folder: Path
    python: Path

    def pyright(self, *arguments: str) -> dict[str, Any]:
        """What pyright says, as it writes it in JSON. PATH names the Python: --verifytypes looks nowhere else."""
        command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
        path = os.pathsep.join([str(self.python.parent), os.environ["PATH"]])
        found = subprocess.run(
            command, cwd=self.folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert found.stdout.lstrip().startswith("{"), found.stdout + found.stderr
        return json.loads(found.stdout)

    def errors(self, program: str) -> list[str]:
        """What is wrong with the types of `program`."""
        (self.folder / "program.py").write_text(program)
        (self.folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", **UNTYPED}))
        found = self.pyright("program.py")
        assert found["summary"]["filesAnalyzed"] == 1
        return [f"{1 + each['range']['start']['line']}: {each['message']}" for each in found["generalDiagnostics"]]


# torch's functions have parameters without types, of which a user's program cannot be the judge
UNTYPED = {"reportUnknownMemberType": "none", "reportMissingTypeStubs": "none"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """The package as pip installs it, beside the libraries that the tests have."""
    folder = tmp_path_factory.mktemp("user")
    source, environment = folder / "source", folder / "environment"
    for name in SOURCES:  # a copy: setuptools builds in the folder of the source
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, _made(source) / name)
    venv.create(environment)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True)
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "libraries.pth").write_text("\n".join(others) + "\n")
    scripts = Path(sysconfig.get_path("scripts", "venv", {"base": str(environment)}))
    return Installed(_made(folder / "program"), scripts / "python")


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_a_users_program_is_typed(installed):
    assert installed.errors(PROGRAM.read_text()) == []


WRONG = {  # a line, and what its error names
    "slimfit_fx.report(model).saved_bytes_after + ''": "Operator",
    "slimfit_fx.gates(model)['0.weight'] = 'open'": "bool",
    "slimfit_fx.scheduler(model).stepp()": "stepp",
    "slimfit_fx.codecs.Quantize(bits='8')": "bits",
    "slimfit_fx.Config(freeze_rate='0.9')": "freeze_rate",
    "slimfit_fx.undo('model')": "Module",
}


def test_wrong_lines_are_seen(installed):
    head = "import slimfit_fx\nfrom torch import nn\n\n\ndef main(model: nn.Module) -> None:\n    "
    errors = installed.errors(head + "\n    ".join(WRONG) + "\n")
    for number, (line, named) in enumerate(WRONG.items(), start=6):
        assert any(error.startswith(f"{number}: ") and named in error for error in errors), line


def test_every_public_name_has_a_type(installed):
    """A type checker that infers none of them, as py.typed allows it to, knows them all."""
    found = installed.pyright("--verifytypes", "slimfit_fx", "--ignoreexternal")["typeCompleteness"]
    assert found["pyTypedPath"].endswith("py.typed")
    types = {symbol["name"]: symbol["isTypeKnown"] for symbol in found["symbols"]}
    public = [
        name for name in types if re.fullmatch(r"slimfit_fx(\.codecs)?\.[A-Z]\w+(\.\w+)*|slimfit_fx\.[a-z_]+", name)
    ]
    assert len(public) > 30
    assert [name for name in public if not types[name]] == []


def test_a_users_program_runs(installed):
    (installed.folder / "program.py").write_text(PROGRAM.read_text())
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(installed.python), "program.py"]
    ran = subprocess.run(command, cwd=installed.folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
