"""How well the backbone's embeddings find what belongs together: recall@k, MRR and nDCG of queries
over a corpus.

    corpus    {"id", "text"}
    queries   {"query", "relevant": [ids]}    (in CSV: ids with blanks between them)

The embedding of a text is the mean of the hidden states over its tokens, of length 1, so that a
product is a cosine.
"""

import numpy as np

from lora.common.errors import UserError
from lora.data import files
from lora.data.examples import string

CUTOFFS = (1, 5, 10)


def read_corpus(path):
    """{id: text}. Raises UserError."""
    corpus = {}
    for where, row in files.rows(path):
        name = identifier(where, row.get("id"))
        if name in corpus:
            raise UserError(f"{where}: id {name} is there a second time; each needs its own.")
        corpus[name] = string(where, "text", row.get("text"))
    if not corpus:
        raise UserError(f"{path}: 0 documents; expected one at least.")
    return corpus


def read_queries(path, corpus):
    """[(query, the set of the places in the corpus that are relevant to it)]. Raises UserError."""
    places = {name: place for place, name in enumerate(corpus)}
    queries = []
    for where, row in files.rows(path):
        relevant = row.get("relevant")
        relevant = relevant.split() if isinstance(relevant, str) else relevant
        if not isinstance(relevant, list) or not relevant:
            raise UserError(f"{where}: relevant is {relevant!r}; expected a list of ids.")
        names = {identifier(where, name) for name in relevant}
        unknown = sorted(names - places.keys())
        if unknown:
            raise UserError(f"{where}: relevant names {unknown[0]}, which is no id of the corpus.")
        queries.append((string(where, "query", row.get("query")), {places[name] for name in names}))
    if not queries:
        raise UserError(f"{path}: 0 queries; expected one at least.")
    return queries


def identifier(where, value):
    """An id as text: CSV knows no numbers."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise UserError(f"{where}: id {value!r}; expected a text or an integer.")
    return str(value)


def ranks_of(queries, corpus, relevant):
    """For each query the places, from 1 on and in order, of its relevant documents among all, the
    most similar first.

    queries [q, width] and corpus [c, width] of length 1, relevant: q sets of places in the corpus.
    """
    ranks = []
    for query, wanted in zip(queries, relevant):
        order = np.argsort(-(corpus @ query), kind="stable")
        ranks.append((np.flatnonzero(np.isin(order, list(wanted))) + 1).tolist())
    return ranks


def metrics(ranks):
    """Means over the queries of `ranks_of`: recall@k, MRR (1 / the first rank), nDCG@10 with
    relevance 0 or 1.
    """
    recall = {
        k: [sum(rank <= k for rank in found) / len(found) for found in ranks] for k in CUTOFFS
    }
    result = {f"recall@{k}": float(np.mean(of_queries)) for k, of_queries in recall.items()}
    gain = 1 / np.log2(np.arange(2, 12))  # at ranks 1 to 10
    ndcg = [
        sum(gain[rank - 1] for rank in found if rank <= 10) / gain[: len(found)].sum()
        for found in ranks
    ]
    return result | {
        "mrr": float(np.mean([1 / found[0] for found in ranks])),
        "ndcg@10": float(np.mean(ndcg)),
    }
