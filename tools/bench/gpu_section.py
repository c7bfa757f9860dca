"""A process of the GPU benchmark: runs sections and writes each figure as a line of JSON as soon as it is known.

Started by gpu.py: `gpu_section.py '{"sections": ["matmul"], "size": "mistral"}'`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

PRECISIONS = {
    "bf16": {},
    "fp8_tensorwise": dict(fp8="tensorwise"),
    "fp8_delayed": dict(fp8="delayed"),
    "fp8_blockwise": dict(fp8="blockwise"),
    "fp8_attention": dict(fp8="delayed", fp8_attention="on"),
}


def work_of(section: str) -> Callable:
    """What a section does; takes figures and a size."""
    if section in ("matmul", "loss", "kernels"):
        import gpu_parts

        return getattr(gpu_parts, section)
    if section == "attention":
        import gpu_attention

        return gpu_attention.attention
    if section in ("st_plain", "st_best", "nemo"):
        import gpu_peers

        return getattr(gpu_peers, section.removeprefix("st_"))
    kind, _, precision = section.partition("_")
    if kind == "profile":
        import gpu_profile

        return partial(gpu_profile.profile, name=precision, precision=PRECISIONS[precision])
    import gpu_ours

    work = {"lora": gpu_ours.lora, "full": gpu_ours.full}[kind]
    return partial(work, name=precision, precision=PRECISIONS[precision])


def main() -> None:
    settings = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    from gpu_measure import Figures, release
    from gpu_workload import MISTRAL, TINY

    from nvembed_mcore import device

    if settings["size"] == "mistral" and not device.has_cuda():
        sys.exit("error: there is no CUDA device, and this model is too large for a CPU; try --device cpu --tiny")
    figures, size = Figures(out), {"mistral": MISTRAL, "tiny": TINY}[settings["size"]]
    for section in settings["sections"]:
        begin = time.perf_counter()
        try:
            work_of(section)(figures, size)
            outcome = f"done in {time.perf_counter() - begin:.0f} s"
        except Exception as error:  # a section must not take the others with it
            traceback.print_exc()
            outcome = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        figures.add(**{f"section_{section}": outcome})
        release()


if __name__ == "__main__":
    main()
