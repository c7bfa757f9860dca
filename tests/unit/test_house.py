"""The rules of the house, read from the syntax trees of its files: who may import what, and what nobody may do.

A check takes a file's place in the repository and its syntax tree, and yields (line, what is wrong).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from nvembed_mcore import config

ROOT = Path(__file__).parents[2]
LIBRARY = ("nvembed_mcore", "kernels")
PROGRAMS = ("tools", "examples")
CONFIGURATION = ("nvembed_mcore/config.py", "nvembed_mcore/config_data.py", "nvembed_mcore/config_eval.py")
TRACKERS = "nvembed_mcore/trackers.py"
LONGEST_FUNCTION, LONGEST_FILE = 60, 400

Breaches = Iterator[tuple[int, str]]
Check = Callable[[str, ast.AST], Breaches]


@lru_cache
def tree_of(path: str) -> ast.AST:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def files_in(*folders: str) -> list[str]:
    """Python files below folders of the repository, as paths from its root."""
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain that begins with a name, otherwise nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        begin = dotted(node.value)
        return f"{begin}.{node.attr}" if begin else ""
    return ""


def uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Full names of everything imported, and attribute chains with imported names written out."""
    origin: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                origin[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                origin[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node):
            first, _, rest = dotted(node).partition(".")
            yield node.lineno, f"{origin.get(first, first)}.{rest}"


def is_within(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def no_collectives_in_pure_rooms(path: str, tree: ast.AST) -> Breaches:
    rooms = ("nvembed_mcore/loss.py", "nvembed_mcore/r_drop.py", "nvembed_mcore/model/pooling.py")
    pure = path in rooms or path.startswith("kernels/")
    collectives = (
        "torch.distributed",
        "nvembed_mcore.parallel",
        "megatron.core.parallel_state",
        "megatron.core.tensor_parallel",
    )
    for line, name in uses(tree) if pure else ():
        if is_within(name, *collectives):
            yield line, f"{name} in a room without collectives"


def parallel_state_only_in_parallel(path: str, tree: ast.AST) -> Breaches:
    for line, name in uses(tree):
        if "parallel_state" in name.split(".") and not path.startswith("nvembed_mcore/parallel/"):
            yield line, f"{name} outside parallel/"


WEIGHT_NAME = re.compile(
    r"\b(embed_tokens|[qkvo]_proj|gate_proj|up_proj|down_proj|post_attention_layernorm|self_attn"
    r"|latent_attention_model|cross_attend_blocks)\b"
)


def weight_names_only_in_checkpoint(path: str, tree: ast.AST) -> Breaches:
    if path.startswith("nvembed_mcore/checkpoint/"):
        return
    for node in ast.walk(tree):
        words = [getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "value", None)]
        for word in words:
            if isinstance(word, str) and (found := WEIGHT_NAME.search(word)):
                yield node.lineno, f"{found[0]!r} outside checkpoint/"


def arguments_only_in_cli(path: str, tree: ast.AST) -> Breaches:
    # Benchmarks of kernels are programs, like those in tools/.
    if path.startswith(("nvembed_mcore/cli/", "kernels/benchmark.py")) or not path.startswith(LIBRARY):
        return
    for line, name in uses(tree):
        if is_within(name, "argparse", "jsonargparse", "optparse", "getopt", "click", "sys.argv"):
            yield line, f"{name} outside cli/"


def prints_only_in_cli(path: str, tree: ast.AST) -> Breaches:
    if path.startswith(("nvembed_mcore/cli/", "kernels/benchmark.py")) or not path.startswith(LIBRARY):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield node.lineno, "print outside cli/"


def cuda_only_in_device(path: str, tree: ast.AST) -> Breaches:
    if path == "nvembed_mcore/device.py" or not path.startswith(LIBRARY):
        return
    for line, name in uses(tree):
        if is_within(name, "torch.cuda"):
            yield line, f"{name} outside device.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and dotted(node) != "torch.cuda":
            yield node.lineno, ".cuda outside device.py"


RESTRICTED_UNPICKLER = "nvembed_mcore/checkpoint/reader.py"
"""The one file that may name pickle: it reads tables of contents with an unpickler that knows a dozen names."""


def nothing_unsafe(path: str, tree: ast.AST) -> Breaches:
    modules = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "os.system")
    allowed = ("pickle", "pickle.Unpickler") if path == RESTRICTED_UNPICKLER and _restricts(tree) else ()
    for line, name in uses(tree):
        if name in allowed:
            continue
        if is_within(name, *modules) or name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield line, f"{name} runs what it reads"
    only = {"weights_only": True, "shell": False, "allow_pickle": False}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in ("eval", "exec", "compile", "__import__"):
            yield node.lineno, f"{dotted(node.func)}()"
        if isinstance(node, ast.keyword) and node.arg in only:
            if not (isinstance(node.value, ast.Constant) and node.value.value is only[node.arg]):
                yield node.lineno, f"{node.arg} is not {only[node.arg]}"


