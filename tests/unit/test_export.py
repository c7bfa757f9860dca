"""Exported folders: what they hold, that transformers and sentence-transformers load them, and that their numbers are
those of a plain computation which shares no code with them."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nvembed_mcore.checkpoint.hf_export import ExportError, export
from nvembed_mcore.checkpoint.hf_import import RandomWeights, WeightsError
from nvembed_mcore.checkpoint.hf_load import load_exported
from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.data.packing import Text
from nvembed_mcore.data.prompts import encode_texts, query_prompt
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from tests.helpers.models import hf_reference, reference_embedding, tiny_config

CONFIG = tiny_config(vocab_size=32010, num_hidden_layers=2, max_position_embeddings=512)
KINDS = ["latent", "self_attention", "mean", "last"]
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


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_mistral_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def cases(tokenizer_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    return {kind: Case(kind, tokenizer_dir, root) for kind in KINDS}


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory):
    """Remote code is copied here; the variable that sets it is read when transformers is imported."""
    from transformers import dynamic_module_utils as dynamic

    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
    patch.undo()


def auto_model(folder, **settings):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True, **settings).eval()


def sentence_transformer(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), trust_remote_code=True, local_files_only=True, device="cpu")


# Numbers


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_encode_agrees_with_a_plain_computation(cases, kind, implementation):
    model = auto_model(cases[kind].folder, attn_implementation=implementation)
    assert model.embedding_model.config._attn_implementation == implementation
    for prompt, instruction in (("", ""), (PROMPT, INSTRUCTION)):
        embeddings = model.encode(TEXTS, instruction=prompt, max_length=LIMIT, batch_size=3)
        assert embeddings.dtype == torch.float32 and not embeddings.requires_grad
        assert (embeddings - cases[kind].expected(TEXTS, instruction)).abs().max() < 1e-5
        assert (embeddings.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["latent", "self_attention", "last"])
def test_a_causal_model_stays_causal(tokenizer_dir, tmp_path, kind):
    case = Case(kind, tokenizer_dir, tmp_path, causal=True)
    embeddings = load_exported(case.folder).encode(TEXTS, instruction=PROMPT, max_length=LIMIT)
    assert (embeddings - case.expected(TEXTS, INSTRUCTION)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_gives_the_same(cases, kind):
    model, sentences = load_exported(cases[kind].folder), sentence_transformer(cases[kind].folder)
    assert sentences.max_seq_length == LIMIT and sentences.prompts == {"query": PROMPT, "document": ""}
    for prompt, how in (("", {}), (PROMPT, {"prompt_name": "query"}), (PROMPT, {"prompt": PROMPT})):
        ours = model.encode(TEXTS, instruction=prompt, max_length=LIMIT)
        theirs = torch.as_tensor(sentences.encode(TEXTS, batch_size=3, **how))
        assert torch.cosine_similarity(ours, theirs).min() >= 0.99999, how
        assert (theirs.norm(dim=1) - 1).abs().max() < 1e-5


@torch.no_grad()
def test_later_tokens_change_earlier_states_and_padding_changes_none(cases):
    model = load_exported(cases["self_attention"].folder)
    ids = torch.randint(3, 32000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    states = model(ids, mask).last_hidden_state
    changed = ids.clone()
    changed[0, 8] += 1
    assert (model(changed, mask)[0][0, 0] - states[0, 0]).abs().max() > 1e-4
    changed = ids.clone()
    changed[1, 5:] += 7
    assert torch.equal(model(changed, mask)[0][1, :5], states[1, :5])
    assert (model(ids[1:, :5])[0][0] - states[1, :5]).abs().max() < 1e-5


@torch.no_grad()
def test_forward_can_be_indexed_with_and_without_a_pool_mask(cases):
    model = load_exported(cases["latent"].folder)
    ids = torch.tensor([[1, 500, 600, 2]])
    states = model(ids)
    assert states[0].shape == (1, 4, 32) and states.sentence_embeddings is None
    pool_mask = torch.tensor([[0, 1, 1, 1]])
    pooled = model(ids, torch.ones_like(ids), pool_mask)
    assert pooled["sentence_embeddings"] is pooled[0] and pooled[0].shape == (1, 32)
    expected = torch.nn.functional.normalize(states[0][0, 1:].mean(0), dim=0)
    assert (pooled[0][0] - expected).abs().max() < 1e-6
    assert torch.equal(model(ids, pool_mask=pool_mask, return_dict=False)[0], pooled[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_half_precision_pools_in_float32(cases, tmp_path, dtype):
    cases["latent"].export(tmp_path / dtype, dtype=dtype)
    model = load_exported(tmp_path / dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    embeddings = model.encode(TEXTS, instruction=PROMPT, max_length=LIMIT)
    assert embeddings.dtype == torch.float32 and (embeddings.norm(dim=1) - 1).abs().max() < 1e-5
    cosine = torch.cosine_similarity(embeddings, cases["latent"].expected(TEXTS, INSTRUCTION))
    assert cosine.min() > (0.999 if dtype == "bfloat16" else 0.9999)


# Tokens


def test_a_cut_text_keeps_its_end(cases):
    tokenizer = load_exported(cases["mean"].folder).tokenizer
    for length in (3, 20):
        ids = tokenizer("word " * 100, truncation=True, max_length=length)["input_ids"]
        assert len(ids) == length and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


def test_the_tokens_are_those_of_training(cases):
    trained, exported = load_tokenizer(cases["mean"].tokenizer_dir), load_exported(cases["mean"].folder).tokenizer
    for instruction in ("", INSTRUCTION):
        rows = encode_texts(trained, TEXTS, instruction, LIMIT).split()
        texts = [query_prompt(instruction) + text for text in TEXTS]
        assert exported(texts, truncation=True, max_length=LIMIT)["input_ids"] == [row.tolist() for row in rows]


def test_what_encode_refuses(cases):
    model = load_exported(cases["latent"].folder)
    needed = len(model.tokenizer(PROMPT)["input_ids"]) + 1  # <s>, the instruction, one token, </s>
    assert torch.isfinite(model.encode(["text"], instruction=PROMPT, max_length=needed)).all()
    with pytest.raises(ValueError, match=f"max_length = {needed - 1} leaves no room"):
        model.encode(["text"], instruction=PROMPT, max_length=needed - 1)
    with pytest.raises(ValueError, match="does not keep 'inter' apart from the text 'national'"):
        model.encode(["national"], instruction="inter")
    with pytest.raises(TypeError, match="list of strings"):
        model.encode("one string")


def test_encode_keeps_the_order_and_takes_no_text(cases):
    model = load_exported(cases["latent"].folder)
    together = model.encode(TEXTS, max_length=LIMIT, batch_size=2)
    alone = torch.cat([model.encode([text], max_length=LIMIT) for text in TEXTS])
    assert (together - alone).abs().max() < 1e-6
    assert model.encode([]).shape == (0, 32)
    assert model.encode(TEXTS[:2], return_numpy=True).dtype == "float32"


# Folders


def test_what_the_folder_holds(cases):
    folder = cases["latent"].folder
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "model.safetensors", "modeling_nvembed.py", "README.md", "modules.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["model_type"] == "mistral" and config["text_config"]["sliding_window"] is None
    assert config["latent_attention_config"]["cross_dim_head"] == 12
    assert load_exported(folder).config.query_prompt == PROMPT
    modules = json.loads((folder / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "| optim.lr | 2e-05 |" in card and "abc123" in card
    assert "| note | a\\|b c |" in card
    assert [path for path in folder.parent.iterdir() if "partial" in path.name] == []


def test_weights_are_exact_in_one_file_and_in_shards(cases, tmp_path):
    case = cases["latent"]
    stored = load_file(case.folder / "model.safetensors")
    assert stored.keys() == case.tensors.keys()
    assert all(torch.equal(stored[name], case.tensors[name]) for name in stored)
    case.export(tmp_path / "shards", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys() and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    shards = load_exported(tmp_path / "shards").state_dict()
    assert all(torch.equal(shards[name], stored[name]) for name in stored)


def test_the_card_s_code_runs(cases, tmp_path):
    """In a process of its own, from a folder that was moved after the export, without this project's modules."""
    shutil.copytree(cases["latent"].folder, tmp_path / "latent")
    blocks = (tmp_path / "latent/README.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] + "print(scores.shape, 'nvembed_mcore' in sys.modules)" for block in blocks)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        cwd=tmp_path,
        env={**environment, "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(1, 1)") + done.stdout.count("torch.Size([1, 1])") == 2
    assert "True" not in done.stdout


def test_a_folder_that_exists_is_left_alone(cases, tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(ExportError, match=r"export folder .*old exists"):
        cases["mean"].export(tmp_path / "old")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_a_failed_export_leaves_nothing(cases, tmp_path):
    case = cases["mean"]

    def failing(name):
        if name.startswith("decoder.layers.1"):
            raise OSError("disk gone")
        return case.read_global(name)

    with pytest.raises(OSError, match="disk gone"):
        export(
            failing,
            CONFIG,
            case.pooling,
            tmp_path / "new",
            tokenizer_dir=case.tokenizer_dir,
            attention_mask="bidirectional",
            max_tokens=LIMIT,
            card_facts={},
        )
    assert list(tmp_path.iterdir()) == []


def test_values_that_cannot_be_exported(cases, tmp_path):
    with pytest.raises(ExportError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        cases["mean"].export(tmp_path / "new", dtype="int8")
    with pytest.raises(ExportError, match="attention_mask must be .*got 'sideways'"):
        cases["mean"].export(tmp_path / "new", attention_mask="sideways")
    with pytest.raises(ExportError, match="cannot use the tokenizer in"):
        cases["mean"].export(tmp_path / "new", tokenizer_dir=tmp_path)
    with pytest.raises(ExportError, match="ids up to 31999, the model's vocab_size is 250"):
        export(
            cases["mean"].read_global,
            tiny_config(),
            cases["mean"].pooling,
            tmp_path / "new",
            tokenizer_dir=cases["mean"].tokenizer_dir,
            attention_mask="bidirectional",
            max_tokens=LIMIT,
            card_facts={},
        )
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_exports(cases, tmp_path):
    with pytest.raises(WeightsError, match="no Hugging Face folder at"):
        load_exported(tmp_path / "nowhere")
    cases["mean"].reference.save_pretrained(tmp_path / "base")
    with pytest.raises(WeightsError, match="is not an export of this project: model_type is 'mistral'"):
        load_exported(tmp_path / "base")
    broken = tmp_path / "broken"
    shutil.copytree(cases["mean"].folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "pooling": "latent"}))
    with pytest.raises(WeightsError, match="lacks 14 tensors.*latent_attention_model"):
        load_exported(broken)
    (broken / "config.json").write_text(json.dumps({**config, "pooling": "median"}))
    with pytest.raises(ValueError, match="pooling is 'median'"):
        load_exported(broken)
    config["text_config"]["intermediate_size"] = 48
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="do not fit"):
        load_exported(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cannot read .*config\.json"):
        load_exported(broken)
