"""A first launch of the solver's kernels, so that a machine that cannot compile them is told early.

Triton compiles each kernel at its first launch, with a C compiler and the headers of Python, and
writes the result into its cache. Where one of them is missing, torch operations do the same steps.
The launch also compiles what the run needs, in a thread, while the main thread imports transformers
and opens the model.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from subprocess import CalledProcessError
from threading import Thread

import torch

from gptq_cli.config.layer import LayerConfig
from gptq_cli.events import Report, Warned
from gptq_cli.runtime.memory import gpu_lost, out_of_memory
from gptq_cli.runtime.processes import FIRST_KERNELS
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.factor import prepare
from gptq_cli.solver.numerics import WITHOUT_KERNELS, has_triton
from gptq_cli.solver.solve import solve
from gptq_cli.solver.triton_launch import MOST_COLUMNS

KERNELS = "gptq_cli.solver.triton_kernels"
ROWS = 32  # a multiple of 16, for which Triton compiles what it compiles for usual layers


class KernelTrial:
    """The first launch of the kernels that solve a layer with `config`, begun in a thread."""

    def __init__(self, device: torch.device, config: LayerConfig) -> None:
        self._device = device
        self._error: Exception | None = None
        self._told = False
        # Modules that import each other are imported here, as the main thread goes on importing.
        self._try(partial(import_module, KERNELS))
        launch = partial(_launch, device, config)
        # If a program ends, it waits for this thread: a daemon that compiles would abort it.
        self._thread = Thread(target=self._try, args=(launch,), name=FIRST_KERNELS)
        WITHOUT_KERNELS.discard(device.type)
        self._thread.start()

    def settle(self, ranks: Ranks, report: Report) -> None:
        """Wait for the launch. If it failed in any of the processes, all use torch operations.

        W_NO_KERNELS is then reported, once. Raises the error if the GPU or its memory has failed.
        """
        self._thread.join()
        reasons = ranks.all_gather([self._reason()])
        for reason in filter(None, reasons):
            WITHOUT_KERNELS.add(self._device.type)
            text = f"the solver's kernels cannot run on {self._device}: {reason}"
            slower = "torch does the same steps, about ten times slower (estimated)"
            if not self._told:  # by the measurement before a run with a goal
                report(Warned("W_NO_KERNELS", f"{text}; {slower}"))
            self._told = True
            return

    def _try(self, step: Callable[[], object]) -> None:
        if self._error is not None or not has_triton():
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001  of compilers and file systems; told by `settle`
            self._error = error

    def _reason(self) -> str:
        """Return why no kernel can run, "" if they can; raise an error of the GPU itself."""
        if not has_triton():
            return "triton is not installed"
        if self._error is None:
            return ""
        if out_of_memory(self._error) or gpu_lost(self._error):
            raise self._error
        return why_no_kernels(self._error)


def _launch(device: torch.device, config: LayerConfig) -> None:
    """Solve a small layer, with the kernels and the sizes of groups of a run."""
    torch.cuda.set_device(device)
    columns = config.group_size
    if columns < MOST_COLUMNS:  # -1 is the whole row
        columns = MOST_COLUMNS
    weight = torch.eye(columns, device=device)[:ROWS]
    hessian = torch.eye(columns, device=device)
    solve(weight, hessian, prepare(hessian, config, columns), config)
    torch.cuda.synchronize(device)


def why_no_kernels(error: Exception) -> str:
    """Return the reason of a failed launch, with what helps."""
    if isinstance(error, CalledProcessError):
        compiler = Path(str(error.cmd[0])).name
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
            return f"`{compiler}` finds no Python.h; install the headers of Python (python3-dev)"
        return f"`{compiler}` failed with exit code {error.returncode}"
    if isinstance(error, OSError) and error.filename is not None:
        if error.filename == os.environ.get("CC"):
            return f"CC names `{error.filename}`, which cannot run ({error.strerror})"
        where = f"Triton cannot write `{error.filename}` ({error.strerror})"
        return f"{where}; set TRITON_CACHE_DIR to a folder that can be written"
    if "C compiler" in str(error):
        return "there is no C compiler; install gcc, or set CC"
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"
