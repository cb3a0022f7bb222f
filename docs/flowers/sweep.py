"""A sweep of one's own dataset: python docs/flowers/sweep.py"""

from pathlib import Path

from inflora.config import load_config
from sweeps.recipe import Integer, NearOne, Real, Sweep, main

flowers = Sweep(
    name="flowers",
    base=load_config(Path(__file__).with_name("run.yaml")),
    space={
        "adapter.rank": Integer(low=1, high=8, log=True),
        "adapter.energy": NearOne(low=0.8, high=0.999),
        "optim.lr": Real(low=1e-4, high=1e-2, log=True),
    },
    trials=4,
)

if __name__ == "__main__":
    main(flowers)
