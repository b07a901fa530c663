"""Runs trainings in processes of their own: several that work together, and some that are killed.

`python tests/forge.py` imports everything once, then takes a job a line (JSON) and forks a process for each of its
runs, so that a test does not pay for imports. It answers with the exit codes, negative for a signal.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
import transformers.models.llama.modeling_llama  # noqa: F401, loaded lazily otherwise, in every process

import hippoformer.model.checkpoint
import hippoformer.train

# Where a run can be killed: the function it is about to call.
DEATHS: dict[str, tuple[Any, str]] = {
    "tensors": (hippoformer.model.checkpoint, "save_file"),  # in the middle of a checkpoint
    "rename": (os, "replace"),  # everything written, or a file of it, nothing in place
    "step": (torch.optim.AdamW, "step"),  # between two checkpoints
}


def die_at(where: str, count: int) -> None:
    """SIGKILL at the `count`-th call of that function, nobody gets to clean up."""
    owner, name = DEATHS[where]
    real, calls = getattr(owner, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, call)


def shard_on_cpu() -> None:
    """FSDP2 where accelerate offers it for accelerators alone; from there on it is accelerate's and torch's own."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState

    real = hippoformer.train.new_accelerator

    def sharding(*args: Any) -> Accelerator:
        accelerator = real(*args)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="transformer_based_wrap"
        )
        accelerator.state.fsdp_plugin = plugin
        for state in (PartialState._shared_state, accelerator.state.__dict__):
            state["distributed_type"] = DistributedType.FSDP
        assert accelerator.is_fsdp2
        return accelerator

    hippoformer.train.new_accelerator = sharding


def run(job: dict[str, Any]) -> int:
    """One training in this process."""
    os.environ.update(job.get("env", {}))
    torch.set_num_threads(1)
    if "die" in job:
        die_at(*job["die"])
    if job.get("fsdp"):
        shard_on_cpu()
    return hippoformer.train.main(job["argv"])


def main() -> None:
    """Answers jobs until the input ends."""
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            child = os.fork()
            if child == 0:
                log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                code = 1
                try:
                    code = run(job)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
