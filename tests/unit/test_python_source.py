"""Items of a code-search set: which definitions count, their code without docstrings, their queries and names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from nvembed_mcore.data.python_source import (
    DocumentedItem,
    SourceFile,
    documented_items,
    first_paragraph,
    package_roots,
    source_files,
)


def items_of(source: str, module: str = "pack.mod") -> list[DocumentedItem]:
    return list(documented_items(SourceFile("pack", module, Path("unused")), source.encode()))


def only_item(source: str) -> DocumentedItem:
    (item,) = items_of(source)
    return item


def test_document_is_the_code_without_its_docstring() -> None:
    item = only_item(
        "import os\n\n\nclass Outer:\n    @staticmethod\n    def método(a: int,\n               b='é') -> int:\n"
        '        """Adds äöü two numbers.\n\n        Long text.\n        """\n\n        # note\n        return a + b\n'
    )
    assert item.query == "Adds äöü two numbers."
    assert item.qualified_name == "Outer.método" and item.kind == "function"
    assert item.code == ("@staticmethod\ndef método(a: int,\n           b='é') -> int:\n    # note\n    return a + b")


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('def f(): "Doc of three words"; return 1', "def f(): return 1"),
        ('def f():\n    """Doc of three words"""; x = "é"\n    return x', 'def f():\n    x = "é"\n    return x'),
        ('def ü(): "é doc of words";  return "é"', 'def ü(): return "é"'),
        ('async def f():\n\t"""Doc of three words"""\n\treturn 1', "async def f():\n        return 1"),
        ("def f():\r\n    '''Doc of\r\n    three words'''\r\n    return 1\r\n", "def f():\n    return 1"),
        (
            '@auto(intro="A text of four words")\n@p\ndef f():\n    "Doc of three words"\n    g()',
            "@p\ndef f():\n    g()",
        ),
    ],
)
def test_docstring_cut_by_position(source: str, code: str) -> None:
    item = only_item(source)
    assert item.code == code
    ast.parse(item.code)


def test_class_document_holds_no_docstring_of_its_methods() -> None:
    class_item, method = items_of(
        'class A(Base):\n    """Holds many useful things."""\n    x = 1\n\n    def f(self):\n'
        '        """Does the useful thing."""\n        return self.x\n\n'
        '    def g(self):\n        """Abstract one, empty."""\n'
    )
    assert class_item.code == (
        "class A(Base):\n    x = 1\n\n    def f(self):\n        return self.x\n\n    def g(self):\n        ..."
    )
    assert method.qualified_name == "A.f" and method.code == "def f(self):\n    return self.x"


@pytest.mark.parametrize("body", ["", "    pass\n", "    ...\n", "    raise NotImplementedError('later')\n"])
def test_items_without_code_are_left_out(body: str) -> None:
    assert items_of(f'def f():\n    """Doc of three words."""\n{body}') == []


def test_definitions_under_conditions_count_and_inner_functions_do_not() -> None:
    source = (
        'if True:\n    def f():\n        "Doc of three words"\n        def inner():\n'
        '            "Inner doc with words"\n            return 1\n        return inner\n'
        'try:\n    pass\nexcept E:\n    class B:\n        "Class doc with words"\n        y = 2\n'
    )
    assert [item.qualified_name for item in items_of(source)] == ["f", "B"]
    assert "Inner doc" not in items_of(source)[0].code


@pytest.mark.parametrize(
    ("docstring", "query"),
    [
        ("Return  the\n   sum   of it.\n\nMore text.", "Return the sum of it."),
        ("Return the :class:`~a.b.Thing` of ``x`` and `y <https://e.org>`_.", "Return the a.b.Thing of x and y."),
        ("See [`BertModel`] and **bold** [here](https://x.y/z) too.", "See BertModel and bold here too."),
        ("Summary in three words\nArgs:\n    x (int): hidden", "Summary in three words"),
        ("Summary in three words\n>>> f(1)\n2", "Summary in three words"),
        ("f(input, other=None) -> Tensor\n\nAdds all the numbers.", "Adds all the numbers."),
        ("mod.f(input,\n  dim)\n\nAdds all the numbers.", "Adds all the numbers."),
        ("Args:\n    x: the number to use", None),
        ("pixel_values (`torch.Tensor` of shape `(1, 2)`): The values of pixels.", None),
        (".. deprecated:: 1.2\n   Use the other one.", None),
        ("Too short.", None),
        ("", None),
        ("1 + 2 = 3 * 4 - 5", None),
        ("Three words\x00 with \ud800 odd letters", "Three words with odd letters"),
    ],
)
def test_first_paragraph(docstring: str, query: str | None) -> None:
    assert first_paragraph(docstring, "f") == query


def test_hidden_name_is_replaced_as_a_whole_word_everywhere() -> None:
    item = only_item(
        'def fold(x):\n    "Folds it many times"\n    return fold(x - 1) + unfold(x) + x.fold + fold_2("fold")'
    )
    assert item.code_without_name == (
        "def some_function(x):\n"
        '    return some_function(x - 1) + unfold(x) + x.some_function + fold_2("some_function")'
    )
    first, _ = items_of('class Box:\n  "Box of three words"\n  def f(self):\n    "Copy of this box"\n    return Box()')
    assert first.code_without_name == "class SomeClass:\n  def f(self):\n    return SomeClass()"


def test_installed_packages_are_found_without_tests() -> None:
    roots = package_roots(["stdlib", "numpy"])
    modules = {file.module for name, root in roots.items() for file in source_files(name, root)}
    assert {"stdlib.json.decoder", "stdlib.argparse", "numpy.linalg", "stdlib.email"} <= modules
    assert not [name for name in modules if re.search(r"\.(tests?|site-packages|dist-packages|idle_test)\.", name)]
