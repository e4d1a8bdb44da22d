"""Retrieval with the backbone's embeddings: recall@k, MRR and nDCG of queries over a corpus.

    corpus    {"id", "text"}
    queries   {"query", "relevant": [ids]}    (in CSV: ids separated by spaces)

Embeddings have length 1, so that their product is the cosine similarity.
"""

from collections.abc import Sequence

import numpy as np

from lora.common.errors import UserError
from lora.data import files
from lora.data.examples import require_text

CUTOFFS = (1, 5, 10)
Query = tuple[str, set[int]]  # the text, and the indices of its relevant documents in the corpus


def read_corpus(path: str) -> dict[str, str]:
    """Return {id: text}. Raises UserError."""
    corpus = {}
    for where, row in files.read_rows(path):
        document_id = read_id(where, row.get("id"))
        if document_id in corpus:
            raise UserError(f"{where}: id {document_id} occurs twice; each needs its own.")
        corpus[document_id] = require_text(where, "text", row.get("text"))
    if not corpus:
        raise UserError(f"{path}: 0 documents; expected at least one.")
    return corpus


def read_queries(path: str, corpus: dict[str, str]) -> list[Query]:
    """Read queries about the documents of `corpus`. Raises UserError."""
    indices = {document_id: i for i, document_id in enumerate(corpus)}
    queries = []
    for where, row in files.read_rows(path):
        relevant = row.get("relevant")
        if isinstance(relevant, str):
            relevant = relevant.split()
        if not isinstance(relevant, list) or not relevant:
            raise UserError(f"{where}: relevant is {relevant!r}; expected a list of ids.")
        ids = {read_id(where, value) for value in relevant}
        unknown = sorted(ids - indices.keys())
        if unknown:
            raise UserError(f"{where}: relevant names {unknown[0]}, which is no id of the corpus.")
        text = require_text(where, "query", row.get("query"))
        queries.append((text, {indices[document_id] for document_id in ids}))
    if not queries:
        raise UserError(f"{path}: 0 queries; expected at least one.")
    return queries


def read_id(where: str, value: object) -> str:
    """Return an id as text, because CSV has no numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{where}: id {value!r}; expected a text or an integer.")
    return str(value)


def relevant_ranks(
    queries: np.ndarray, corpus: np.ndarray, relevant: Sequence[set[int]]
) -> list[list[int]]:
    """Return for each query [q, width] its documents' ranks in `corpus` [c, width], from 1 on."""
    ranks = []
    for query, documents in zip(queries, relevant):
        order = np.argsort(-(corpus @ query), kind="stable")
        is_relevant = np.isin(order, list(documents))
        ranks.append((np.flatnonzero(is_relevant) + 1).tolist())
    return ranks


def metrics(ranks: list[list[int]]) -> dict[str, float]:
    """Return means over the queries: recall@k, MRR (1 / the first rank), nDCG@10 (binary)."""
    values = {}
    for k in CUTOFFS:
        recalls = [np.mean(np.array(query_ranks) <= k) for query_ranks in ranks]
        values[f"recall@{k}"] = float(np.mean(recalls))
    values["mrr"] = float(np.mean([1 / query_ranks[0] for query_ranks in ranks]))
    gains = 1 / np.log2(np.arange(2, 12))  # of a relevant document at ranks 1 to 10
    ndcgs = []
    for query_ranks in ranks:
        gain = sum(gains[rank - 1] for rank in query_ranks if rank <= 10)
        ndcgs.append(gain / gains[: len(query_ranks)].sum())
    values["ndcg@10"] = float(np.mean(ndcgs))
    return values
