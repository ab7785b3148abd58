"""Functions that tests run in child processes, forked from a server that has loaded the libraries.

A new interpreter would take ten seconds to load them. The functions are not beside their tests, so that a child loads
no test.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
# torch and everything for training, encoding and the tiny model
PRELOADED = ["ebr_lib.finetune.trainer", "ebr_lib.inference.run", "polars", "pyarrow.parquet"]
SERVER.set_forkserver_preload([*PRELOADED, "transformers.models.bert.modeling_bert"])


def started(function: Callable[..., None], *given: Any) -> BaseProcess:
    process = SERVER.Process(target=function, args=given)
    process.start()
    return process


def ended(*processes: BaseProcess) -> list[int | None]:
    """Exit statuses: 0, 1 after an exception, or minus the signal."""
    for process in processes:
        process.join(400)
        process.kill()
    return [process.exitcode for process in processes]


def a_free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def train_and_be_killed(config: dict, step: int) -> None:
    from ebr_lib import train_sentence_transformer
    from ebr_lib.finetune import trainer as training

    class Kill(training.TrainingBar):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    training.TrainingBar = Kill
    train_sentence_transformer(config)


def train_in_a_terminal(config: dict, shown: Path) -> None:
    """Send Ctrl-C to each process of this session at the third step; the terminal's output goes to `shown`."""
    from ebr_lib import train_sentence_transformer
    from ebr_lib.finetune.trainer import EbrTrainer
    from ebr_lib.logs import show_logs

    make = EbrTrainer.training_step

    def signalled(self, *given):
        if self.state.global_step == 2:
            os.killpg(0, signal.SIGINT)
        return make(self, *given)

    EbrTrainer.training_step = signalled
    multiprocessing.set_start_method("fork", force=True)  # as in a terminal; this process was forked by a server
    os.setsid()
    with shown.open("w", encoding="utf-8") as sys.stdout, contextlib.suppress(KeyboardInterrupt):
        show_logs()
        train_sentence_transformer(config)


def encode_and_be_killed(knobs: dict, log: Path, at: int) -> None:
    """Encode, and die by SIGKILL at call `at` of those that the library makes, to Python and to C.

    `log` gets the texts of each window and, at the end, the number of calls.
    """
    import torch

    from ebr_lib.inference import local
    from ebr_lib.inference.run import run_batch_inference
    from ebr_lib.model import loading

    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        if "ebr_lib" not in frame.f_code.co_filename:
            return
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)

    encode, prepare = local.LocalEncoder.encode, local.LocalEncoder.prepare

    def logged(self, texts, on_progress):
        os.write(file, (json.dumps(texts) + "\n").encode())
        return encode(self, prepare(self, texts), on_progress)

    torch.set_num_threads(1)
    os.fsync = lambda file: None  # a kill loses nothing that was written; only a power cut would
    model = loading.load_model(knobs["model_name"], device="cpu", side="document")
    loading.load_model = lambda *given, **named: model  # no call of the library: no moment is in it
    local.LocalEncoder.prepare, local.LocalEncoder.encode = lambda self, texts: texts, logged
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    threading.setprofile(count)
    sys.setprofile(count)
    run_batch_inference(knobs)
    sys.setprofile(None)
    os.write(file, f"{calls}\n".encode())


def serve_until_asked(words: list[str], said: Path) -> None:
    """The command `serve`, stopped by a signal while it encodes its first query; what it says goes to `said`."""
    from ebr_lib import cli
    from ebr_lib.serve.engine import Engine

    encode = Engine.encode

    def stopped(self, kind, texts):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # the server sees the signal in another thread
        return encode(self, kind, texts)

    Engine.encode = stopped
    with said.open("w", encoding="utf-8", buffering=1) as sys.stdout:
        sys.exit(cli.main(words))


def be_one_of_two(rank: int, port: int) -> None:
    """Set what torchrun and accelerate set for the processes that they start."""
    set_to = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in set_to.items()} | {"MASTER_ADDR": "localhost"}


def finetune_as_a_process(rank: int, port: int, words: list[str], said: Path) -> None:
    """The command of the first stage as one of two processes; what it says goes to `said`."""
    be_one_of_two(rank, port)
    from ebr_lib.cli import main_finetune

    with said.open("w", encoding="utf-8") as sys.stdout:
        sys.exit(main_finetune(words))


def train_as_a_machine(rank: int, port: int, config: dict) -> None:
    """Train as one of two machines that share no folder; `seen` + rank gets its labels and its last weights."""
    be_one_of_two(rank, port)
    import torch

    from ebr_lib import train_sentence_transformer
    from ebr_lib.finetune import preflight
    from ebr_lib.finetune.callbacks import KeepBest
    from ebr_lib.finetune.losses import ContrastiveLoss
    from ebr_lib.model.adapters import adapter_weights

    forward, restore = ContrastiveLoss.forward, KeepBest.restore
    seen: list[list[int]] = []
    kept: dict[str, torch.Tensor] = {}

    def spy(self, features, labels):
        if getattr(self.model, "module", self.model).training:
            seen.append(labels.tolist())
        return forward(self, features, labels)

    def spy_restore(self, model):
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad and rank == 1:
                    weight.zero_()
        restore(self, model)
        kept.update(adapter_weights(model))

    ContrastiveLoss.forward, KeepBest.restore = spy, spy_restore
    preflight.preflight = lambda trainer: preflight.Preflight()
    folder = Path(config["output_dir"])
    train_sentence_transformer(config | {"output_dir": str(folder / str(rank))})
    torch.save({"labels": seen, "weights": kept}, folder / f"seen{rank}")


def build_again_and_again(folder: Path, files: list[Path], stop: Path) -> None:
    """Replace an index by that of the next file until a file `stop` is there."""
    from ebr_lib.index import run as index_run

    index_run.draw_curve = lambda *_: None
    for file in itertools.cycle(files):
        index_run.build_faiss_index({"embedding_path": str(file), "output_dir": str(folder), "measure_queries": 2})
        if stop.exists():
            return


def add_again_and_again(folder: Path, file: Path, times: int) -> None:
    from ebr_lib.index.change import add_rows

    for _ in range(times):
        add_rows(folder, file)


def hold_an_index_and_be_killed(folder: Path) -> None:
    from ebr_lib.index.store import locked

    with locked(folder):
        os.kill(os.getpid(), signal.SIGKILL)