def nothing_is_read_or_run_without_care(path: str, tree: ast.AST) -> Breaches:
    """Calls that are safe only in one form."""
    for line, name in uses(tree):
        if name in _FORBIDDEN:
            yield line, name
        # Sizes and offsets in the file are taken as they are: its hash is compared before.
        if name.endswith("faiss.read_index") and path != "nvembed_mcore/mining/approximate.py":
            yield line, name
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, first = dotted(node.func), node.args[0] if node.args else None
        if name == "torch.load" and "weights_only" not in [one.arg for one in node.keywords]:
            yield node.lineno, "torch.load without weights_only=True"
        # The reader of a checkpoint's table of contents looks its names up in a short list before.
        is_listed = path == "nvembed_mcore/checkpoint/reader.py"
        if name.endswith("import_module") and not isinstance(first, ast.Constant) and not is_listed:
            yield node.lineno, f"{name} of a name that is made while running"
        if name.startswith("subprocess.") and isinstance(first, (ast.Constant, ast.JoinedStr)):
            yield node.lineno, f"{name} of a text instead of words"


_FORBIDDEN = {
    *("tempfile.mktemp", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("runpy.run_path", "runpy.run_module", "pandas.read_pickle", "numpy.fromregex", "yaml.Loader"),
    *("yaml.UnsafeLoader", "yaml.FullLoader", "yaml.load_all", "yaml.unsafe_load_all"),
    *("importlib.util.spec_from_file_location", "torch.hub.load", "ssl._create_unverified_context"),
}


TRUSTING = {
    "tools/compat/published.py": "the published code, in a folder of its own that the caller wrote",
    "tools/compat/probe.py": "an export that the caller wrote; run with the network off",
    "tools/bench/sides.py": "an export that the benchmark wrote, as a user of it would load it",
}
"""Where code of a model's folder is run: it is ours, and the call is what is measured."""


def code_of_models_is_trusted_in_few_places(path: str, tree: ast.AST) -> Breaches:
    if path in TRUSTING:
        return
    for node in ast.walk(tree):
        named = [node.arg] if isinstance(node, ast.keyword) else []
        if isinstance(node, ast.Dict):
            named = [getattr(key, "value", None) for key, value in _pairs(node) if _is_true(value)]
        if isinstance(node, ast.Assign):
            named = [getattr(getattr(one, "slice", None), "value", None) for one in node.targets]
        if "trust_remote_code" in named and (isinstance(node, ast.Dict) or _is_true(node.value)):
            yield node.lineno, "trust_remote_code is true"


def _pairs(node: ast.Dict) -> Iterator[tuple[ast.AST | None, ast.AST]]:
    return zip(node.keys, node.values, strict=True)


def _is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def nothing_phones_home(path: str, tree: ast.AST) -> Breaches:
    """No tracker, no server, no client of a network; what loads models and data sets by name does that itself.

    Functions of `trackers.py` may import wandb: a run that does not ask for it gets to none of them."""
    network = ("wandb", "mlflow", "comet_ml", "neptune", "clearml", "sentry_sdk", "requests", "urllib", "httpx")
    functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)] if path == TRACKERS else []
    for line, name in uses(tree) if path.startswith(LIBRARY) else ():
        if name.partition(".")[0] == "wandb" and any(one.lineno < line <= one.end_lineno for one in functions):
            continue
        if is_within(
            name, *network, "http", "socketserver", "smtplib", "ftplib", "huggingface_hub", "flask", "gradio"
        ):
            yield line, f"{name} in the library"


