"""The machinery: Ray Tune runs the trials that the ledger proposes, on the nodes of a cluster."""
