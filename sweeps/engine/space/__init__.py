"""The search itself: what is tried, who proposes it, which trials are stopped early, and what it may cost."""
