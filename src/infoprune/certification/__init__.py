"""Certificates: the cheapest plan of a path whose drop of accuracy is bounded at a stated confidence."""
