"""Steps over long texts with one process and with two that share each text: time, memory, what is sent.

A model with the shape of Mistral's layers, narrow enough for a CPU; random weights and tokens; float32, one thread a
process. Run from the root of the repository:

    PYTHONPATH=. python tools/bench/context.py [--tokens 8192] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from statistics import median

import numpy as np

from tests.helpers.world import World

FIGURES = """
A step is forward, loss, backward, clipping and AdamW on --texts pairs of a short query and a text of --tokens tokens,
a text a pack; its graph is kept (`retain`). cp1 is one process that has the texts whole, cp2 two processes that have
half of each.

  cpC_seconds       of a step, the median of --steps after one that warms up
  cpC_graph_bytes   what one text's graph keeps on one process until its backward pass
  cpC_peak_bytes    high-water mark of one process's resident memory, libraries (0.6 GB or so) included
  cpC_sent_bytes    what a process hands to collectives over the ranks that share its texts, in one step
  graph_ratio       cp2_graph_bytes / cp1_graph_bytes; one half, and keys and values of the other half
  seconds_ratio     cp1_seconds / cp2_seconds
"""
WIDTHS = dict(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=448,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=32768,
)


def measure(cp: int, tokens: int, texts: int, steps: int) -> dict[str, float]:
    """What one of the processes finds; all call this."""
    from nvembed_mcore.data.packing import Split, make_pack
    from nvembed_mcore.memory import graph_bytes
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.parallel.traffic import Traffic
    from tests.helpers import models
    from tests.helpers.cases import Case, build_step

    case = Case(world=cp, cp=cp, way="retain", budget=tokens // cp, distributed=False)
    step, groups, *_ = build_step(case, **WIDTHS)
    (chunk,) = step.chunks
    pack = make_pack(models.random_texts([tokens], WIDTHS["vocab_size"]), split=Split(groups.cp_rank, cp))
    kept = graph_bytes(lambda: chunk(pack), list(chunk.module.parameters()))
    batch, seconds = batch_of(texts, tokens), []
    with Traffic(groups) as traffic:
        step(batch, 1, PhaseTimer())
    for number in range(2, 2 + steps):
        began = time.perf_counter()
        step(batch, number, PhaseTimer())
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": median(seconds),
        "graph_bytes": kept,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "sent_bytes": sum(bytes for (_, group), bytes in traffic.bytes.items() if group == "context"),
    }


def batch_of(texts: int, tokens: int):
    from nvembed_mcore.data.batch import Sample, make_batch
    from tests.helpers import models

    samples = []
    for number in range(texts):
        query, document = models.random_texts([32, tokens], WIDTHS["vocab_size"], seed=number)
        samples.append(Sample(query, [document], np.array([number]), np.array([number]), True))
    return make_batch(samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of a long text (default: 8192)")
    parser.add_argument("--texts", type=int, default=2, help="pairs of a batch (default: 2)")
    parser.add_argument("--steps", type=int, default=3, help="default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE as one flat object")
    chosen = parser.parse_args()
    figures: dict[str, float] = {"tokens": chosen.tokens, "texts": chosen.texts}
    for cp in (1, 2):
        world = World(cp)
        try:
            ranks = world.run(measure, cp, chosen.tokens, chosen.texts, chosen.steps, timeout_seconds=3600)
        finally:
            world.stop()
        figures |= {f"cp{cp}_{name}": max(rank[name] for rank in ranks) for name in ranks[0]}
    figures["graph_ratio"] = figures["cp2_graph_bytes"] / figures["cp1_graph_bytes"]
    figures["seconds_ratio"] = figures["cp1_seconds"] / figures["cp2_seconds"]
    for name, value in figures.items():
        print(f"{name:18} {value:,.3f}" if isinstance(value, float) else f"{name:18} {value:,}")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
