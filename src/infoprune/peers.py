"""Methods of others, and single criteria of ours, as options of the same procedure: what ``--method NAME`` sets.

Each takes the defaults of :class:`infoprune.options.CompressionOptions` for what it does not say, ``rank_multiple`` among them, and the
budget is always the user's. All are training-free, and none refits layer by layer, as the originals do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from infoprune.errors import InfoPruneError


@dataclass(frozen=True)
class Peer:
    """A method to compare with.

    Attributes:
        scope: What it cuts.
        reference: Where it comes from.
        options: Fields of :class:`infoprune.options.CompressionOptions`.
        note: What differs from the original.
    """

    scope: Literal["heads", "ffn", "model"]
    reference: str
    options: dict[str, Any]
    note: str


# Criteria that know nothing of output gradients take none: their calibration is a forward pass, and a predicted loss a squared error.
_FORWARD = {"ffn_metric": "identity", "weighting": "uniform", "repair": False}
_PLAIN = _FORWARD | {"ffn": "none", "compensate": "none"}
_OURS = {"ffn": "none", "repair": False}  # least-squares compensation and weighted tokens: only the criterion is another
_SVD = {
    "heads": "none", "ffn": "low-rank", "centred": False, "structure": "separate", "shrinkage": 0.0, "allocation": "uniform",
} | _FORWARD  # fmt: skip
_NEURONS = _FORWARD | {"ffn": "width"}
_OWN_NOTE = "a criterion of this project alone, with our compensation and allocation"

PEERS: dict[str, Peer] = {
    "random": Peer("heads", "uniform random scores", {"heads": "random"} | _PLAIN, "key/value groups go as a whole"),
    "magnitude": Peer(
        "heads", "Frobenius norm of the output projection's columns", {"heads": "magnitude"} | _PLAIN, "key/value groups go as a whole"
    ),
    "taylor": Peer(
        "heads", "Michel, Levy & Neubig 2019, arXiv 1905.10650", {"heads": "taylor"} | _PLAIN,
        "absolute value per question, as in the paper's formula (its code: per token); all heads are scored once, not in rounds; "
        "key/value groups go as a whole",
    ),
    "flap-heads": Peer(
        "heads", "FLAP, An et al. 2023, arXiv 2312.11983", {"heads": "fluctuation"} | _PLAIN | {"compensate": "mean"},
        "heads alone, in both towers at once; variances over all tokens, where its code merges samples of equal length approximately; "
        "key/value groups go as a whole",
    ),
    "erank": Peer("heads", "effective rank, Roy & Vetterli 2007", {"heads": "erank"} | _OURS, _OWN_NOTE),
    "ks": Peer("heads", "abstract of InfoPrune, arXiv 2511.19518", {"heads": "ks"} | _OURS, _OWN_NOTE),
    "erank-ks": Peer("heads", "abstract of InfoPrune, arXiv 2511.19518", {"heads": "erank-ks"} | _OURS, _OWN_NOTE),
    "energy": Peer("heads", "second-order loss of single heads", {"heads": "energy"} | _OURS, _OWN_NOTE),
    "rate": Peer("heads", "information rate of a Gaussian channel", {"heads": "rate"} | _OURS, _OWN_NOTE),
    "conditional-rate": Peer("heads", "information rate given the other heads", {"heads": "conditional-rate"} | _OURS, _OWN_NOTE),
    "svd": Peer("ffn", "Eckart & Young 1936", _SVD | {"whitening": "none"}, "FFNs alone"),
    "asvd": Peer(
        "ffn", "ASVD, Yuan et al. 2023, arXiv 2312.05821", _SVD | {"whitening": "diagonal"},
        "FFNs alone, the same share everywhere: without its search for ranks by measured perplexity",
    ),
    "svd-llm": Peer(
        "ffn", "SVD-LLM, Wang et al. 2024, arXiv 2403.07378", _SVD,
        "FFNs alone, without its update of parameters afterwards; the down projection is solved on the output side, with the same optimum",
    ),
    "pgsvd": Peer(
        "ffn", "PGSVD, Solgi et al. 2025, arXiv 2510.05544", _SVD | {"allocation": "tolerance"},
        "FFNs alone, one tolerance for both towers (the paper: one each); factors in closed form, whose loss alternating least squares can "
        "only approach",
    ),
    "swift-svd": Peer(
        "ffn", "like Swift-SVD, Qi et al. 2026, arXiv 2604.01609", _SVD | {"allocation": "effective-rank"},
        "FFNs alone; ranks in proportion to the effective rank of energies with a floor, without the importance of layers: from its "
        "abstract, no code is public",
    ),
    "io-svd": Peer(
        "ffn", "like IO-SVD, Abbasi et al. 2026, arXiv 2605.15626",
        _SVD | {"ffn_metric": "task", "top_k": 64, "allocation": "global"},
        "FFNs alone; ranks from the second-order loss under our floor, not from first-order scores; K is our choice: from its abstract",
    ),
    "flap-neurons": Peer(
        "ffn", "FLAP, An et al. 2023, arXiv 2312.11983", _NEURONS | {"heads": "none", "neurons": "fluctuation"},
        "FFNs alone, in groups of the rank multiple, at least one group in each",
    ),
    "taylor-neurons": Peer(
        "ffn", "LLM-Pruner, Ma et al. 2023, arXiv 2305.11627",
        _NEURONS | {"heads": "none", "neurons": "taylor", "centred": False},
        "FFNs alone, by one ranking over all of them",
    ),
    "flap": Peer(
        "model", "FLAP, An et al. 2023, arXiv 2312.11983",
        _NEURONS | {"heads": "fluctuation", "compensate": "mean", "neurons": "fluctuation"},
        "heads get the share of the attention's cost that is asked of the model, neurons the rest: two rankings where it has one",
    ),
    "llm-pruner": Peer(
        "model", "LLM-Pruner, Ma et al. 2023, arXiv 2305.11627",
        _NEURONS
        | {"heads": "grouped-taylor", "compensate": "none", "neurons": "taylor", "centred": False, "allocation": "uniform"},
        "the same share in every block up to whole heads, FFNs get what these leave, first and last layers included; "
        "gradients over all of the calibration data; without its LoRA",
    ),
    "random-widths": Peer(
        "model", "uniform random scores",
        _NEURONS | {"heads": "random", "compensate": "none", "neurons": "random", "centred": False, "allocation": "uniform"},
        "the same share in every block",
    ),
    "shortgpt": Peer(
        "model", "ShortGPT, Men et al. 2024, arXiv 2403.03853", _FORWARD | {"layers": "block-influence"},
        "layers of both towers in one list; dropped layers that still fit come back, the most influential first; biases of the dense "
        "output projections stay",
    ),
}  # fmt: skip


def peer(name: str) -> Peer:
    """The method of that name.

    Raises:
        InfoPruneError: There is none; lists those there are.
    """
    if name not in PEERS:
        raise InfoPruneError(f"Unknown method '{name}'. Known: {', '.join(PEERS)}.")
    return PEERS[name]
