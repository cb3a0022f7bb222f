"""CIFAR-100, 10 tasks of 10 classes, ViT-B/16: the paper's experiment, its settings searched. One GPU per trial.

inflora data prepare cifar100 --source cifar-100-python.tar.gz      once
python sweeps/cifar100.py                                           the sweep
python sweeps/cifar100.py --smoke                                   the whole path, generated images, CPU, a minute
"""

from inflora.presets import for_tuning
from sweeps.recipe import Integer, NearOne, Real, Resources, Sweep, main

cifar100 = Sweep(
    name="cifar100",
    base=for_tuning("cifar100-10"),
    space={
        "adapter.rank": Integer(low=2, high=64, log=True),
        "adapter.energy": NearOne(low=0.8, high=0.999),
        "optim.lr": Real(low=1e-4, high=5e-3, log=True),
    },
    first=({"adapter.rank": 10, "adapter.energy": 0.95, "optim.lr": 5e-4},),  # the paper's
    trials=32,
    grace_tasks=3,
    resources=Resources(cpus_per_worker=2, gpus_per_worker=1),
)

if __name__ == "__main__":
    main(cifar100)
