"""digits: 1,797 real 8 x 8 scans, 5 tasks of 2 classes, the shipped backbone; minutes on a laptop.

python sweeps/digits.py
"""

from inflora.config import AugmentSettings, DataSettings, InfLoRASettings, OptimSettings, RunConfig
from sweeps.cli import main
from sweeps.engine.spec import Integer, NearOne, Real, Sweep

sweep = Sweep(
    name="digits",
    base=RunConfig(
        data=DataSettings(dataset="digits", tasks=5, augment=AugmentSettings(scale=(0.6, 1.0), flip=False)),
        method=InfLoRASettings(),
        optim=OptimSettings(epochs=20),
    ),
    space={
        "method.rank": Integer(low=1, high=64, log=True),
        "method.energy": NearOne(low=0.8, high=0.9999),
        "optim.lr": Real(low=1e-4, high=2e-2, log=True),
    },
    first=({"method.rank": 10, "method.energy": 0.95, "optim.lr": 5e-4},),
    trials=16,
)

if __name__ == "__main__":
    main(sweep)
