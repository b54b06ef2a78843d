"""What to keep: criteria for heads and for FFN ranks, ours and the baselines behind one interface each."""
