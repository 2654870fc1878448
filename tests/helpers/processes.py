"""A few long-lived processes that speak gloo, so that tests of several do not start them again and again."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rasa_theory.distributed import ALONE, Processes, end_with_parent

_PATIENCE = timedelta(seconds=60)


class Pool:
    """`size` processes. Functions that it runs take `Processes` first, are importable, and return plain data."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context, meeting = multiprocessing.get_context("spawn"), str(Path(self._folder.name) / "meeting")
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [here for here, _ in pipes]
        self._workers = [
            context.Process(target=_work, args=(process, size, meeting, pipes[process][1]), daemon=True)
            for process in range(size)
        ]
        for worker in self._workers:
            worker.start()

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function` returns in each of so many of the processes; in this one alone if it is one."""
        if world_size == 1:
            return [function(ALONE, *arguments)]
        for pipe in self._pipes:
            pipe.send((world_size, function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        for answer in answers:
            if isinstance(answer, _Failed):
                raise AssertionError(answer.text)
        return answers[:world_size]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for worker in self._workers:
            worker.join(10)
            worker.kill()
        self._folder.cleanup()


class _Failed:
    def __init__(self, text: str) -> None:
        self.text = text


def _work(process: int, size: int, meeting: str, pipe: Any) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=process, world_size=size, timeout=_PATIENCE)
    groups = {n: dist.new_group(range(n), timeout=_PATIENCE) for n in range(2, size + 1)}
    while (task := pipe.recv()) is not None:
        world_size, function, arguments = task
        try:
            pipe.send(function(Processes(groups[world_size]), *arguments) if process < world_size else None)
        except Exception:
            pipe.send(_Failed(traceback.format_exc()))
