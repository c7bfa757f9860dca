"""Question answering and fact checking sets as records: SQuAD, DPR's files (NQ, PAQ), HotpotQA, BioASQ, HoVer."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nvembed_mcore.data.convert.intake import Document, Draft, Intake, LeftOut, clean, list_of, optional_id, text_of
from nvembed_mcore.data.convert.rows import Item, file_items, is_document, json_document
from nvembed_mcore.data.faults import DataError, Fault, kind_of
from nvembed_mcore.data.records import content_id


def squad(intake: Intake, *, negatives: int = 7) -> Iterator[Draft]:
    """SQuAD 1.1 and 2.0: a question's passage is its positive, others of the same article are its negatives.

    Reads the published JSON (`data`, `paragraphs`, `qas`) and rows of `title`, `context`, `question` and `answers`.
    Questions without an answer are left out.

    Args:
        intake: the sources.
        negatives: most negatives of a record, drawn at random from the article.
    """
    passages: dict[str, dict[str, None]] = {}
    asked: list[tuple[str, str, str, str | None]] = []

    def parse(row: dict[str, Any]) -> None:
        title, context = text_of(row, "title"), text_of(row, "context")
        passages.setdefault(title, {})[context] = None
        if "question" not in row:
            return
        question, answers = text_of(row, "question"), row.get("answers")
        answers = answers.get("text") if isinstance(answers, dict) else answers
        if row.get("is_impossible") or not answers:
            raise LeftOut("the question has no answer")
        asked.append((question, context, title, optional_id(row, "id")))

    for path in intake.sources:
        for _ in intake.each(_squad_rows(path) if is_document(path) else file_items(path, intake.bad), parse):
            pass
    for question, context, title, query_id in asked:
        others = [passage for passage in passages[title] if passage != context]
        rng = random.Random(f"{intake.seed}/squad/{content_id(question)}")
        chosen = others if len(others) <= negatives else rng.sample(others, negatives)
        yield Draft(question, [Document(context)], [Document(one) for one in chosen], query_id)


def _squad_rows(path: Path) -> Iterator[Item]:
    """The questions of SQuAD's nested JSON as rows; a passage without any is a row without `question`."""
    for a, article in enumerate(_list_at(json_document(path), "data", str(path))):
        at_article = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_list_at(article, "paragraphs", at_article)):
            at_paragraph = f"{at_article}.paragraphs[{p}]"
            questions = _list_at(paragraph, "qas", at_paragraph)
            shared = {"title": article.get("title"), "context": paragraph.get("context")}
            for q, question in enumerate(questions or [{}]):
                at = f"{at_paragraph}.qas[{q}]" if questions else at_paragraph
                if not isinstance(question, dict):
                    raise DataError(f"{at} must be an object, got {kind_of(question)}")
                yield lambda name, at=at: at, {**question, **shared}


def _list_at(value: Any, name: str, place: str) -> list[dict[str, Any]]:
    """A list of a nested document. What is broken here leaves nothing to count, so it ends the conversion."""
    if not isinstance(value, dict) or not isinstance(value.get(name), list):
        raise DataError(f"{place} must be an object with a list {name}")
    return value[name]


def dpr(intake: Intake, *, negatives: int = 7, positives: int = 1) -> Iterator[Draft]:
    """Files of Dense Passage Retrieval (NQ, TriviaQA; PAQ in that layout): `question`, `positive_ctxs`,
    `hard_negative_ctxs`, `negative_ctxs`, each context with `title` and `text`.

    Args:
        intake: the items.
        negatives: most negatives of a record: hard ones first, then the others, in the order of the file.
        positives: most positives of a record. The first is the passage of the answer, those after it hold the
            answer's words and perhaps by chance; they are never negatives.
    """

    def parse(row: dict[str, Any]) -> Draft:
        found = _contexts(row, "positive_ctxs")
        if not found:
            raise LeftOut("no positive context")
        known = {document.text for document in found} | {document.id for document in found}
        others = [*_contexts(row, "hard_negative_ctxs"), *_contexts(row, "negative_ctxs")]
        others = [document for document in others if document.text not in known and document.id not in known]
        return Draft(text_of(row, "question"), found[:positives], others[:negatives], optional_id(row, "id"))

    return intake.rows(parse)


def _contexts(row: dict[str, Any], name: str) -> list[Document]:
    documents = []
    for number, context in enumerate(list_of(row, name) if row.get(name) is not None else []):
        if not isinstance(context, dict):
            raise Fault(f"{name}[{number}] must be an object, got {kind_of(context)}", name)
        title, text = (context.get(part) for part in ("title", "text"))
        title = clean(title, f"{name}[{number}].title", name) if title is not None else ""
        text = f"{title} {clean(text, f'{name}[{number}].text', name)}".strip()
        documents.append(Document(text, optional_id(context, "passage_id", "psg_id")))
    return documents


