"""Which precision computes fastest on this processor: measured once, then remembered for the machine.

The instruction set does not tell: with AVX-512 and no bfloat16 units, float32 is 4.4 times as fast as bfloat16; with
such units, bfloat16 is faster. So the model's own matrix product is timed, with many rows (reading) and with one
(generating).
"""

import json
import logging
import math
import os
import platform
import re
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from hippoformer.model.pinned_models import cache_home

_READING_ROWS, _REPEATS = 128, 3
# More weights than a cache holds: a generated token reads all of a model's weights from main memory.
_WEIGHT_BYTES, _MOST_WEIGHTS = 32 << 20, 64

_logger = logging.getLogger(__name__)


def faster_dtype(stored: torch.dtype, config: PreTrainedConfig) -> torch.dtype:
    """`stored`, a half precision, or float32, whichever this processor computes a base of this config faster in.

    The ratio of times is the geometric mean of that of reading and that of generating. A new measurement is logged.
    """
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    # The machine, the software, and the size of the matrices to the nearest power of two.
    key = f"{_processor()}, torch {torch.__version__}, {stored}, 2^{round(math.log2(hidden * intermediate))}"
    file, known = cache_home() / "precision.json", {}
    try:
        known = dict(json.loads(file.read_text(encoding="utf-8")))
        ratio = float(known[key])
    except (OSError, ValueError, TypeError, KeyError) as error:  # nothing there, or damaged: it can be measured again
        _logger.debug("%s is not used: %s", file, error)
        ratio = math.nan
    if not 0 < ratio < math.inf:
        ratio = measured_ratio(stored, hidden, intermediate)
        faster, slower = ("float32", str(stored)[6:]) if ratio > 1 else (str(stored)[6:], "float32")
        line = f"computing in {faster}: {max(ratio, 1 / ratio):.1f} times as fast here as {slower}, measured on "
        line += f"matrices of {hidden} x {intermediate}"
        try:  # the file is written whole
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as scratch:
                json.dump(known | {key: ratio}, scratch, indent=1)
            os.replace(scratch.name, file)
        except OSError as error:
            line += f" (not remembered: {error})"
        _logger.warning(line)
    return torch.float32 if ratio > 1 else stored


def measured_ratio(stored: torch.dtype, hidden: int, intermediate: int) -> float:
    """Time in `stored` over time in float32: above 1 where float32 is faster."""
    logs = []
    for rows in (_READING_ROWS, 1):
        turns = [(stored, torch.float32)] * 2  # alternating: other programs then slow both
        times = [[seconds(dtype, rows, hidden, intermediate) for dtype in turn] for turn in turns]
        half, single = (min(column) for column in zip(*times, strict=True))
        logs.append(math.log(half / single))
    return math.exp(sum(logs) / len(logs))


def seconds(dtype: torch.dtype, rows: int, hidden: int, intermediate: int) -> float:
    """Shortest processor time of a matrix product (rows, hidden) x (hidden, intermediate), on one thread."""
    nbytes = hidden * intermediate * dtype.itemsize
    matrices = 1 if rows > 1 else min(_MOST_WEIGHTS, math.ceil(_WEIGHT_BYTES / nbytes))
    weights = [torch.ones(intermediate, hidden, dtype=dtype) for _ in range(matrices)]
    states = torch.ones(rows, hidden, dtype=dtype)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(1 + _REPEATS):
                start = time.thread_time()
                for weight in weights:
                    torch.nn.functional.linear(states, weight)
                times.append((time.thread_time() - start) / matrices)
    finally:
        torch.set_num_threads(threads)
    return max(min(times[1:]), 1e-9)  # the first one also sets up


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8", errors="replace") if information.is_file() else ""
    named = re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE)
    name = named[1].strip() if named else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
