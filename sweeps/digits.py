"""digits: 1,797 real 8 x 8 scans, 5 tasks of 2 classes, the shipped backbone; minutes on a laptop.

python sweeps/digits.py                             InfLoRA, and the classifier in closed form that suits it
python sweeps/digits.py --sweep digits-published    InfLoRA as published: A fixed, a linear head per task
python sweeps/digits.py --sweep digits-sequential   a baseline, with the same number of trials

docs/results.md has every adapter with every classifier on this stream.
"""

from inflora.config import (
    AugmentSettings,
    DataSettings,
    InfLoRASettings,
    LDASettings,
    LoRASettings,
    NoAdapterSettings,
    OptimSettings,
    RunConfig,
)
from sweeps.recipe import Choice, Integer, NearOne, Real, Sweep, main

# 1993 is the usual seed for shuffled class orders.
data = DataSettings(
    dataset="digits", tasks=5, order_seed=1993, validation=0.2, augment=AugmentSettings(scale=(0.8, 1.0), flip=False)
)
# Heads start at zero: of two classes only the difference is ever trained, and what they share would stay noise.
optim = OptimSettings(epochs=4, batch_size=16, head_init="zero")
base = RunConfig(data=data, optim=optim)
rank, lr = Integer(low=4, high=64, log=True), Real(low=5e-4, high=2e-2, log=True)
energy, merge = NearOne(low=0.9, high=0.9999), Real(low=0.05, high=1.0, log=True)
# Only qda and lda shrink a covariance, only ranpac has random features.
closed_form = {
    "classifier.name": Choice(options=("lda", "qda", "ranpac")),
    "classifier.shrinkage": Real(low=1e-3, high=0.3, log=True, when={"classifier.name": ("lda", "qda")}),
    "classifier.features": Choice(options=(500, 1_000, 2_000), when={"classifier.name": ("ranpac",)}),
}

inflora = Sweep(
    name="digits",
    base=base.model_copy(
        update={
            "adapter": InfLoRASettings(features="both", train_A=True, first_merge=1.0),
            "classifier": LDASettings(),
        }
    ),
    space={
        "adapter.rank": rank,
        "adapter.energy": energy,
        "optim.lr": lr,
        "adapter.merge": merge,
        "classifier.name": Choice(options=("lda", "ranpac")),
    },
    # The paper's, for CIFAR-100.
    first=(
        {
            "adapter.rank": 10,
            "adapter.energy": 0.95,
            "optim.lr": 5e-4,
            "adapter.merge": 1.0,
            "classifier.name": "lda",
        },
    ),
    trials=12,
)
published = Sweep(
    name="digits-published",
    base=base.model_copy(update={"adapter": InfLoRASettings()}),
    space={"adapter.rank": rank, "adapter.energy": energy, "optim.lr": lr},
    first=({"adapter.rank": 10, "adapter.energy": 0.95, "optim.lr": 5e-4},),
    trials=12,
)
sequential = Sweep(
    name="digits-sequential",
    base=base.model_copy(update={"adapter": LoRASettings(features="both", first_merge=1.0)}),
    space={"adapter.rank": rank, "optim.lr": lr, "adapter.merge": merge, **closed_form},
    trials=12,
)
frozen = Sweep(
    name="digits-frozen",
    base=base.model_copy(update={"adapter": NoAdapterSettings()}),
    space=closed_form,
    trials=12,
)
joint = Sweep(
    name="digits-joint",
    base=base.model_copy(update={"data": data.model_copy(update={"joint": True}), "adapter": LoRASettings()}),
    space={"adapter.rank": rank, "optim.lr": lr, **closed_form},
    trials=12,
)

if __name__ == "__main__":
    main(inflora, published, sequential, frozen, joint)
