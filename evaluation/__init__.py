"""How good generated middle frames are: scores, baselines, protocols, statistics and the report."""
