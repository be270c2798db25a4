"""`gptq check-engine`: run an engine on a checkpoint, and compare it with this reader."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, aligned, joined, on_one_line
from gptq_cli.cli.launch import stoppable
from gptq_cli.cli.progress import Progress
from gptq_cli.config.fields import Panel, seconds
from gptq_cli.config.resolve import check_flags
from gptq_cli.errors import ConfigError, GateError, clock
from gptq_cli.evaluation.request import CHECKED_ENGINES, EngineRequest

if TYPE_CHECKING:
    from gptq_cli.evaluation.engine_check import EngineResult

# Runs of llama.cpp, MLX and vLLM on a small trained model gave 4e-6 to 1.8e-4; a 4-bit checkpoint
# is itself about 3e-3 from the original.
MAX_KL = 0.002
TIMEOUT = "15m"
SHOWN = 40  # letters of a prompt

Engine = Annotated[
    str,
    o.plain("--engine", help="engine to run", metavar="|".join(CHECKED_ENGINES), panel=Panel.RUN),
]
Python = Annotated[
    str | None,
    o.plain(
        "--python",
        help="Python that has the engine; default that of gptq",
        metavar="FILE",
        panel=Panel.RUN,
    ),
]
Converter = Annotated[
    str | None,
    o.plain(
        "--converter",
        help="llama.cpp's convert_hf_to_gguf.py",
        metavar="FILE",
        panel=Panel.RUN,
    ),
]
Timeout = Annotated[
    str,
    o.plain(
        "--timeout",
        help=f"end the engine after this time, such as 90s or 90; default {TIMEOUT}",
        metavar="TIME",
        panel=Panel.RUN,
    ),
]
Prompts = Annotated[
    str | None,
    o.plain(
        "--prompts",
        help="file with a prompt on each line; default a few sentences",
        metavar="FILE",
        panel=Panel.TEXT,
    ),
]
MaxKl = Annotated[
    float,
    o.plain(
        "--max-kl",
        help=f"exit 4 if the mean KL is larger; default {MAX_KL}",
        metavar="X",
        panel=Panel.GATE,
    ),
]


@o.takes_settings("device", "trust_remote_code")
def check_engine(
    model: o.Model,
    engine: Engine,
    *,
    python: Python = None,
    converter: Converter = None,
    prompts: Prompts = None,
    max_kl: MaxKl = MAX_KL,
    timeout: Timeout = TIMEOUT,
    settings: o.Settings,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Check that an engine computes with a checkpoint what it should.

    The engine runs in its own Python. After parts of a few prompts, its
    predictions are compared with those of the decoded weights in float32.
    The exit code is 4 if they differ or if the engine fails.

    Example: gptq check-engine ./out --engine vllm --python ./vllm-env/bin/python
    """
    check_flags(settings)
    if not 0 < max_kl < math.inf:
        raise ConfigError("E_CFG_RANGE", f"--max-kl must be a number above 0, got {max_kl}")
    limit = seconds(timeout, "--timeout", plain=True)
    assert limit is not None
    request = EngineRequest(
        engine,
        python=python,
        converter=converter,
        prompts=prompts,
        timeout=limit,
        revision=revision,
        **settings,
    )
    console = Console(as_json, quiet)
    from gptq_cli.evaluation.engine_check import check_engine

    with stoppable(console), Progress(console) as progress:
        result = check_engine(model, request, progress)
    data = {**result.to_json(), "max_kl": max_kl}
    if result.kl <= max_kl:
        text = f"{_table(result)}\n{_agreement(result, max_kl)}"
        console.result(data, text, f"{result.kl:.6g}")
    else:
        console.refused(data, _table(result), f"{result.kl:.6g}", _difference(result, max_kl))


def _table(result: EngineResult) -> str:
    rows = [("KL", "top-1", "prompt")]
    for found in result.prompts:
        prompt = on_one_line(found.prompt)
        if len(prompt) > SHOWN:
            prompt = prompt[: SHOWN - 3] + "..."
        rows.append((f"{found.kl:.2e}", _share(found.top1_agreement, found.positions), prompt))
    whole = _share(result.top1_agreement, result.positions)
    rows.append((f"{result.kl:.2e}", whole, f"all, {clock(result.seconds)}"))
    return joined(aligned(rows))


def _share(agreement: float, n_positions: int) -> str:
    return f"{round(agreement * n_positions)} of {n_positions}"


def _named(result: EngineResult) -> str:
    """Return the engine with the versions of its packages."""
    versions = [f"{package} {version}" for package, version in result.versions.items()]
    return f"{result.engine} ({', '.join(versions) or 'version unknown'})"


def _agreement(result: EngineResult, max_kl: float) -> str:
    return f"{_named(result)} agrees with this reader: KL {result.kl:.2e}, limit {max_kl:g}"


def _difference(result: EngineResult, max_kl: float) -> GateError:
    message = f"{_named(result)} computes something else than the decoded weights"
    measured = f"KL {result.kl:.3g}, limit {max_kl:g}"
    hint = "do not serve the checkpoint with it: gptq inspect shows what each engine misreads"
    return GateError("E_ENGINE_DIFFERS", f"{message}: {measured}", hint=hint)
