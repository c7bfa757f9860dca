"""Logging is left as it was found; exports are made once for all tests that load them."""

from __future__ import annotations

import pytest

from nvembed_mcore.data.tokenizer import write_mistral_tokenizer
from nvembed_mcore.log import close_logging


@pytest.fixture(autouse=True)
def no_handlers_left():
    """A handler of one test writes to a stream that is closed in the next."""
    yield
    close_logging()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_mistral_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def modules_cache(tmp_path_factory):
    """Remote code is copied here; the variable that sets it is read when transformers is imported."""
    from transformers import dynamic_module_utils as dynamic

    patch = pytest.MonkeyPatch()
    patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def cases(modules_cache, tokenizer_dir, tmp_path_factory):
    """Kind of pooling -> `Case`, in the format `nv-embed`."""
    from tests.helpers.exports import KINDS, Case

    root = tmp_path_factory.mktemp("exports")
    return {kind: Case(kind, tokenizer_dir, root) for kind in KINDS}