def _restricts(tree: ast.AST) -> bool:
    """Whether `pickle` is there only to be the base of one class that decides itself what a pickle may name."""
    bases = [one for one in ast.walk(tree) if isinstance(one, ast.Attribute) and dotted(one).startswith("pickle.")]
    classes = [
        one
        for one in ast.walk(tree)
        if isinstance(one, ast.ClassDef)
        and [dotted(base) for base in one.bases] == ["pickle.Unpickler"]
        and [getattr(part, "name", None) for part in one.body[1:]] == ["find_class"]
    ]
    return len(bases) == len(classes) == 1 and "super()" not in ast.unparse(classes[0])


def planning_needs_no_torch(path: str, tree: ast.AST) -> Breaches:
    """`nvembed plan` answers within seconds; what it imports otherwise is seen where the modules are loaded."""
    plans = path.startswith("nvembed_mcore/scaling/") or path == "nvembed_mcore/cli/plan.py"
    for line, name in uses(tree) if plans and path != "nvembed_mcore/scaling/dry_run.py" else ():
        if is_within(name, "torch", "megatron", "transformers"):
            yield line, f"{name} where layouts are planned"


def functions_fit_a_screen(path: str, tree: ast.AST) -> Breaches:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield node.lineno, f"{node.name} has {lines} lines"


CHECKS: list[Check] = [
    no_collectives_in_pure_rooms,
    parallel_state_only_in_parallel,
    weight_names_only_in_checkpoint,
    arguments_only_in_cli,
    prints_only_in_cli,
    cuda_only_in_device,
    nothing_unsafe,
    nothing_is_read_or_run_without_care,
    code_of_models_is_trusted_in_few_places,
    nothing_phones_home,
    planning_needs_no_torch,
    functions_fit_a_screen,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check):
    paths = files_in(*LIBRARY, *PROGRAMS)
    assert len(paths) > 30
    breaches = [f"{path}:{line}: {what}" for path in paths for line, what in check(path, tree_of(path))]
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize(
    ("check", "path", "source"),
    [
        (no_collectives_in_pure_rooms, "nvembed_mcore/loss.py", "import torch.distributed as dist"),
        (no_collectives_in_pure_rooms, "nvembed_mcore/loss.py", "import torch\ntorch.distributed.barrier()"),
        (no_collectives_in_pure_rooms, "kernels/a.py", "from torch import distributed"),
        (no_collectives_in_pure_rooms, "nvembed_mcore/model/pooling.py", "from nvembed_mcore.parallel import gather"),
        (parallel_state_only_in_parallel, "nvembed_mcore/step.py", "from megatron.core import parallel_state as mpu"),
        (
            parallel_state_only_in_parallel,
            "nvembed_mcore/step.py",
            "from megatron import core\ncore.parallel_state.x()",
        ),
        (weight_names_only_in_checkpoint, "nvembed_mcore/train.py", "name = 'layers.0.mlp.up_proj.weight'"),
        (weight_names_only_in_checkpoint, "nvembed_mcore/train.py", "model.embed_tokens"),
        (arguments_only_in_cli, "nvembed_mcore/data/a.py", "from argparse import ArgumentParser"),
        (arguments_only_in_cli, "nvembed_mcore/data/a.py", "import sys\nsys.argv[1]"),
        (prints_only_in_cli, "nvembed_mcore/train.py", "print(1)"),
        (cuda_only_in_device, "nvembed_mcore/train.py", "import torch\ntorch.cuda.synchronize()"),
        (cuda_only_in_device, "nvembed_mcore/train.py", "from torch.cuda import synchronize"),
        (cuda_only_in_device, "nvembed_mcore/train.py", "model().cuda()"),
        (nothing_unsafe, "tools/a.py", "import pickle"),
        (nothing_unsafe, RESTRICTED_UNPICKLER, "import pickle\npickle.load(x)"),
        (nothing_unsafe, RESTRICTED_UNPICKLER, "import pickle\npickle.Unpickler(x).load()"),
        (
            nothing_unsafe,
            RESTRICTED_UNPICKLER,
            "import pickle\nclass A(pickle.Unpickler):\n    'd'\n"
            "    def find_class(self, m, n): return super().find_class(m, n)",
        ),
        (nothing_unsafe, "tools/a.py", "from yaml import load"),
        (nothing_unsafe, "tools/a.py", "torch.load(path, weights_only=False)"),
        (nothing_unsafe, "tools/a.py", "subprocess.run(x, shell=True)"),
        (nothing_unsafe, "tools/a.py", "eval(x)"),
        (nothing_unsafe, "tools/a.py", "np.load(x, allow_pickle=allowed)"),
        (nothing_is_read_or_run_without_care, "tools/a.py", "torch.load(x)"),
        (nothing_is_read_or_run_without_care, "tools/a.py", "import importlib\nimportlib.import_module(name)"),
        (nothing_is_read_or_run_without_care, "tools/a.py", "import subprocess\nsubprocess.run(f'ls {x}')"),
        (nothing_is_read_or_run_without_care, "tools/a.py", "from tempfile import mktemp"),
        (nothing_is_read_or_run_without_care, "nvembed_mcore/a.py", "import faiss\nfaiss.read_index(x)"),
        (
            code_of_models_is_trusted_in_few_places,
            "tools/a.py",
            "Model.from_pretrained(x, trust_remote_code=True)",
        ),
        (code_of_models_is_trusted_in_few_places, "tools/a.py", "f(**{'trust_remote_code': True})"),
        (code_of_models_is_trusted_in_few_places, "tools/a.py", "settings['trust_remote_code'] = True"),
        (nothing_phones_home, "nvembed_mcore/a.py", "import wandb"),
        (nothing_phones_home, TRACKERS, "import wandb"),
        (nothing_phones_home, "nvembed_mcore/a.py", "from urllib.request import urlopen"),
        (planning_needs_no_torch, "nvembed_mcore/scaling/a.py", "from torch import Tensor"),
        (planning_needs_no_torch, "nvembed_mcore/cli/plan.py", "import transformers"),
        (functions_fit_a_screen, "tools/a.py", "def f():\n" + "    x = 1\n" * 60),
    ],
)
def test_a_breach_is_seen(check, path, source):
    assert len(list(check(path, ast.parse(source)))) >= 1