def hotpotqa(intake: Intake, *, negatives: int = 7) -> Iterator[Draft]:
    """HotpotQA with its ten paragraphs (the distractor setting): those of the supporting facts are positives, the
    others negatives. A paragraph is its title and its sentences.

    Reads the published JSON (lists of title and sentences) and the rows of the Hugging Face set (an object of lists).

    Args:
        intake: the items.
        negatives: most negatives of a record, in the order of the file.
    """

    def parse(row: dict[str, Any]) -> Draft:
        supporting = {
            _title(fact, "supporting_facts") for fact in _couples(row, "supporting_facts", "title", "sent_id")
        }
        pos, neg = [], []
        for couple in _couples(row, "context", "title", "sentences"):
            title, sentences = _title(couple, "context"), couple[1]
            if not isinstance(sentences, list):
                raise Fault(f"the sentences of {title!r} must be a list, got {kind_of(sentences)}", "context")
            text = "".join(_checked(one, f"a sentence of {title!r}") for one in sentences).strip()
            (pos if title in supporting else neg).append(Document(f"{title} {text}"))
        if not pos:
            raise LeftOut("no paragraph of the supporting facts")
        return Draft(text_of(row, "question"), pos, neg[:negatives], optional_id(row, "_id", "id"))

    return intake.rows(parse)


def _couples(row: dict[str, Any], name: str, first: str, second: str) -> list[list[Any]]:
    """Couples of a field: lists of two, objects with the keys `first` and `second`, or one object of two lists."""
    value = row.get(name)
    if isinstance(value, dict):
        firsts, seconds = list_of(value, first), list_of(value, second)
        if len(firsts) != len(seconds):
            raise Fault(f"{name} has {len(firsts)} of {first} and {len(seconds)} of {second}", name)
        return [list(couple) for couple in zip(firsts, seconds, strict=True)]
    couples = [[one.get(first), one.get(second)] if isinstance(one, dict) else one for one in list_of(row, name)]
    for number, couple in enumerate(couples):
        if not isinstance(couple, list) or len(couple) < 2:
            raise Fault(f"{name}[{number}] must be a list of a title and what belongs to it", name)
    return couples


def _title(couple: list[Any], name: str) -> str:
    return clean(couple[0], f"a title of {name}", name)


def _checked(value: Any, label: str) -> str:
    clean(value, label, "context")
    return value


def bioasq(intake: Intake) -> Iterator[Draft]:
    """BioASQ's task b: the snippets of a question are its positives, and mining has to find negatives.

    Reads the published JSON (`questions`) and rows of the same objects.

    Args:
        intake: the sources.
    """

    def parse(row: dict[str, Any]) -> Draft:
        pos = []
        for number, snippet in enumerate(list_of(row, "snippets") if row.get("snippets") is not None else []):
            if not isinstance(snippet, dict):
                raise Fault(f"snippets[{number}] must be an object, got {kind_of(snippet)}", "snippets")
            pos.append(Document(clean(snippet.get("text"), f"snippets[{number}].text", "snippets")))
        if not pos:
            raise LeftOut("the question has no snippet")
        return Draft(text_of(row, "body"), pos, query_id=optional_id(row, "id"))

    for path in intake.sources:
        yield from intake.each(_questions(path) if is_document(path) else file_items(path, intake.bad), parse)


def _questions(path: Path) -> Iterator[Item]:
    for number, question in enumerate(_list_at(json_document(path), "questions", str(path))):
        at = f"{path}: questions[{number}]"
        if not isinstance(question, dict):
            raise DataError(f"{at} must be an object, got {kind_of(question)}")
        yield lambda name, at=at: at, question


def hover(intake: Intake, *, corpus: str | Path) -> Iterator[Draft]:
    """HoVer: the articles of a claim's supporting facts are its positives, and mining has to find negatives.

    Claims of both labels are kept: the instruction asks for documents that support or refute a claim, and a claim
    that is not supported was made out of the facts of the same articles.

    Args:
        intake: the items: `claim`, and `supporting_facts` as lists of title and sentence number, or as the Hugging
            Face set has them, with `key` and `value`.
        corpus: the articles, rows of `title` and `text` in any format of rows.
    """

    def parse(row: dict[str, Any]) -> tuple[str, list[str], str | None]:
        couples = _couples(row, "supporting_facts", "key", "value")
        titles = dict.fromkeys(_key(_title(couple, "supporting_facts")) for couple in couples)
        return text_of(row, "claim"), list(titles), optional_id(row, "uid", "id")

    claims = list(intake.rows(parse))
    intake.stop_if_bad()
    articles = _articles(Path(corpus), {title for _, titles, _ in claims for title in titles})
    for claim, titles, claim_id in claims:
        found = [Document(articles[title]) for title in titles if title in articles]
        if len(found) < len(titles):
            intake.counts.notes["articles that the corpus lacks"] += len(titles) - len(found)
        if found:
            yield Draft(claim, found, query_id=claim_id)
        else:
            intake.counts.left_out["none of the claim's articles is in the corpus"] += 1


def _articles(path: Path, wanted: Iterable[str]) -> dict[str, str]:
    """Title and text of the articles that are wanted, by key; the others are not kept."""
    wanted, articles = set(wanted), {}
    reader = Intake([path])
    for title, text in reader.rows(lambda row: (text_of(row, "title"), text_of(row, "text"))):
        if (key := _key(title)) in wanted:
            articles.setdefault(key, f"{title} {text}".strip())
    reader.stop_if_bad()
    return articles


def _key(title: str) -> str:
    """A title as it is compared: Wikipedia's dumps differ in how they compose accents and in underscores."""
    return unicodedata.normalize("NFC", title).replace("_", " ").strip()
