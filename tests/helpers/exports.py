"""Exports of tiny models with random weights, beside a plain computation of what they must say."""

from __future__ import annotations

import copy

import torch

from nvembed_mcore.checkpoint.hf_export import export
from nvembed_mcore.checkpoint.hf_import import RandomWeights
from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.data.packing import Text
from nvembed_mcore.data.prompts import encode_texts, query_prompt
from nvembed_mcore.data.tokenizer import load_tokenizer
from tests.helpers.models import hf_reference, reference_embedding, tiny_config

CONFIG = tiny_config(vocab_size=32010, num_hidden_layers=2, max_position_embeddings=512)
KINDS = ["latent", "self_attention", "multi_layer", "mean", "last"]
INSTRUCTION = "Given a question, retrieve passages that answer the question"
PROMPT = query_prompt(INSTRUCTION)
LIMIT = 48
TEXTS = [
    "how do I sort a list",
    "x",
    "a rather long text, " * 20,
    " spaces   around ",
    "def f(a):\n    return a\n",
    "ends in a colon: ",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642 e\u0301",
    "\nbegins with a line break",
]


class Case:
    """Random weights of one architecture, for the plain computation and as an exported folder."""

    def __init__(self, kind, tokenizer_dir, root, causal=False):
        self.pooling = PoolingConfig(kind=kind, num_latents=6, num_heads=2, head_width=12)
        self.tokenizer_dir, self.causal = tokenizer_dir, causal
        # A copy: the reference writes its mask into the configuration.
        self.reference = hf_reference(copy.deepcopy(CONFIG), is_causal=causal)
        self.entries = {entry.name: entry for entry in name_table(CONFIG, self.pooling)}
        self.tensors = {f"embedding_model.{name}": t for name, t in self.reference.state_dict().items()}
        random = RandomWeights(self.entries.values(), 3, 0.2, self.pooling)
        for name, shape in random.shapes.items():
            if name not in self.tensors:
                # Norms too, so that one applied to the wrong states shows; sharp logits, so that attention matters.
                scale = 4.0 if "fn.to_" in name else 1.0
                self.tensors[name] = random.read(name, shape) * scale + 0.1 * torch.randn(shape)
        self.folder = root / kind
        self.export(self.folder)

    def read_global(self, name):
        return local_shard(self.entries[name], self.tensors.__getitem__, 0, 1)

    def export(self, folder, **changes):
        settings = dict(
            tokenizer_dir=self.tokenizer_dir,
            attention_mask="causal" if self.causal else "bidirectional",
            max_tokens=LIMIT,
            instruction=INSTRUCTION,
            card_facts={"Recipe": {"optim": {"lr": 2e-5}, "note": "a|b\nc"}, "Data": {"fingerprint": "abc123"}},
        )
        export(self.read_global, CONFIG, self.pooling, folder, **{**settings, **changes})

    @torch.no_grad()
    def expected(self, texts, instruction=""):
        """Embeddings by the trainer's tokens and pooled positions, one text at a time."""
        head = {name.removeprefix("pooling."): self.read_global(name) for name in self.entries if "pooling." in name}
        encoded = encode_texts(load_tokenizer(self.tokenizer_dir), texts, instruction, LIMIT)
        rows = [Text(ids, encoded.pooled_from) for ids in encoded.split()]
        return torch.stack([reference_embedding(self.reference, head, row, self.pooling.kind, 2) for row in rows])


def auto_model(folder, **settings):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True, **settings).eval()


def sentence_transformer(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), trust_remote_code=True, local_files_only=True, device="cpu")


def tiny_bert(folder):
    """A model of sentence-transformers that is none of ours: with pads, without prompts, not normalised."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz:"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=40, **sizes)).save_pretrained(folder / "bert")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"), max_seq_length=32)
    SentenceTransformer(modules=[transformer, models.Pooling(16)], device="cpu").save(str(folder / "model"))
    return folder / "model"
