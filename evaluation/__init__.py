"""How good generated middle frames are: scores, protocols, statistics and the report."""
