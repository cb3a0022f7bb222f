"""How a sweep runs: spec -> search -> trials -> tracking -> export."""
