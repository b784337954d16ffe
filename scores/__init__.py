"""How good, and how sure: metrics, statistics, the challenge's scores, reports, pictures, other people's results."""