@pytest.mark.parametrize(
    ("check", "path", "source"),
    [
        (
            nothing_unsafe,
            "tools/a.py",
            "import yaml\nmodel.eval()\nyaml.safe_load(x)\ntorch.load(x, weights_only=True)",
        ),
        (
            nothing_is_read_or_run_without_care,
            "tools/a.py",
            "torch.load(x, weights_only=True)\nsubprocess.run(['ls', x])\nimportlib.import_module('faiss')",
        ),
        (code_of_models_is_trusted_in_few_places, "tools/a.py", "f(x, trust_remote_code=given)"),
        (nothing_phones_home, TRACKERS, "def f():\n    import wandb"),
        (cuda_only_in_device, "nvembed_mcore/train.py", "if tensor.is_cuda: x = torch.device('cuda')"),
        (planning_needs_no_torch, "nvembed_mcore/scaling/dry_run.py", "import torch"),
        (functions_fit_a_screen, "tools/a.py", "def f():\n" + "    x = 1\n" * 59),
    ],
)
def test_what_is_allowed_is_no_breach(check, path, source):
    assert list(check(path, ast.parse(source))) == []


def test_files_are_short():
    lengths = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in files_in(*LIBRARY, *PROGRAMS)}
    lengths |= {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in files_in("tests")}
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE}


def test_every_field_of_the_configuration_is_read():
    """As an attribute, in any module but those of the configuration, where only properties count."""
    read = set()
    for path in files_in("nvembed_mcore"):
        bodies = [tree_of(path)]
        if path in CONFIGURATION:
            bodies = [node for node in ast.walk(tree_of(path)) if _is_property(node)]
        for body in bodies:
            read |= {node.attr for node in ast.walk(body) if _is_read(node)}
    classes = [one for one in vars(config).values() if isinstance(one, type) and dataclasses.is_dataclass(one)]
    assert len(classes) >= 10
    names = {f"{one.__name__}.{field.name}" for one in classes for field in dataclasses.fields(one)}
    names |= {
        f"{one.__name__}.{name}" for one in classes for name, kind in vars(one).items() if type(kind) is property
    }
    unread = sorted(name for name in names if name.partition(".")[2] not in read)
    assert not unread, f"configured, but nothing reads it: {unread}"


def _is_property(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(dotted(one) == "property" for one in node.decorator_list)


def _is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
