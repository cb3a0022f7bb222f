"""ImageNet-R in 5, 10 or 20 tasks, ViT-B/16: the paper's experiments, their settings searched. One GPU per trial.

inflora data prepare imagenet_r --source imagenet-r.tar             once
python sweeps/imagenet_r.py                                         10 tasks
python sweeps/imagenet_r.py --sweep imagenet-r-20                   20 tasks
python sweeps/imagenet_r.py --smoke                                 the whole path, generated images, CPU, a minute
"""

from inflora.presets import for_tuning
from sweeps.recipe import Integer, NearOne, Real, Resources, Sweep, main

space = {
    "adapter.rank": Integer(low=2, high=64, log=True),
    "adapter.energy": NearOne(low=0.9, high=0.9995),
    "optim.lr": Real(low=1e-4, high=5e-3, log=True),
}
paper = {"adapter.rank": 10, "adapter.energy": 0.98, "optim.lr": 5e-4}
# JPEGs are decoded on the worker's CPUs.
resources = Resources(cpus_per_worker=8, gpus_per_worker=1)

tasks_10, tasks_5, tasks_20 = (
    Sweep(
        name=f"imagenet-r-{tasks}",
        base=for_tuning(f"imagenet-r-{tasks}"),
        space=space,
        first=(paper,),
        trials=24,
        resources=resources,
    )
    for tasks in (10, 5, 20)
)

if __name__ == "__main__":
    main(tasks_10, tasks_5, tasks_20)
