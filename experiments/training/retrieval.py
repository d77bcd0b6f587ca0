"""Retrieval by binary codes: a short list by Hamming distance, ranked by the distance of features
(Lin et al. 2015, Deep Learning of Binary Hash Codes for Fast Image Retrieval)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRS = 2**18
"""Queries meet items in portions of so many pairs, which fit a cache."""


def packed(codes: Tensor) -> Tensor:
    """Codes of 0 and 1 `[N, bits]` as bytes `[N, bits / 8]`, the first bit of each the highest, and
    zeros after the last."""
    bits = codes.shape[1]
    padded = F.pad(codes.to(torch.uint8), (0, -bits % 8)).unflatten(1, (-1, 8))
    places = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=codes.device)
    return (padded * places).sum(2, dtype=torch.uint8)


def popcount(x: Tensor) -> Tensor:
    """How many bits of each byte are 1, as bytes: sums of neighbours in pairs, fours and eights."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


def hamming(queries: Tensor, items: Tensor) -> Tensor:
    """In how many bits packed codes `[Q, W]` and `[N, W]` differ, int32 `[Q, N]`."""
    distances = torch.zeros(len(queries), len(items), dtype=torch.int32, device=items.device)
    for query, item in zip(queries.unbind(1), items.unbind(1), strict=True):
        distances += popcount(query[:, None] ^ item)
    return distances


def nearest(
    codes: Tensor,
    features: Tensor,
    query_codes: Tensor,
    query_features: Tensor,
    threshold: int,
    count: int,
    leave_out: Tensor | None = None,
) -> Tensor:
    """The `count` items nearest to each query by Euclidean distance of features, among those whose
    codes differ in fewer than `threshold` bits: int64 `[Q, count]`, with -1 where there are fewer.

    Args:
        codes, features: of the items: packed `[N, W]`, and `[N, D]`.
        query_codes, query_features: the same of the queries.
        leave_out: an item that does not count for each query, `[Q]`, such as the query itself.
    """
    found = torch.full((len(query_codes), count), -1, device=codes.device)
    for rows in torch.arange(len(query_codes), device=codes.device).split(_portion(codes)):
        listed = hamming(query_codes[rows], codes) < threshold
        if leave_out is not None:
            listed[torch.arange(len(rows), device=codes.device), leave_out[rows]] = False
        query, item = listed.nonzero(as_tuple=True)
        distances = (features[item] - query_features[rows][query]).square().sum(1)
        order = distances.argsort(stable=True)
        order = order[query[order].argsort(stable=True)]
        query, item = query[order], item[order]
        sizes = listed.sum(1)
        place = torch.arange(len(query), device=codes.device) - (sizes.cumsum(0) - sizes)[query]
        near = place < count
        found[rows[query[near]], place[near]] = item[near]
    return found


def mean_average_precision(
    codes: Tensor, labels: Tensor, query_codes: Tensor, query_labels: Tensor
) -> float:
    """The mean, over queries, of the average precision at each relevant item when all are ranked by
    Hamming distance, in their own order among equals. Relevant are items of the query's class;
    queries without any do not count."""
    total, counted = 0.0, 0
    ranks = torch.arange(1, len(codes) + 1, device=codes.device)
    for rows in torch.arange(len(query_codes), device=codes.device).split(_portion(codes)):
        order = hamming(query_codes[rows], codes).argsort(dim=1, stable=True)
        relevant = labels[order] == query_labels[rows][:, None]
        precision = relevant.cumsum(1) / ranks
        count = relevant.sum(1)
        sums = (precision * relevant).sum(1, dtype=torch.float64)[count > 0]
        total += (sums / count[count > 0]).sum().item()
        counted += len(sums)
    return total / max(1, counted)


def _portion(codes: Tensor) -> int:
    return max(1, _PAIRS // max(1, len(codes)))
