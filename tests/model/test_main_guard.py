"""Scripts that start processes: one without a main guard gets the sentence that says so, before anything is started."""

import subprocess
import sys
from pathlib import Path

import pytest

from ebr_lib.errors import ConfigError
from ebr_lib.model import main_guard

ROOT = Path(__file__).parents[2]
CALL = "refuse_script_without_guard('encoding in 2 processes', 'num_processes: 1')"
IMPORT = "from ebr_lib.model.main_guard import refuse_script_without_guard\n"
SPAWN = """
import multiprocessing
def child(): print("child")
def start():
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    print("ended", process.exitcode)
"""


def run(tmp_path: Path, script: str, *, module: bool = False) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "my_script.py"
    path.write_text(IMPORT + script, encoding="utf-8")
    given = ["-m", "my_script"] if module else [str(path)]
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *given], capture_output=True, text=True, check=False, env=environment, timeout=60
    )


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize(
    ("script", "line"),
    [(CALL, 2), (f"def main():\n    {CALL}\nmain()", 4), (f"x = 1\nif x == 1:\n    {CALL}", 4)],
    ids=["bare", "function", "other condition"],
)
def test_a_script_without_a_guard_gets_the_sentence(tmp_path, script, line, module):
    ended = run(tmp_path, script, module=module)
    assert ended.returncode == 1
    assert f"my_script.py, line {line}: encoding in 2 processes starts Python again" in ended.stderr
    assert 'below `if __name__ == "__main__":`, or set num_processes: 1' in ended.stderr


@pytest.mark.parametrize(
    "script",
    [
        f"if __name__ == '__main__':\n    {CALL}",
        f"def main():\n    {CALL}\nif '__main__' == __name__:\n    main()",
        f"import sys\nif __name__ != '__main__':\n    sys.exit()\n{CALL}",
        f"import threading\nthread = threading.Thread(target=lambda: {CALL})\nthread.start()\nthread.join()",
    ],
    ids=["guard", "function", "leaves", "thread"],
)
def test_a_script_with_a_guard_goes_on(tmp_path, script):
    ended = run(tmp_path, script)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_process_that_runs_the_script_again_says_so(tmp_path):
    """Where the script hides that it has no guard, its second run stops."""
    ended = run(tmp_path, f"{SPAWN}\nif __name__ != '__main__':\n    {CALL}\nstart()")
    assert "ended 1" in ended.stdout and "child" not in ended.stdout
    assert "the main script: encoding in 2 processes starts Python again" in ended.stderr


def test_code_outside_a_script_continues(monkeypatch):
    monkeypatch.setattr(main_guard.sys, "modules", {"__main__": object()})
    main_guard.refuse_script_without_guard("encoding", "num_processes: 1")


def test_fine_tuning_asks_where_processes_are_spawned(monkeypatch, tmp_path):
    from ebr_lib.finetune import run as finetune

    def refuse(what, instead):
        raise ConfigError(f"{what}: {instead}")

    monkeypatch.setattr(finetune, "refuse_script_without_guard", refuse)
    monkeypatch.setattr(finetune.multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(ConfigError, match="preparing batches in processes: dataloader_num_workers: 0"):
        finetune.train_sentence_transformer({"dataloader_num_workers": 2, "output_dir": str(tmp_path)})
