"""The set-up of scripts/*.sh, with a stand-in for Python that only records its calls."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = (
    "awk",
    "bash",
    "cat",
    "cp",
    "dirname",
    "find",
    "grep",
    "head",
    "ls",
    "mkdir",
    "mktemp",
    "rm",
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the scripts are for bash")

PINNED = "--disable-pip-version-check -c constraints.txt"

# Stands in for the system's Python, and copied into .venv for the one there.
FAKE_PYTHON = f"""#!{shutil.which("bash")}
echo "$*${{PYTHONPATH:+ PYTHONPATH=$PYTHONPATH}}" >>"$CALLS"
case "$*" in
  "- "*) exec "{sys.executable}" "$@" ;;
  *"-m venv"*) for dir; do :; done; rm -rf "$dir"; mkdir -p "$dir/bin"; cp "$0" "$dir/bin/python" ;;
  *"-m pip"*)
    [ -z "${{PIP_FAILS:-}}" ] || {{ echo "$PIP_FAILS"; exit 1; }}
    cp "$FAKE_SPECTRAL" "$(dirname "$0")/spectral" ;;
  *ensurepip*) exit "${{NO_VENV:-0}}" ;;
  *version_info*) exit "${{TOO_OLD:-0}}" ;;
esac
"""

FAKE_SPECTRAL = f"""#!{shutil.which("bash")}
echo "spectral $*" >>"$CALLS"
case "$1" in
  fit)
    dir=runs/gpt_quickstart/version_0/checkpoints
    [ -n "${{NO_CHECKPOINT:-}}" ] || {{ mkdir -p "$dir"; echo weights >"$dir/last step.ckpt"; }} ;;
  generate) echo "a sample of $3" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Machine:
    """A clone in a folder with spaces, and a PATH that holds only what is put there."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "my clone"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.clone.mkdir()
        self.bin.mkdir()
        shutil.copytree(ROOT / "scripts", self.clone / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.clone)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or "missing")
        self.set_free_disk(mb=100_000)
        executable(folder / "spectral", FAKE_SPECTRAL)
        self.env = {
            "PATH": str(self.bin),
            "CALLS": str(self.calls_file),
            "FAKE_SPECTRAL": str(folder / "spectral"),
        }

    def add_python(self, name: str = "python3") -> None:
        executable(self.bin / name, FAKE_PYTHON)

    def set_free_disk(self, *, mb: int) -> None:
        header = "Filesystem 1024-blocks Used Available Capacity Mounted on"
        line = f"/dev/disk 1 1 {mb * 1024} 1% /"
        executable(self.bin / "df", f"#!{shutil.which('bash')}\necho '{header}'\necho '{line}'\n")

    def run(self, script: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        return subprocess.run(
            [str(self.bin / "bash"), str(self.clone / "scripts" / script), *args],
            cwd="/",
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def calls(self, containing: str) -> list[str]:
        return [line for line in self.calls_file.read_text().splitlines() if containing in line]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def fails_with(result: subprocess.CompletedProcess[str], text: str) -> bool:
    """Whether a script failed with one sentence on standard error that holds `text`."""
    lines = result.stderr.splitlines()
    return result.returncode != 0 and len(lines) == 1 and text in lines[0]


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_help_installs_nothing(machine, script):
    result = machine.run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: bash scripts/{script}")
    assert not (machine.clone / ".venv").exists()


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_a_machine_without_python_is_told_so(machine, script):
    assert fails_with(machine.run(script), "No Python >= 3.11 was found on PATH")


def test_an_old_python_does_not_count(machine):
    machine.add_python()
    assert fails_with(machine.run("test.sh", TOO_OLD="1"), "No Python >= 3.11 was found on PATH")


def test_a_python_without_venv_module_is_told_so(machine):
    machine.add_python("python3.12")
    result = machine.run("test.sh", NO_VENV="1")
    assert fails_with(result, "python3.12 has no venv module; install it")


def test_a_full_disk_is_told_before_anything_is_made(machine):
    machine.add_python()
    machine.set_free_disk(mb=100)
    assert fails_with(machine.run("test.sh"), "needs about 3000 MB of free disk space")
    assert not (machine.clone / ".venv").exists()


def test_a_failed_installation_names_its_log(machine):
    machine.add_python()
    result = machine.run("test.sh", PIP_FAILS="ERROR: no such package")
    log = machine.clone / ".venv/spectral-install.log"
    assert fails_with(result, f"pip could not install the packages; its output is in {log}.")
    assert "no such package" in log.read_text()


def test_a_disk_filled_by_the_installation_is_told_so(machine):
    machine.add_python()
    result = machine.run("test.sh", PIP_FAILS="OSError: [Errno 28] No space left on device")
    assert fails_with(result, "is full; free about 3000 MB and try again")


def test_a_failed_installation_is_taken_up_again(machine):
    machine.add_python()
    machine.run("test.sh", PIP_FAILS="ERROR: the network is down")
    result = machine.run("test.sh")
    assert result.returncode == 0, result.stderr
    assert machine.calls("-m pytest")


def test_pip_comes_first_then_torch_then_the_project(machine):
    machine.add_python()
    assert machine.run("test.sh").returncode == 0
    installs = [call.split("constraints.txt", 1)[1] for call in machine.calls("-m pip install")]
    assert installs == [
        " --upgrade pip",
        " torch",
        " --build-constraint constraints.txt -e . --group test",
    ]


def test_the_demo_installs_no_test_tools(machine):
    machine.add_python()
    assert machine.run("demo.sh").returncode == 0
    assert not machine.calls("--group")


def test_a_torch_index_is_handed_to_pip_for_torch_alone(machine):
    machine.add_python()
    index = "https://download.pytorch.org/whl/cpu"
    machine.run("test.sh", SPECTRAL_TORCH_INDEX=index)
    (call,) = machine.calls("--extra-index-url")
    assert call.endswith(f"install {PINNED} torch --extra-index-url {index}")


def test_a_second_run_installs_nothing(machine):
    machine.add_python()
    machine.run("test.sh")
    result = machine.run("test.sh", "-k", "monitor and not slow")
    assert "Already installed" in result.stdout
    assert not machine.calls("-m pip")
    options = "-n auto --maxprocesses 4 --dist loadfile"
    assert machine.calls("-m pytest") == [f"-m pytest {options} -k monitor and not slow"]


def test_the_demo_needs_nothing_more_after_the_tests(machine):
    machine.add_python()
    machine.run("test.sh")
    assert "Already installed" in machine.run("demo.sh").stdout


def test_the_tests_need_more_after_the_demo(machine):
    machine.add_python()
    machine.run("demo.sh")
    machine.run("test.sh")
    assert machine.calls("--group test")


def test_a_changed_constraint_is_installed(machine):
    machine.add_python()
    machine.run("test.sh")
    with (machine.clone / "constraints.txt").open("a") as file:
        file.write("new-package==1.0\n")
    machine.run("test.sh")
    assert machine.calls("-m pip")


def test_a_moved_clone_is_installed_again(machine):
    machine.add_python()
    machine.run("test.sh")
    machine.clone = machine.clone.rename(machine.clone.with_name("moved clone"))
    machine.run("test.sh")
    assert machine.calls("-e .")


def test_a_broken_venv_is_rebuilt(machine):
    machine.add_python()
    broken = machine.clone / ".venv/bin/python"
    broken.parent.mkdir(parents=True)
    broken.symlink_to("/nowhere/python3")
    result = machine.run("test.sh")
    assert result.returncode == 0, result.stderr
    assert "Rebuilding .venv" in result.stdout
    assert machine.calls("-m venv --clear")


def test_the_demo_trains_and_then_writes_text(machine):
    machine.add_python()
    result = machine.run("demo.sh", "--trainer.max_steps", "2")
    assert result.returncode == 0, result.stderr
    checkpoint = "runs/gpt_quickstart/version_0/checkpoints/last step.ckpt"
    assert machine.calls("spectral")[-2:] == [
        "spectral fit --config configs/gpt_quickstart.yaml --trainer.max_steps 2",
        f"spectral generate --checkpoint {checkpoint} --prompt The function returns",
    ]
    assert f'tensorboard" --logdir "{machine.clone}/runs/gpt_quickstart"' in result.stdout
    assert f"a sample of {checkpoint}" in result.stdout


def test_the_demo_does_not_take_an_old_checkpoint_for_its_own(machine):
    machine.add_python()
    machine.run("demo.sh")
    result = machine.run("demo.sh", NO_CHECKPOINT="1")
    assert result.returncode == 0
    assert "left no checkpoint" in result.stdout
    assert not machine.calls("generate")


def test_the_callers_python_path_does_not_leak_into_the_venv(machine):
    machine.add_python()
    machine.run("test.sh", PYTHONPATH=os.fspath(machine.clone))
    assert machine.calls("PYTHONPATH=") == []
