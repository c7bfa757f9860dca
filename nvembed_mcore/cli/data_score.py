"""`nvembed data score`: what a teacher scores the documents of records, alone or under torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from nvembed_mcore.cli.encode import add_embedder_options, is_first_rank, open_named
from nvembed_mcore.cli.results import add_json, give

_TEACHER = """\
what `nvembed encode` takes: a run, checkpoint or export folder, any Mistral or NV-Embed folder, or st:NAME[@REVISION]
for sentence-transformers: then scores are cosines. Or ce:NAME[@REVISION], a cross-encoder of sentence-transformers:
then they are its logits"""
_CROSS_ENCODER = "ce:"


def add(kinds: argparse._SubParsersAction) -> None:
    command = kinds.add_parser(
        "score",
        help="write a teacher's scores into records, for loss.distillation",
        description="Write records with pos_scores and neg_scores, what a teacher says of each document. Scores that "
        "the records have are replaced. `nvembed mine` writes the scores of its model too.",
    )
    command.add_argument("records", metavar="RECORDS", help="training records, in any layout that `train` reads")
    command.add_argument("output", metavar="OUTPUT.jsonl", help="the file of records to write")
    command.add_argument("--teacher", dest="model", required=True, metavar="MODEL", help=_TEACHER)
    add_embedder_options(command)
    add_json(command, "counts and ranges")
    command.set_defaults(run=_score, defaults=_defaults(command))


def _defaults(command: argparse.ArgumentParser) -> dict[str, Any]:
    """What the options of embedders are where they are not given; a cross-encoder takes two of them."""
    names = ("instruction", "tokenizer", "tp", "pp", "fp8", "query_prompt", "document_prompt", "trust_remote_code")
    return {name: command.get_default(name) for name in names}


def _score(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.mining.teacher import score_by_cosine, score_pairs

    if arguments.model.startswith(_CROSS_ENCODER):
        found = score_pairs(lambda: _open_cross_encoder(arguments), arguments.records, arguments.output)
    else:
        found = score_by_cosine(lambda: open_named(arguments), arguments.records, arguments.output)
    if is_first_rank():
        give(found, arguments.json, lambda: _print(found))


def _open_cross_encoder(arguments: argparse.Namespace):
    from nvembed_mcore.evaluation.cross_encoder import CrossEncoderScorer
    from nvembed_mcore.evaluation.embedders import EmbedderError

    for name, default in arguments.defaults.items():
        value = getattr(arguments, name)
        if value != default:
            option = f"--{name.replace('_', '-')}"
            raise EmbedderError(f"{option} is for embedding models, and {arguments.model} is none; got {value}")
    name = arguments.model.removeprefix(_CROSS_ENCODER)
    return CrossEncoderScorer(name, max_length=arguments.max_length, token_budget=arguments.tokens_per_pack)


def _print(found: Mapping[str, Any]) -> None:
    print(f"{found['records_written']:,} records with scores: {found['output']}")
    for field, name in (("pos_scores", "positives"), ("neg_scores", "negatives")):
        if field in found:
            low, high = found[field]
            print(f"{name} from {low:.4g} to {high:.4g}")
    print(f"{found['disputed']:,} records with a negative as high as a positive")
