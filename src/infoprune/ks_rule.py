"""The adaptive rule: a tolerance of the Kolmogorov-Smirnov distance for every site, instead of one budget for all. Pure."""

from __future__ import annotations

import torch

from infoprune.architecture import AttentionSite
from infoprune.criteria.heads import Block, Removal
from infoprune.decisions import Decisions, head_decision, round_up
from infoprune.linalg import descending_eigvalsh
from infoprune.options import CompressionOptions
from infoprune.plan import FFNDecision, max_rank
from infoprune.solve import SolvedSite
from infoprune.spectrum import ks_distance, rank_for_ks


def decide_by_ks(solved: list[SolvedSite], options: CompressionOptions) -> Decisions:
    """Remove as many units, and keep as few ranks, as hold each site's distance within ``options.ks``."""
    assert options.ks is not None
    heads, ffn, loss = {}, {}, 0.0
    for item in solved:
        if isinstance(item.site, AttentionSite):
            assert item.removal is not None and item.block is not None
            count = _removable(item.block, item.removal, options)
            if count:
                heads[item.site.path] = head_decision(item.site, item.removal, count, options)
                loss += item.removal.losses[count] * item.tokens
            continue
        assert item.spectra is not None and item.tails is not None
        ranks = {}
        for name, spectrum in _preferred(item.spectra).items():
            rank = round_up(rank_for_ks(spectrum, options.ks), options.rank_multiple)
            if rank <= max_rank(item.site, name):
                ranks[name] = rank
                loss += 0.5 * float(item.tails[name][rank]) * item.tokens
        if ranks:
            ffn[item.site.path] = FFNDecision.model_validate(ranks)
    return Decisions(heads, ffn, loss)


def _preferred(spectra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Joint gate and up where both structures were solved: at equal KS it costs less."""
    return {name: s for name, s in spectra.items() if "joint_rank" not in spectra or name in ("joint_rank", "down_rank")}


def _removable(block: Block, removal: Removal, options: CompressionOptions) -> int:
    """Most units of the order whose removal keeps KS(output spectrum without | with) within the tolerance.

    A block that writes nothing any more has no spectrum: that is the largest distance, whatever the tolerance, from all but a silent block.
    """
    assert options.ks is not None
    full = descending_eigvalsh(block.out @ block.covariance @ block.out.T)
    count = 0
    for k in range(1, len(removal.order) + 1):
        kept = block.index([u for u in range(block.site.num_units) if u not in removal.order[:k]])
        if not len(kept) and float(full.sum()) > 0:
            break
        weight = block.out[:, kept]
        if options.compensate == "least-squares" and len(kept):
            weight = torch.linalg.solve(block.covariance[kept][:, kept], block.covariance[kept, :] @ block.out.T).T
        if ks_distance(full, descending_eigvalsh(weight @ block.covariance[kept][:, kept] @ weight.T)) > options.ks:
            break
        count = k
    return count
