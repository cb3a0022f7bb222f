"""CIFAR-100, 10 tasks of 10 classes, ViT-B/16: the paper's experiment, its settings searched. One GPU per trial.

inflora data prepare cifar100 --source cifar-100-python.tar.gz      once
python sweeps/cifar100.py                                           the sweep
python sweeps/cifar100.py --sweep cifar100-ranpac                   with classifiers in closed form, and a trained A
python sweeps/cifar100.py --smoke                                   the whole path, generated images, CPU, a minute
"""

from inflora.presets import for_tuning
from sweeps.recipe import Choice, Integer, NearOne, Real, Resources, Sweep, main

space = {
    "adapter.rank": Integer(low=2, high=64, log=True),
    "adapter.energy": NearOne(low=0.8, high=0.999),
    "optim.lr": Real(low=1e-4, high=5e-3, log=True),
}
paper = {"adapter.rank": 10, "adapter.energy": 0.95, "optim.lr": 5e-4}
resources = Resources(cpus_per_worker=2, gpus_per_worker=1)

cifar100 = Sweep(
    name="cifar100",
    base=for_tuning("cifar100-10"),
    space=space,
    first=(paper,),
    trials=32,
    resources=resources,
)
ranpac = Sweep(
    name="cifar100-ranpac",
    base=for_tuning("cifar100-10-ranpac"),
    space=space
    | {
        "adapter.merge": Real(low=0.05, high=1.0, log=True),
        "adapter.targets": Choice(options=("k,v", "q,k,v", "q,k,v,mlp.fc1")),
        "classifier.name": Choice(options=("lda", "ranpac")),
    },
    first=(paper | {"adapter.merge": 0.3, "adapter.targets": "k,v", "classifier.name": "ranpac"},),
    trials=48,
    resources=resources,
)

if __name__ == "__main__":
    main(cifar100, ranpac)
