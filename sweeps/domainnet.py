"""DomainNet, 5 tasks of 69 classes over all six domains, ViT-B/16: the paper's experiment, its settings searched.

inflora data prepare domainnet --source FOLDER_WITH_ZIPS_AND_LISTS  once
python sweeps/domainnet.py                                          the sweep, one GPU per trial
python sweeps/domainnet.py --smoke                                  the whole path, generated images, CPU, a minute
"""

from inflora.presets import for_tuning
from sweeps.recipe import Integer, NearOne, Real, Resources, Sweep, main

domainnet = Sweep(
    name="domainnet",
    base=for_tuning("domainnet-5"),
    space={
        "adapter.rank": Integer(low=4, high=64, log=True),
        "adapter.energy": NearOne(low=0.8, high=0.999),
        "optim.lr": Real(low=5e-4, high=5e-2, log=True),
    },
    first=({"adapter.rank": 30, "adapter.energy": 0.95, "optim.lr": 5e-3},),  # the paper's
    # An epoch is 410,000 images: few trials.
    trials=16,
    resources=Resources(cpus_per_worker=8, gpus_per_worker=1),
)

if __name__ == "__main__":
    main(domainnet)
