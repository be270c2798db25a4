"""The blocks that are left to do; one that runs out of memory is done once more, with less."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.models.stream import ModelStream
from gptq_cli.pipeline.blocks import quantize_blocks
from gptq_cli.pipeline.device_errors import out_of_memory, reason
from gptq_cli.pipeline.events import Report, Warned
from gptq_cli.pipeline.memory import Memory, WaitingRoom
from gptq_cli.pipeline.resume import FinishedBlocks
from gptq_cli.pipeline.run_plan import HEAD, RunPlan
from gptq_cli.pipeline.solver import Keep
from gptq_cli.pipeline.team import Team


def do_blocks(
    stream: ModelStream,
    plan: RunPlan,
    config: QuantizeConfig,
    ids: Tensor,
    keep: Keep,
    saved: FinishedBlocks,
    report: Report,
    team: Team,
) -> None:
    """Do what `saved` has not yet, as one process of `team`.

    Where memory runs out, all of it is given back and the run goes on from what is saved, as the next call would: the
    same bytes. From then on every block is saved. What runs out a second time in the same block ends the run; so does
    the first time in one process of several, since the others wait for it in the middle of that block.
    """
    memory = Memory(stream.device, config.max_vram_bytes, config.max_ram_bytes, team.neighbours)
    memory.enforce()
    room = WaitingRoom(memory, report)
    done_again = None
    while not saved.complete:
        try:
            quantize_blocks(
                stream,
                plan,
                ids.split(config.batch_size),
                true_sequential=config.true_sequential,
                policy=config.fault_policy,
                room=room,
                keep=keep,
                saved=saved,
                report=report,
                team=team,
            )
        except Exception as error:
            if not out_of_memory(error) or team.size > 1 or saved.first == done_again:
                raise
            why = reason(error)
        else:
            return
        done_again = saved.first
        _give_back(stream.device)
        room.narrow()
        saved.save_every_block()
        name = HEAD if done_again == stream.n_blocks else stream.block_name(done_again)
        again = f"`{name}` is done again with no batch waiting inside it, later blocks with half as many"
        report(Warned("W_OOM_RETRY", f"memory ran out: {again}; {_advice(memory)} ({why})"))


def _give_back(device: torch.device) -> None:
    """Let the device have what no tensor needs any more."""
    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each thread that has waited (torch's notes on CUDA); not in builds for the CPU
        getattr(torch._C, "_cuda_clearCublasWorkspaces", int)()
        torch.cuda.empty_cache()


def _advice(memory: Memory) -> str:
    if memory.device.type != "cuda":
        return "a smaller --max-ram lets fewer wait from the start"
    if memory.max_device_bytes is not None:
        return "a larger --max-vram avoids it"
    return "fewer --nsamples or a shorter --seqlen avoid it"
