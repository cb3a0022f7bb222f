"""The engine of a sweep, in the order of its life: ``space``, ``run``, ``ledger``, ``show``, ``after``."""
